//! The packs of a repository as readers see them: opened once, followed where they moved.

use super::Forward;
use crate::cache::ByteCache;
use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::pack::Pack;
use crate::{Location, ObjectId, RepoError, Result};
use std::sync::Arc;

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
    /// The note where its chunks went.
    Moved(Arc<Forward>),
}

/// Opens packs and forwards and keeps them open. Shared by threads.
pub(crate) struct PackSet {
    context: Arc<RepoContext>,
    open: ByteCache<ObjectId, Place>,
}

impl PackSet {
    pub(crate) fn new(context: Arc<RepoContext>) -> Self {
        Self { context, open: ByteCache::new(OPEN_PACKS_BYTES) }
    }

    /// What stands under `id`.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] where there is neither a pack nor a forward.
    pub(crate) fn place(&self, id: ObjectId) -> Result<Place> {
        if let Some(place) = self.open.get(&id) {
            return Ok((*place).clone());
        }
        let (place, bytes) = match self.context.try_open_object(ObjectKind::Pack, id)? {
            Some(opened) => {
                let pack = Pack::from_object(&self.context, opened)?;
                let bytes = pack.memory_bytes();
                (Place::Pack(Arc::new(pack)), bytes)
            }
            None => {
                let forward = Forward::open(&self.context, id)?;
                let bytes = forward.memory_bytes();
                (Place::Moved(Arc::new(forward)), bytes)
            }
        };
        self.open.put(id, Arc::new(place.clone()), bytes + OPEN_PACK_OVERHEAD_BYTES);
        Ok(place)
    }

    /// The pack that holds the block now, the ordinal in it, and for how many blocks from there on
    /// (at most `count`) the same holds.
    pub(crate) fn resolve(&self, location: Location, count: u32) -> Result<(Arc<Pack>, u32, u32)> {
        self.resolve_passing(location, count, &mut |_| {})
    }

    /// As [`resolve`](Self::resolve), telling every forward that was passed.
    pub(crate) fn resolve_passing(
        &self,
        location: Location,
        count: u32,
        passed: &mut dyn FnMut(ObjectId),
    ) -> Result<(Arc<Pack>, u32, u32)> {
        let Location { mut pack, mut ordinal } = location;
        let mut count = count;
        for _ in 0..=MAX_FORWARDS {
            match self.place(pack)? {
                Place::Pack(found) => return Ok((found, ordinal, count)),
                Place::Moved(forward) => {
                    passed(pack);
                    let (next, run) = forward.find(ordinal, count).ok_or_else(|| {
                        RepoError::damaged(
                            ObjectKind::Forward.object_name(pack),
                            format!("does not say where block {ordinal} went"),
                        )
                    })?;
                    (pack, ordinal, count) = (next.pack, next.ordinal, run);
                }
            }
        }
        Err(RepoError::damaged(
            ObjectKind::Forward.object_name(location.pack),
            format!("leads through more than {MAX_FORWARDS} forwards"),
        ))
    }
}
