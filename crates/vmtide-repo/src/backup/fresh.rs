//! The chunks this job has stored and the repository's index does not hold yet.
//!
//! Asked and filled by all workers for every chunk, so it is sharded. Its memory is bounded: when
//! the chunks of finished packs pass [`MAX_PENDING`], they are written as an index segment and
//! leave (see the session).

use crate::{ChunkId, Location};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// How many chunks of finished packs wait in memory for their index segment: 512 Ki, which is 32
/// GiB of new data at 64 KiB chunks and some 50 MiB of memory. Larger values pass the memory bound of a
/// job; much smaller ones litter the index with small segments.
pub(super) const MAX_PENDING: usize = 512 << 10;

const SHARDS: usize = 64;

/// Chunk id prefix to place, for chunks stored by this job.
pub(super) struct FreshChunks {
    shards: Vec<Mutex<HashMap<[u8; 16], Location>>>,
}

impl FreshChunks {
    pub(super) fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    fn shard(&self, id: &ChunkId) -> &Mutex<HashMap<[u8; 16], Location>> {
        // The ids are hashes: any byte spreads them evenly.
        &self.shards[usize::from(id.0[16]) % SHARDS]
    }

    /// Where this job has stored the chunk; otherwise notes that the caller stores it at the place
    /// that `place` makes, and answers `None`. Of several workers that meet the same new chunk
    /// one stores it. If that worker fails, the whole job does.
    pub(super) fn find_or_reserve<E>(
        &self,
        id: &ChunkId,
        place: impl FnOnce() -> Result<Location, E>,
    ) -> Result<Option<Location>, E> {
        match self.shard(id).lock().entry(id.prefix()) {
            Entry::Occupied(known) => Ok(Some(*known.get())),
            Entry::Vacant(slot) => {
                slot.insert(place()?);
                Ok(None)
            }
        }
    }

    /// Where this job has stored the chunk.
    pub(super) fn find(&self, id: &ChunkId) -> Option<Location> {
        self.shard(id).lock().get(&id.prefix()).copied()
    }

    /// Forgets chunks that the index holds now.
    pub(super) fn release<'a>(&self, ids: impl Iterator<Item = &'a ChunkId>) {
        for id in ids {
            self.shard(id).lock().remove(&id.prefix());
        }
    }
}
