//! Damage that is found while a backup runs: what a new restore point shares with it is read again
//! before the point is written, so that no point is reported as done that is known not to be whole.

use super::chunk::Chunker;
use super::heal::Healing;
use super::session::{BackupSession, ChangedRanges, StoredDisk};
use super::sink::RunSink;
use super::work::DiskJob;
use crate::care::quarantine_found;
use crate::disk::{PackSet, Suspects, lost_ranges};
use crate::envelope::ObjectKind;
use crate::map::{BaseMap, DiskMap, MapBuilder, write_layered};
use crate::{BLOCK_BYTES, ObjectId, RepoError, Result, record};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use vmtide_block::{BlockDevice, CancelToken, Progress, RangeSet};

const BLOCK: u64 = BLOCK_BYTES as u64;

impl BackupSession {
    /// Whether damage was found since this job began, or since the last call: met by this job, which
    /// puts it on record, or put there by others. The job goes by all of it from here on; disks that
    /// are stored already may share it, see [`mend_disk`](Self::mend_disk).
    ///
    /// # Errors
    /// Those of the store.
    pub fn look_for_damage(&mut self) -> Result<bool> {
        let context = Arc::clone(&self.state.context);
        let met = match quarantine_found(&context, "backup") {
            Ok(parts) => !parts.is_empty(),
            Err(error) => {
                tracing::warn!(%error, "damage that was met could not be put on record");
                true
            }
        };
        let known = &self.state.packs.repairs()?.damaged.records;
        let records = record::list(&context, ObjectKind::Damaged)?;
        let is_new = records.iter().any(|id| !known.contains(id));
        // A pack that the index names and that is not there may have been pruned: only what a map
        // leads to is missed, and that shows when the maps are looked at.
        let distrusts = !std::mem::take(&mut *self.state.doubted.lock()).is_empty();
        if !met && !is_new && !distrusts {
            return Ok(false);
        }
        let packs = PackSet::new(Arc::clone(&context));
        let healing = Healing::begin(&packs, &self.state.index)?;
        healing.take_over(&self.state.healing);
        (self.state.packs, self.state.healing) = (packs, healing);
        Ok(true)
    }

    /// Reads again from its source what a stored disk has on damaged places. Answers with these
    /// bytes, too.
    ///
    /// # Errors
    /// As [`store_disk`](Self::store_disk).
    pub fn mend_disk(
        &self,
        source: &dyn BlockDevice,
        stored: StoredDisk,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<(StoredDisk, RangeSet)> {
        self.check_usable()?;
        let outcome = self.try_mend_disk(source, stored, progress, cancel);
        self.note_outcome(&outcome);
        outcome
    }

    fn try_mend_disk(
        &self,
        source: &dyn BlockDevice,
        stored: StoredDisk,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<(StoredDisk, RangeSet)> {
        // What this job wrote must be there to be told from what is lost.
        self.fillers.lock().iter_mut().try_for_each(|filler| filler.finish_pack(&self.state))?;
        let context = &self.state.context;
        let size_bytes = stored.counts.size_bytes;
        let blocks = size_bytes.div_ceil(BLOCK);
        let base = BaseMap { segments: &stored.base_map, blocks: stored.base_blocks };
        let segments = write_layered(context, base, stored.runs, blocks)?;
        let map = DiskMap::open(context, &segments, blocks)?;
        let doubted: Vec<ObjectId> = self.state.distrusted.read().iter().copied().collect();
        let suspects = Suspects::of(context, self.state.packs.repairs()?, &doubted)?;
        let lost = lost_ranges(&map, &self.state.packs, size_bytes, Some(&suspects))?;
        let mut stored = StoredDisk {
            base_map: segments,
            base_blocks: blocks,
            runs: MapBuilder::new(Arc::clone(context)),
            ..stored
        };
        if lost.is_empty() {
            return Ok((stored, lost));
        }
        if source.size_bytes() != size_bytes {
            return Err(RepoError::Invalid(format!("disk {} changed its size", stored.id)));
        }
        let job = DiskJob {
            session: &self.state,
            source,
            chunker: Chunker::new(context.chunk_size_bytes, context.subkeys.boundary_seed()),
            sink: RunSink::new(Some(map), stored.runs),
            limiter: self.options.limit_rate.as_ref(),
            progress,
            cancel,
            failed: AtomicBool::new(false),
            read_bytes: AtomicU64::new(0),
            new_bytes: AtomicU64::new(0),
            stored_bytes: AtomicU64::new(0),
        };
        self.run(&job, &ChangedRanges::Only(lost.clone()))?;
        stored.counts.read_bytes += job.read_bytes.into_inner();
        stored.counts.new_bytes += job.new_bytes.into_inner();
        stored.counts.stored_bytes += job.stored_bytes.into_inner();
        (stored.runs, _) = job.sink.finish();
        Ok((stored, lost))
    }
}
