//! One backup job: its disks, and the commit that makes them a restore point.

use super::base::Bases;
use super::chunk::Chunker;
use super::fill::PackFiller;
use super::heal::{HealthyDisk, heal_disk};
use super::options::BackupOptions;
use super::plan::{Piece, plan};
use super::sink::RunSink;
use super::state::SessionState;
use super::work::DiskJob;
use crate::condemned::Condemned;
use crate::context::RepoContext;
use crate::copy::CopyOf;
use crate::envelope::ObjectKind;
use crate::immutable;
use crate::lease::{self, Lease, Purpose};
use crate::map::{BaseMap, DiskMap, MapBuilder, MapRun, Target, write_layered};
use crate::point::{self, DiskCounts, DiskRecord, Level, RestorePoint, TrackingRecord};
use crate::{BLOCK_BYTES, ObjectId, RepoError, Result};
use jiff::Timestamp;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use vmtide_block::{BlockDevice, BlockError, CancelToken, Progress, RangeSet};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Which part of a disk to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangedRanges {
    /// All of it. With a base, what turns out to be equal is shared with it.
    Everything,
    /// Only this; the rest is taken from the base without looking.
    Only(RangeSet),
}

/// How to store one disk.
#[derive(Clone, Debug)]
pub struct DiskPlan<'a> {
    /// Which disk of the VM.
    pub id: String,
    /// The same disk in an earlier restore point of this repository.
    pub base: Option<&'a DiskRecord>,
    /// What to look at. [`ChangedRanges::Only`] needs a base of the same size.
    pub changed: ChangedRanges,
}

/// A disk that is stored, waiting for the commit.
pub struct StoredDisk {
    pub(super) id: String,
    pub(super) base_map: Vec<ObjectId>,
    pub(super) base_blocks: u64,
    pub(super) runs: MapBuilder,
    pub(super) counts: DiskCounts,
}

impl StoredDisk {
    /// Which disk of the VM.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What was moved.
    pub const fn counts(&self) -> DiskCounts {
        self.counts
    }
}

/// A disk of a restore point to be committed.
pub struct DiskDraft {
    /// The stored disk.
    pub stored: StoredDisk,
    /// How change tracking took part.
    pub tracking: TrackingRecord,
    /// What changed, in bytes, where the caller knows better than the comparison with the base.
    pub changed_bytes: Option<u64>,
}

/// A restore point to be committed; see [`RestorePoint`] for the fields.
#[allow(missing_docs, reason = "the fields are those of RestorePoint")]
pub struct PointDraft {
    pub vm: String,
    pub level: Level,
    pub parent: Option<ObjectId>,
    pub consistency: String,
    pub tags: BTreeMap<String, String>,
    pub host: String,
    pub source: String,
    pub started: Timestamp,
    pub config: serde_json::Value,
    pub warnings: Vec<String>,
    pub disks: Vec<DiskDraft>,
}

/// One backup job on a repository. Stores disks, one after the other or from several threads, then
/// commits. Dropped without a commit it leaves garbage for `prune`, and nothing else.
pub struct BackupSession {
    pub(super) state: SessionState,
    pub(super) options: BackupOptions,
    pub(super) fillers: Mutex<Vec<PackFiller>>,
    /// A disk failed: places may have been promised that were never filled.
    failed: AtomicBool,
    bases: Bases,
    lease: Lease,
}

impl BackupSession {
    /// Begins a job.
    pub(crate) fn begin(context: Arc<RepoContext>, options: &BackupOptions) -> Result<Self> {
        // In this order: what is condemned after the lease can be seen waits for it, what was
        // before is known, and everything that is looked at later is looked at after both.
        let lease = Lease::begin(&context, Purpose::Backup)?;
        let condemned = Condemned::read(&context)?;
        Ok(Self {
            state: SessionState::begin(context, condemned, options.pack_size_bytes)?,
            options: options.clone(),
            fillers: Mutex::default(),
            failed: AtomicBool::new(false),
            bases: Bases::default(),
            lease,
        })
    }

    /// Why a disk of an earlier restore point cannot be built on, because a prune is at work or the
    /// point was forgotten; none where it can. Such a disk is to be stored without a base.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] where its map cannot be read; those of the store.
    pub fn why_unusable(&self, base: &DiskRecord) -> Result<Option<String>> {
        let reason = self.bases.why_unusable(&self.state.context, &self.state.condemned, base);
        reason.map_err(|error| self.lease.explain(error))
    }

