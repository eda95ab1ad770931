//! What the workers of one job share: what it knows of the repository, and what it has stored itself.

use super::fill::PackFiller;
use super::fresh::{FreshChunks, MAX_PENDING};
use super::heal::Healing;
use crate::condemned::Condemned;
use crate::context::RepoContext;
use crate::disk::{PackSet, Place};
use crate::index::ChunkIndex;
use crate::pack::{FinishedPack, Pack};
use crate::{BLOCK_BYTES, ChunkId, Location, ObjectId, RepoError, Result};
use parking_lot::{Mutex, RwLock};
use std::collections::HashSet;
use std::sync::Arc;

/// What became of a chunk.
pub(super) struct StoredChunk {
    /// Where it is.
    pub place: Location,
    /// Its length where it was not known, else 0.
    pub new_bytes: u64,
    /// The bytes that went into packs for it and for chunks that waited with it.
    pub stored_bytes: u64,
}

impl StoredChunk {
    const fn known(place: Location) -> Self {
        Self { place, new_bytes: 0, stored_bytes: 0 }
    }
}

/// What all workers of a job share.
pub(super) struct SessionState {
    pub context: Arc<RepoContext>,
    pub index: ChunkIndex,
    pub fresh: FreshChunks,
    pub pack_size_bytes: u64,
    /// Chunks of finished packs that the index does not know yet.
    pending: Mutex<Vec<(ChunkId, Location)>>,
    /// The packs that this job wrote; only noted where the point becomes immutable.
    pub written: Mutex<HashSet<ObjectId>>,
    /// Packs of earlier jobs that this one refers to beside those of its bases; only noted where the
    /// point becomes immutable.
    pub reused: Mutex<HashSet<ObjectId>>,
    /// Packs of earlier jobs, to look at before they are referred to.
    pub packs: PackSet,
    /// What this job heals.
    pub healing: Healing,
    /// Those that cannot be relied on.
    pub distrusted: RwLock<HashSet<ObjectId>>,
    /// Those of them that restore points were not yet held against.
    pub doubted: Mutex<Vec<ObjectId>>,
    /// What is about to be removed, as it was after the lease of this job could be seen: nothing of
    /// it is referred to. What is condemned later waits for the lease.
    pub condemned: Condemned,
}

impl SessionState {
    /// What a job knows when it begins: `condemned`, read after its lease could be seen, and all else after that.
    pub(super) fn begin(
        context: Arc<RepoContext>,
        condemned: Condemned,
        pack_size_bytes: u64,
    ) -> Result<Self> {
        let index = ChunkIndex::open(&context)?;
        let packs = PackSet::new(Arc::clone(&context));
        Ok(Self {
            healing: Healing::begin(&packs, &index)?,
            index,
            fresh: FreshChunks::new(),
            pack_size_bytes,
            pending: Mutex::default(),
            written: Mutex::default(),
            reused: Mutex::default(),
            packs,
            distrusted: RwLock::default(),
            doubted: Mutex::default(),
            condemned,
            context,
        })
    }

    /// Takes the chunks of a durable pack, and writes those that wait as an index segment when they
    /// are many.
    pub(super) fn add_finished_pack(&self, pack: FinishedPack) -> Result<()> {
        if self.context.retention.is_some() {
            self.written.lock().insert(pack.id);
        }
        let full = {
            let mut pending = self.pending.lock();
            let mut ordinal = 0;
            for chunk in &pack.chunks {
                pending.push((chunk.id, Location { pack: pack.id, ordinal }));
                ordinal += u32::from(chunk.blocks);
            }
            (pending.len() >= MAX_PENDING).then(|| std::mem::take(&mut *pending))
        };
        full.map_or(Ok(()), |entries| self.write_index(&entries))
    }

    /// Stores a chunk that is not known, and answers with its place in any case.
    pub(super) fn store_chunk(&self, chunk: &[u8], filler: &mut PackFiller) -> Result<StoredChunk> {
        let id = self.context.subkeys.chunk_id(chunk);
        let stored = self.find_or_store(&id, chunk, filler)?;
        self.healing.met(&id, chunk.len(), stored.place);
        Ok(stored)
    }

