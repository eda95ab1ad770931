//! The packs of a repository as readers see them: opened once, followed where they moved.

use super::search::Search;
use super::{Forwards, Repairs};
use crate::cache::ByteCache;
use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::pack::Pack;
use crate::{Location, ObjectId, RepoError, Result};
use std::sync::{Arc, OnceLock};

/// How many forwards are followed in a row (format §10). `prune` does not move chunks further than
/// this; a longer chain, or a circle, is damage.
pub(crate) const MAX_FORWARDS: usize = 16;

/// The open packs that are kept, in bytes of directory. Some 100 packs, and as many open files.
const OPEN_PACKS_BYTES: usize = 8 << 20;

/// What one file descriptor is counted as, so that many tiny packs do not use them all up.
const OPEN_PACK_OVERHEAD_BYTES: usize = 32 << 10;

/// What stands under a pack's id.
#[derive(Clone)]
pub(crate) enum Place {
    /// The pack.
    Pack(Arc<Pack>),
    /// The notes where its chunks went.
    Moved(Arc<Forwards>),
}

/// Opens packs and forwards and keeps them open. Shared by threads.
pub(crate) struct PackSet {
    context: Arc<RepoContext>,
    open: ByteCache<ObjectId, Place>,
    repairs: OnceLock<Repairs>,
}

/// What was passed on the way from a map to a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passed {
    /// This forward.
    Forward(ObjectId),
    /// This record of what was healed.
    Healed(ObjectId),
}

/// Where some blocks are, or why that cannot be told.
pub(crate) struct Traced {
    /// For how many blocks this holds, at least one.
    pub count: u32,
    /// Where the way ended, whether there is such a place or not.
    pub last: Location,
    /// The pack that holds them now, and the ordinal of the first.
    pub place: Result<(Arc<Pack>, u32)>,
}

impl PackSet {
    pub(crate) fn new(context: Arc<RepoContext>) -> Self {
        Self { context, open: ByteCache::new(OPEN_PACKS_BYTES), repairs: OnceLock::new() }
    }

    /// What is damaged and healed, as it was when this set was first used.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn repairs(&self) -> Result<&Repairs> {
        if let Some(repairs) = self.repairs.get() {
            return Ok(repairs);
        }
        let loaded = Repairs::load(&self.context)?;
        Ok(self.repairs.get_or_init(|| loaded))
    }

    /// What stands under `id`.
    ///
    /// # Errors
    /// [`RepoError::Damaged`](crate::RepoError::Damaged) where there is neither a pack nor a forward.
    pub(crate) fn place(&self, id: ObjectId) -> Result<Place> {
        if let Some(place) = self.open.get(&id) {
            return Ok((*place).clone());
        }
        let (place, bytes) = match self.context.try_open_object(ObjectKind::Pack, id) {
            Ok(Some(opened)) => {
                let pack = Pack::from_object(&self.context, opened)?;
                let bytes = pack.memory_bytes();
                (Place::Pack(Arc::new(pack)), bytes)
            }
            // Gone, or going while it was opened.
            Ok(None) | Err(RepoError::NotFound { .. }) => {
                let forwards = Forwards::open(&self.context, id)?;
                let bytes = forwards.memory_bytes();
                (Place::Moved(Arc::new(forwards)), bytes)
            }
            Err(error) => return Err(error),
        };
        self.open.put(id, Arc::new(place.clone()), bytes + OPEN_PACK_OVERHEAD_BYTES);
        Ok(place)
    }

    /// Looks at `id` anew: what stood under it may have been moved since it was opened. Answers with
    /// whether it was moved.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub(crate) fn look_again(&self, id: ObjectId) -> Result<bool> {
        self.open.remove(&id);
        Ok(matches!(self.place(id)?, Place::Moved(_)))
    }

    /// The pack that holds the block now, the ordinal in it, and for how many blocks from there on
    /// (at most `count`) the same holds.
    pub(crate) fn resolve(&self, location: Location, count: u32) -> Result<(Arc<Pack>, u32, u32)> {
        self.resolve_passing(location, count, &mut |_| {})
    }

    /// As [`resolve`](Self::resolve), telling what was passed.
    pub(crate) fn resolve_passing(
        &self,
        location: Location,
        count: u32,
        passed: &mut dyn FnMut(Passed),
    ) -> Result<(Arc<Pack>, u32, u32)> {
        let Traced { count, place, .. } = self.trace(location, count, true, passed)?;
        place.map(|(pack, ordinal)| (pack, ordinal, count))
    }

    /// As [`resolve_passing`](Self::resolve_passing), with the number of blocks also for those that
    /// cannot be found, which are put on the list of what was met damaged. Without `healed` the way
    /// leads past what was healed, to the damage.
    ///
    /// # Errors
    /// Those of the store, but not [`RepoError::Damaged`](crate::RepoError::Damaged), which is an answer.
    pub(crate) fn trace(
        &self,
        location: Location,
        count: u32,
        healed: bool,
        passed: &mut dyn FnMut(Passed),
    ) -> Result<Traced> {
        let repairs = if healed { Some(self.repairs()?) } else { None };
        if repairs.is_none_or(|repairs| repairs.healed.is_empty())
            && let Ok(Place::Pack(pack)) = self.place(location.pack)
        {
            let place = Ok((pack, location.ordinal));
            return Ok(Traced { count, last: location, place });
        }
        Search::new(self, &self.context, repairs).run(location, count, passed)
    }
}