    /// Stores one disk. `progress` counts bytes of the disk that are dealt with and bytes read.
    ///
    /// # Errors
    /// Those of the source and of the store; [`BlockError::Cancelled`]; [`RepoError::Busy`] for a base
    /// that [cannot be built on](Self::why_unusable). The session can then only be dropped.
    pub fn store_disk(
        &self,
        source: &dyn BlockDevice,
        plan: &DiskPlan<'_>,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<StoredDisk> {
        self.check_usable()?;
        let stored = self.try_store_disk(source, plan, progress, cancel);
        self.note_outcome(&stored);
        stored.map_err(|error| self.lease.explain(error))
    }

    /// After a failure places may have been promised that were never filled.
    pub(super) fn note_outcome<T>(&self, outcome: &Result<T>) {
        if outcome.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
    }

    /// What its workers share.
    pub(super) const fn state(&self) -> &SessionState {
        &self.state
    }

    /// Makes what was healed durable and known, without a restore point. Answers with the bytes.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn finish_healing(self, by: &str) -> Result<u64> {
        self.check_usable()?;
        for mut filler in self.fillers.into_inner() {
            filler.finish_pack(&self.state)?;
        }
        self.state.note_pending()?;
        let bytes = self.state.healing.healed_bytes();
        self.state.healing.write(&self.state, by)?;
        Ok(bytes)
    }

    /// The bytes of earlier restore points that were damaged and are whole again once this job is
    /// committed.
    pub fn healed_bytes(&self) -> u64 {
        self.state.healing.healed_bytes()
    }

    pub(super) fn check_usable(&self) -> Result<()> {
        if self.failed.load(Ordering::Relaxed) {
            return Err(RepoError::Invalid("a disk of this backup failed; begin another".into()));
        }
        Ok(())
    }

    fn try_store_disk(
        &self,
        source: &dyn BlockDevice,
        plan: &DiskPlan<'_>,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<StoredDisk> {
        let size_bytes = source.size_bytes();
        check_plan(plan, size_bytes)?;
        let context = &self.state.context;
        if let Some(base) = plan.base
            && let Some(reason) = self.why_unusable(base)?
        {
            return Err(RepoError::Busy {
                detail: format!("disk {} cannot build on its base: {reason}", plan.id),
            });
        }
        let base_blocks = plan.base.map_or(0, |base| base.size_bytes.div_ceil(BLOCK));
        let base = match plan.base {
            Some(base) => Some(
                DiskMap::open(context, &base.map, base_blocks)?.resized(size_bytes.div_ceil(BLOCK)),
            ),
            None => None,
        };
        let damaged = match (&base, plan.base) {
            (Some(map), Some(record)) if !self.state.healing.is_idle() => {
                let mut lost = RangeSet::new();
                self.with_filler(|filler| {
                    let bytes = record.size_bytes;
                    let healthy = HealthyDisk::source(source);
                    lost = heal_disk(&self.state, &healthy, map, bytes, filler, cancel)?;
                    Ok(())
                })?;
                Some(lost)
            }
            _ => None,
        };
        let job = DiskJob {
            session: &self.state,
            source,
            chunker: Chunker::new(context.chunk_size_bytes, context.subkeys.boundary_seed()),
            sink: RunSink::new(base, MapBuilder::new(Arc::clone(context))),
            limiter: self.options.limit_rate.as_ref(),
            progress,
            cancel,
            failed: AtomicBool::new(false),
            read_bytes: AtomicU64::new(0),
            new_bytes: AtomicU64::new(0),
            stored_bytes: AtomicU64::new(0),
        };
        match (&plan.changed, &damaged) {
            (ChangedRanges::Only(ranges), Some(damaged)) if !damaged.is_empty() => {
                self.run(&job, &ChangedRanges::Only(ranges.union(damaged)))?;
            }
            (changed, _) => self.run(&job, changed)?,
        }
        let (runs, changed_blocks) = job.sink.finish();
        let changed_bytes = match &plan.changed {
            ChangedRanges::Everything => (changed_blocks * BLOCK).min(size_bytes),
            ChangedRanges::Only(ranges) => ranges.clamp(size_bytes).total_bytes(),
        };
        Ok(StoredDisk {
            id: plan.id.clone(),
            base_map: plan.base.map(|base| base.map.clone()).unwrap_or_default(),
            base_blocks,
            runs,
            counts: DiskCounts {
                size_bytes,
                changed_bytes,
                read_bytes: job.read_bytes.into_inner(),
                new_bytes: job.new_bytes.into_inner(),
                stored_bytes: job.stored_bytes.into_inner(),
            },
        })
    }

    /// Runs planner and workers to the end or the first error.
    pub(super) fn run(&self, job: &DiskJob<'_>, changed: &ChangedRanges) -> Result<()> {
        let expected = match changed {
            ChangedRanges::Everything => job.source.size_bytes(),
            ChangedRanges::Only(ranges) => ranges.total_bytes(),
        };
        // A small change does not need every worker, nor a small pack from each.
        let useful = usize::try_from(expected >> 23).unwrap_or(usize::MAX).saturating_add(1);
        let workers = self.options.workers.clamp(1, useful);
        if workers == 1 {
            return self.run_alone(job, changed);
        }
        let (sender, receiver) = sync_channel(workers * 2);
        // Owned by the workers alone: when the last one is gone, sending fails instead of waiting.
        let pieces = Arc::new(Mutex::new(receiver));
        std::thread::scope(|scope| {
            let handles: Vec<_> = (0..workers)
                .map(|_| {
                    let pieces = Arc::clone(&pieces);
                    scope.spawn(move || {
                        let outcome = self.with_filler(|filler| job.work(&pieces, filler));
                        if outcome.is_err() {
                            job.failed.store(true, Ordering::Relaxed);
                        }
                        outcome
                    })
                })
                .collect();
            drop(pieces);
            let mut result = feed(job, changed, sender);
            if result.is_err() {
                job.failed.store(true, Ordering::Relaxed);
            }
            for handle in handles {
                let outcome = handle.join().unwrap_or_else(|_| {
                    Err(RepoError::Invalid("a backup worker ended abnormally".into()))
                });
                // Others only stop because one failed: its error is the one to show.
                let is_echo =
                    matches!(result, Ok(()) | Err(RepoError::Block(BlockError::Cancelled)));
                if is_echo && outcome.is_err() {
                    result = outcome;
                }
            }
            result
        })
    }

    /// As [`run`](Self::run), on this thread: not worth another.
    fn run_alone(&self, job: &DiskJob<'_>, changed: &ChangedRanges) -> Result<()> {
        self.with_filler(|filler| {
            let mut buffer = Vec::new();
            plan(job.source, changed, job.cancel, &mut |piece| {
                job.check()?;
                match piece {
                    Piece::Zero { first_block, count } => record_zeros(job, first_block, count),
                    Piece::Data { first_block, count } => {
                        job.store_stretch(first_block, count, filler, &mut buffer)
                    }
                }
            })?;
            job.finish(filler)
        })
    }

    pub(super) fn with_filler(
        &self,
        work: impl FnOnce(&mut PackFiller) -> Result<()>,
    ) -> Result<()> {
        let waiting = self.fillers.lock().pop();
        let mut filler = match waiting {
            Some(filler) => filler,
            None => PackFiller::new(self.options.compression_level, self.options.frame_bytes)?,
        };
        let outcome = work(&mut filler);
        self.fillers.lock().push(filler);
        outcome
    }

    /// Makes all that was stored durable and then visible, as one restore point.
    ///
    /// # Errors
    /// Those of the store; [`RepoError::Busy`] where this job stood still for so long that it was
    /// taken for dead. There is no restore point then.
    pub fn commit(self, draft: PointDraft) -> Result<RestorePoint> {
        self.commit_as(draft, None).map_err(|error| self.lease.explain(error))
    }

    /// As [`commit`](Self::commit), of a point that is a copy: of the same moment as what it is a
    /// copy of.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub fn commit_copy(self, draft: PointDraft, copy: CopyOf) -> Result<RestorePoint> {
        self.commit_as(draft, Some(copy)).map_err(|error| self.lease.explain(error))
    }

    /// Ends a job without a restore point. The packs it finished are noted in the index, so that the next
    /// job finds what this one stored, if that comes before [`prune`](crate::Repository::prune).
    ///
    /// # Errors
    /// Those of the store.
    pub fn abandon(self) -> Result<()> {
        self.state.note_pending()
    }

    fn commit_as(&self, draft: PointDraft, copy: Option<CopyOf>) -> Result<RestorePoint> {
        self.check_usable()?;
        let mut fillers = std::mem::take(&mut *self.fillers.lock()).into_iter();
        let finished = fillers.try_for_each(|mut filler| filler.finish_pack(&self.state));
        // Also where the last pack failed: the next try finds what the others hold.
        let noted = self.state.note_pending();
        finished.and(noted)?;
        self.state.healing.write(&self.state, "backup")?;
        if let Err(error) = self.state.index.compact() {
            tracing::warn!(%error, "the index was not compacted; the next backup tries again");
        }
        let context = &self.state.context;
        let base_maps: Vec<_> =
            draft.disks.iter().map(|disk| disk.stored.base_map.clone()).collect();
        let disks = draft
            .disks
            .into_iter()
            .map(|disk| record_disk(context, disk))
            .collect::<Result<Vec<_>>>()?;
        let point = RestorePoint {
            id: ObjectId::random()?,
            vm: draft.vm,
            time: copy.map_or_else(|| time_after(context, draft.parent), |copy| copy.time),
            started: draft.started,
            level: draft.level,
            parent: draft.parent,
            consistency: draft.consistency,
            tags: draft.tags,
            host: draft.host,
            source: draft.source,
            config: draft.config,
            warnings: draft.warnings,
            disks,
            program: crate::PROGRAM.into(),
            origin: copy.map(|copy| copy.origin),
            lease: self.lease.id(),
            immutable: context.retention,
        };
        if let Some(retention) = context.retention {
            let job = immutable::Job {
                context,
                packs: &self.state.packs,
                written: &self.state.written.lock(),
                reused: &self.state.reused.lock(),
            };
            immutable::protect(&job, &point, &base_maps, retention)?;
        }
        publish(context, &self.lease, &point)?;
        Ok(point)
    }
}