    fn find_or_store(
        &self,
        id: &ChunkId,
        chunk: &[u8],
        filler: &mut PackFiller,
    ) -> Result<StoredChunk> {
        // What this job has stored itself comes first: it is in memory.
        if let Some(known) = self.fresh.find(id) {
            return Ok(StoredChunk::known(known));
        }
        if let Some(known) = self.known(id, chunk.len())? {
            return Ok(StoredChunk::known(known));
        }
        let place = filler.next_location(self)?;
        if let Some(known) = self.fresh.find_or_reserve(id, || Ok::<_, RepoError>(place))? {
            return Ok(StoredChunk::known(known));
        }
        let stored_bytes = filler.push(self, *id, chunk)?;
        Ok(StoredChunk { place, new_bytes: chunk.len() as u64, stored_bytes })
    }

    /// Where the repository has a chunk already.
    pub(super) fn known(&self, id: &ChunkId, length_bytes: usize) -> Result<Option<Location>> {
        let mut found = None;
        self.index.lookup_each(&id.prefix(), &mut |place| {
            found = self.sound(place, id, length_bytes)?;
            Ok(found.is_some())
        })?;
        if let (Some(_), Some(place)) = (self.context.retention, found) {
            self.reused.lock().insert(place.pack);
        }
        Ok(found)
    }

    /// The place where the index says a chunk is, or where it went, if it can be relied on. The index
    /// is only a hint: the pack it names must be there, with a sound directory that has this very
    /// chunk in that place, and nothing of it may be on record as damaged. Otherwise a lost pack
    /// would go on being referred to by every new restore point; this way the next backup heals it.
    pub(super) fn sound(
        &self,
        place: Location,
        id: &ChunkId,
        length_bytes: usize,
    ) -> Result<Option<Location>> {
        if self.condemned.has_pack(place.pack) || self.distrusted.read().contains(&place.pack) {
            return Ok(None);
        }
        #[cfg(feature = "simulation")]
        if crate::simulation::is_weak(crate::simulation::Weakness::IndexTrusted) {
            return Ok(Some(place));
        }
        match self.packs.place(place.pack) {
            Ok(Place::Pack(pack)) => {
                let holds = |pack: &Pack, ordinal| {
                    pack.chunk_of(ordinal).is_ok_and(|number| {
                        let (first, chunk) = pack.chunk(number);
                        first == ordinal
                            && chunk.id == *id
                            && usize::from(chunk.blocks) * BLOCK_BYTES == length_bytes
                    })
                };
                if !holds(&pack, place.ordinal) {
                    return Ok(None);
                }
                let repairs = self.packs.repairs()?;
                if repairs.is_empty() {
                    return Ok(Some(place));
                }
                // What readers of this place would be led to, and nothing else.
                let blocks = u32::try_from(length_bytes / BLOCK_BYTES).unwrap_or(u32::MAX);
                let traced = self.packs.trace(place, blocks, true, &mut |_| {})?;
                Ok(traced.place.ok().and_then(|(pack, ordinal)| {
                    let healed = Location { pack: pack.id(), ordinal };
                    let is_it = traced.count == blocks
                        && !repairs.damaged.covers(healed)
                        && !self.condemned.has_pack(healed.pack)
                        && holds(&pack, ordinal);
                    is_it.then_some(healed)
                }))
            }
            Ok(Place::Moved(_)) => Ok(None),
            Err(error @ (RepoError::Damaged { .. } | RepoError::Unsupported { .. })) => {
                if self.distrusted.write().insert(place.pack) {
                    self.doubted.lock().push(place.pack);
                    tracing::warn!(%error, "a pack cannot be relied on; its chunks are stored again");
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes the chunks of finished packs known through the index.
    pub(super) fn note_pending(&self) -> Result<()> {
        let pending = std::mem::take(&mut *self.pending.lock());
        self.write_index(&pending)
    }

    fn write_index(&self, entries: &[(ChunkId, Location)]) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let entries_by_prefix = entries.iter().map(|(id, place)| (id.prefix(), *place)).collect();
        // Known through the index from here on, before the memory of it goes.
        self.index.add(entries_by_prefix)?;
        self.fresh.release(entries.iter().map(|(id, _)| id));
        Ok(())
    }
}
