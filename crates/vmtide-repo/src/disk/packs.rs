//! The packs of a repository as readers see them: opened once, followed where they moved.

use super::{Forwards, Repairs};
use crate::cache::ByteCache;
use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::map::LOST;
use crate::pack::Pack;
use crate::{Location, ObjectId, RepoError, Result};
use std::sync::{Arc, OnceLock};

/// How many forwards are followed in a row (format §10). `prune` does not move chunks further than
/// this; a longer chain, or a circle, is damage.
pub(crate) const MAX_FORWARDS: usize = 16;

/// The most forwards that are tried to find one block, also where several of one pack lead nowhere:
/// hostile forwards must not make a search without end, nor exhaust the stack.
const MAX_STEPS: usize = 64;

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
    /// [`RepoError::Damaged`] where there is neither a pack nor a forward.
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
    /// Those of the store, but not [`RepoError::Damaged`], which is an answer.
    pub(crate) fn trace(
        &self,
        location: Location,
        count: u32,
        healed: bool,
        passed: &mut dyn FnMut(Passed),
    ) -> Result<Traced> {
        let (mut at, mut count) = (location, count);
        for _ in 0..=MAX_FORWARDS {
            if healed && let Some(next) = self.healed_place(at, &mut count, passed)? {
                at = next;
                continue;
            }
            let next = match self.place(at.pack) {
                Ok(Place::Pack(pack)) => {
                    return Ok(Traced { count, last: at, place: Ok((pack, at.ordinal)) });
                }
                Ok(Place::Moved(forwards)) => {
                    match self.next_hop(&forwards, at.ordinal, count, &mut { MAX_STEPS })? {
                        Some((id, next, run)) => {
                            passed(Passed::Forward(id));
                            Ok((next, run))
                        }
                        None => Err(RepoError::damaged(
                            ObjectKind::Pack.object_name(at.pack),
                            format!("no forward says where block {} went", at.ordinal),
                        )),
                    }
                }
                Err(error) if error.is_damage() => {
                    if at.pack != LOST {
                        self.context.damage.note(at.pack, None, error.to_string());
                    }
                    Err(error)
                }
                Err(error) => return Err(error),
            };
            match next {
                Ok((next, run)) => (at, count) = (next, run),
                Err(error) => return Ok(Traced { count, last: at, place: Err(error) }),
            }
        }
        let detail = format!("leads through more than {MAX_FORWARDS} forwards");
        let name = ObjectKind::Pack.object_name(location.pack);
        Ok(Traced { count, last: at, place: Err(RepoError::damaged(name, detail)) })
    }

    /// Of several forwards of one pack the first that leads to a pack: others may be about to go.
    /// Where none does, the first over the block, so that it is told what is missing.
    fn next_hop(
        &self,
        forwards: &Forwards,
        ordinal: u32,
        count: u32,
        steps_left: &mut usize,
    ) -> Result<Option<(ObjectId, Location, u32)>> {
        let mut over = forwards.over(ordinal, count).peekable();
        let Some(first) = over.next() else { return Ok(None) };
        if over.peek().is_none() {
            return Ok(Some(first));
        }
        for hop in std::iter::once(first).chain(over) {
            if self.leads_on(hop.1, steps_left)? {
                return Ok(Some(hop));
            }
        }
        Ok(Some(first))
    }

    /// Whether a place leads to a pack.
    fn leads_on(&self, at: Location, steps_left: &mut usize) -> Result<bool> {
        let Some(left) = steps_left.checked_sub(1) else { return Ok(false) };
        *steps_left = left;
        let forwards = match self.place(at.pack) {
            Ok(Place::Pack(_)) => return Ok(true),
            Ok(Place::Moved(forwards)) => forwards,
            Err(error) if error.is_damage() => return Ok(false),
            Err(error) => return Err(error),
        };
        for (_, next, _) in forwards.over(at.ordinal, 1) {
            if self.leads_on(next, steps_left)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Where the block was stored once more after it was damaged, if it was; makes `count` no more
    /// than what went there together. Of several places one is taken that is not damaged itself.
    fn healed_place(
        &self,
        at: Location,
        count: &mut u32,
        passed: &mut dyn FnMut(Passed),
    ) -> Result<Option<Location>> {
        let repairs = self.repairs()?;
        if repairs.healed.is_empty() {
            return Ok(None);
        }
        *count = repairs.healed.same_for(at, *count);
        let mut damaged = None;
        for run in repairs.healed.over(at) {
            let ordinal = run.target.ordinal + (at.ordinal - run.ordinal);
            let target = Location { pack: run.target.pack, ordinal };
            match self.place(target.pack) {
                Ok(_) if repairs.damaged.covers(target) => damaged = Some((run.record, target)),
                Ok(_) => {
                    passed(Passed::Healed(run.record));
                    return Ok(Some(target));
                }
                // It came to nothing, or is gone again: then it heals nothing.
                Err(error) if error.is_damage() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(damaged.map(|(record, target)| {
            passed(Passed::Healed(record));
            target
        }))
    }
}