/// Writes the restore point, and makes sure that it counts and will for ever, or that it never will.
fn publish(context: &Arc<RepoContext>, lease: &Lease, point: &RestorePoint) -> Result<()> {
    let Some(id) = lease.id() else { return point::write(context, point) };
    // Until all is settled nobody may conclude from the end of the lease that it is.
    lease.set_uncertain(true);
    if let Err(error) = point::write(context, point) {
        // It may be there all the same, or come to be.
        if lease::void(context, id).is_ok() {
            lease.set_uncertain(false);
        }
        return Err(error);
    }
    #[cfg(feature = "simulation")]
    if crate::simulation::is_weak(crate::simulation::Weakness::CommitUnchecked) {
        lease.set_uncertain(false);
        return Ok(());
    }
    let confirmed = lease::confirm(context, id, point.id);
    if confirmed.is_ok() || lease::void(context, id).is_ok() {
        lease.set_uncertain(false);
    }
    let counts = confirmed?;
    if counts {
        lease.add_point(point.id);
        return Ok(());
    }
    let name = ObjectKind::Point.object_name(point.id);
    if let Err(error) = context.store.remove(&name) {
        tracing::debug!(%error, "a restore point that does not count is left for prune");
    }
    Err(lease::stood_still())
}

/// Now, or a moment after the parent where the clock went back: newer points have later times.
fn time_after(context: &RepoContext, parent: Option<ObjectId>) -> Timestamp {
    let now = Timestamp::now();
    let held = |id| crate::hold::record_of(context, id).ok().flatten();
    let parent = parent.and_then(|id| point::read(context, id).ok().or_else(|| held(id)));
    match parent
        .and_then(|parent| parent.time.checked_add(jiff::SignedDuration::from_millis(1)).ok())
    {
        Some(earliest) if earliest > now => {
            tracing::warn!(%now, %earliest, "the clock stands before the last restore point");
            earliest
        }
        _ => now,
    }
}

fn check_plan(plan: &DiskPlan<'_>, size_bytes: u64) -> Result<()> {
    match (&plan.changed, plan.base) {
        (ChangedRanges::Only(_), None) => Err(RepoError::Invalid(format!(
            "disk {}: changed ranges say nothing without an earlier restore point",
            plan.id
        ))),
        (ChangedRanges::Only(_), Some(base)) if base.size_bytes != size_bytes => {
            Err(RepoError::Invalid(format!(
                "disk {}: changed ranges are for a disk of {} bytes, not {size_bytes}",
                plan.id, base.size_bytes
            )))
        }
        _ => Ok(()),
    }
}

/// The planner: hands zero runs to the sink and stretches of data to the workers.
fn feed(job: &DiskJob<'_>, changed: &ChangedRanges, sender: SyncSender<Piece>) -> Result<()> {
    plan(job.source, changed, job.cancel, &mut |piece| {
        job.check()?;
        match piece {
            Piece::Zero { first_block, count } => record_zeros(job, first_block, count)?,
            // All workers are gone only after one failed, and that one tells why.
            data => sender.send(data).map_err(|_| BlockError::Cancelled)?,
        }
        Ok(())
    })
}

fn record_zeros(job: &DiskJob<'_>, first_block: u64, count: u64) -> Result<()> {
    job.sink.record(MapRun { first_block, count, target: Target::Zero })?;
    let left = job.source.size_bytes().saturating_sub(first_block * BLOCK);
    job.progress.add_done((count * BLOCK).min(left));
    Ok(())
}

fn record_disk(context: &RepoContext, disk: DiskDraft) -> Result<DiskRecord> {
    let mut counts = disk.stored.counts;
    counts.changed_bytes = disk.changed_bytes.unwrap_or(counts.changed_bytes);
    let blocks = counts.size_bytes.div_ceil(BLOCK);
    let base = BaseMap { segments: &disk.stored.base_map, blocks: disk.stored.base_blocks };
    Ok(DiskRecord {
        id: disk.stored.id,
        size_bytes: counts.size_bytes,
        map: write_layered(context, base, disk.stored.runs, blocks)?,
        counts,
        tracking: disk.tracking,
    })
}
