//! Copying restore points into another repository: everything is decrypted, verified and encrypted
//! anew, deduplicated against what is there.
//!
//! A point that was copied before is passed over; the copy records what it is a copy of. A disk of which an
//! earlier or later point was copied is built on that copy: the disk maps here tell which bytes differ
//! between the two, only these are read, and the copy shares the rest of its map. So the second copy of
//! a VM costs what changed, as its backup did. Points are copied one by one, the oldest first, each
//! with a commit of its own: interrupted anywhere, the next run goes on with the rest.

use crate::events::{Event, JobContext, Phase};
use crate::{EngineError, Result};
use jiff::Timestamp;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Instant;
use vmtide_block::{BlockError, RangeSet};
use vmtide_repo::{
    BackupOptions, BackupSession, ChangedRanges, CopyOf, DiskDraft, DiskPlan, DiskRecord, ObjectId,
    Origin, PointDraft, RepoError, Repository, RestorePoint, Retention, TrackingRecord,
};

/// A copy.
pub struct CopyJob<'a> {
    /// Where from.
    pub source: &'a Repository,
    /// Where to.
    pub target: &'a Repository,
    /// Which restore points of the source.
    pub points: Vec<RestorePoint>,
    /// How the machine is used.
    pub options: BackupOptions,
    /// Copy nothing, only say what would be copied.
    pub dry_run: bool,
}

/// What a copy did. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CopySummary {
    /// Nothing was copied: what is listed as copied would have been.
    pub dry_run: bool,
    /// The points that were copied, the oldest first.
    pub copied: Vec<CopiedPoint>,
    /// Those that were there already.
    pub present: Vec<PresentPoint>,
    /// Those that could not be copied because something is damaged.
    pub failed: Vec<UncopiedPoint>,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
}

/// One restore point that was copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CopiedPoint {
    /// Its id in the repository it was copied from.
    pub from: ObjectId,
    /// Its id where it is now; none in a dry run.
    pub point: Option<ObjectId>,
    /// Its VM.
    pub vm: String,
    /// Its moment.
    pub time: Timestamp,
    /// Until when the copy is immutable; none where it is not, or in a dry run.
    pub immutable: Option<Retention>,
    /// Its disks.
    pub disks: Vec<CopiedDisk>,
}

/// One disk of a [`CopiedPoint`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CopiedDisk {
    /// Which disk.
    pub id: String,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// The point, in the repository copied to, that it was built on; none where all was read.
    pub base: Option<ObjectId>,
    /// The bytes that were read, verified; in a dry run those that would be looked at.
    pub read_bytes: u64,
    /// The bytes that were not there yet, before compression.
    pub new_bytes: u64,
    /// What these take, compressed and sealed.
    pub stored_bytes: u64,
}

/// One restore point that was copied before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PresentPoint {
    /// Its id in the repository it was to be copied from.
    pub from: ObjectId,
    /// Its id in the other.
    pub point: ObjectId,
    /// Until when it is immutable there; none where it is not.
    pub immutable: Option<Retention>,
}

/// One restore point that was not copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UncopiedPoint {
    /// Its id in the repository it was to be copied from.
    pub from: ObjectId,
    /// Its VM.
    pub vm: String,
    /// Its moment.
    pub time: Timestamp,
    /// What is damaged.
    pub error: String,
}

/// A point that is in both repositories.
struct Pair<'a> {
    here: &'a RestorePoint,
    there: RestorePoint,
}

/// What a disk is built on.
struct DiskBase<'a> {
    there: &'a RestorePoint,
    record: &'a DiskRecord,
    changed: RangeSet,
}

/// Copies. A damaged point is passed over and told in the summary, with nothing of it committed; what
/// is not damaged is copied all the same.
///
/// # Errors
/// [`EngineError::Usage`] where both repositories are the same; those of the repositories but for
/// damage. Points copied before the error stay.
pub fn copy(job: &CopyJob<'_>, context: JobContext<'_>) -> Result<CopySummary> {
    let begun = Instant::now();
    if job.source.config().id == job.target.config().id {
        return Err(EngineError::usage(format!(
            "{} and {} are the same repository, or one is a copy of the other's files: points are \
             copied into another one, made by `vmtide init`",
            job.source.location(),
            job.target.location()
        )));
    }
    let _lease = job.source.lease(vmtide_repo::Purpose::Read)?;
    let here = job.source.points()?.points;
    let mut known = present_points(job.target)?;
    let mut pairs: Vec<Pair<'_>> = Vec::new();
    for point in &here {
        if let Some(there) = known.get(&job.source.origin_of(point)) {
            pairs.push(Pair { here: point, there: there.clone() });
        }
    }
    let mut summary = CopySummary { dry_run: job.dry_run, ..CopySummary::default() };
    let mut wanted: Vec<&RestorePoint> = job.points.iter().collect();
    wanted.sort_by_key(|point| (point.time, point.id));
    wanted.dedup_by_key(|point| point.id);
    for point in wanted {
        if let Some(there) = known.get(&job.source.origin_of(point)) {
            let (id, immutable) = (there.id, there.immutable);
            summary.present.push(PresentPoint { from: point.id, point: id, immutable });
            continue;
        }
        context.cancel.check()?;
        context.phase(Phase::Copy, format!("{} of {:.0}", point.vm, point.time));
        match copy_point(job, point, &pairs, context) {
            Ok((copied, there)) => {
                summary.copied.push(copied);
                if let Some(there) = there {
                    known.insert(job.source.origin_of(point), there.clone());
                    pairs.push(Pair { here: point, there });
                }
            }
            Err(error) if is_damage(&error) => {
                let error = error.to_string();
                let message =
                    format!("restore point {} of {} is not copied: {error}", point.id, point.vm);
                context.warn(&mut Vec::new(), message);
                let (from, vm, time) = (point.id, point.vm.clone(), point.time);
                summary.failed.push(UncopiedPoint { from, vm, time, error });
            }
            Err(error) => return Err(error),
        }
    }
    summary.duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(summary)
}

/// The points of a repository by where they were backed up first.
fn present_points(repository: &Repository) -> Result<BTreeMap<Origin, RestorePoint>> {
    let points = repository.points()?.points.into_iter();
    Ok(points.map(|point| (repository.origin_of(&point), point)).collect())
}

const fn is_damage(error: &EngineError) -> bool {
    matches!(
        error,
        EngineError::Repo(RepoError::Damaged { .. } | RepoError::Block(BlockError::Damaged { .. }))
            | EngineError::Block(BlockError::Damaged { .. })
    )
}

fn copy_point(
    job: &CopyJob<'_>,
    point: &RestorePoint,
    pairs: &[Pair<'_>],
    context: JobContext<'_>,
) -> Result<(CopiedPoint, Option<RestorePoint>)> {
    let mut copied = CopiedPoint {
        from: point.id,
        point: None,
        vm: point.vm.clone(),
        time: point.time,
        immutable: None,
        disks: Vec::with_capacity(point.disks.len()),
    };
    let mut bases = Vec::with_capacity(point.disks.len());
    for disk in &point.disks {
        let base = choose_base(job, point, disk, pairs)?;
        let look_at = base.as_ref().map_or(disk.size_bytes, |base| base.changed.total_bytes());
        context.progress.add_total(look_at);
        copied.disks.push(CopiedDisk {
            id: disk.id.clone(),
            size_bytes: disk.size_bytes,
            base: base.as_ref().map(|base| base.there.id),
            read_bytes: look_at,
            new_bytes: 0,
            stored_bytes: 0,
        });
        bases.push(base);
    }
    if job.dry_run {
        return Ok((copied, None));
    }
    let session = job.target.begin_backup(&job.options)?;
    for (base, disk) in bases.iter_mut().zip(&mut copied.disks) {
        if let Some(chosen) = &*base
            && let Some(reason) = session.why_unusable(chosen.record)?
        {
            tracing::info!(point = %chosen.there.id, %reason, "a copy is not built on");
            context.progress.add_total(disk.size_bytes.saturating_sub(disk.read_bytes));
            *base = None;
            disk.base = None;
        }
    }
    let drafts = match copy_disks(job, &session, point, &bases, context) {
        Ok(drafts) => drafts,
        Err(error) => {
            // What was stored so far need not be stored again by the next run.
            if let Err(error) = session.abandon() {
                tracing::info!(%error, "what was copied of a point was not noted");
            }
            return Err(error);
        }
    };
    for (disk, draft) in copied.disks.iter_mut().zip(&drafts) {
        let counts = draft.stored.counts();
        disk.read_bytes = counts.read_bytes;
        disk.new_bytes = counts.new_bytes;
        disk.stored_bytes = counts.stored_bytes;
    }
    let copy = CopyOf { origin: job.source.origin_of(point), time: point.time };
    let there = session.commit_copy(draft_of(point, pairs, drafts), copy)?;
    copied.point = Some(there.id);
    copied.immutable = there.immutable;
    context.observer.event(Event::PointCopied {
        from: point.id,
        point: there.id,
        vm: point.vm.clone(),
    });
    Ok((copied, Some(there)))
}

/// The point as it is to be committed: all as it was, but for what holds in one repository only.
fn draft_of(point: &RestorePoint, pairs: &[Pair<'_>], disks: Vec<DiskDraft>) -> PointDraft {
    let parent = point.parent.and_then(|id| pairs.iter().find(|pair| pair.here.id == id));
    PointDraft {
        vm: point.vm.clone(),
        level: point.level,
        parent: parent.map(|pair| pair.there.id),
        consistency: point.consistency.clone(),
        tags: point.tags.clone(),
        host: point.host.clone(),
        source: point.source.clone(),
        started: point.started,
        config: point.config.clone(),
        warnings: point.warnings.clone(),
        disks,
    }
}

fn copy_disks(
    job: &CopyJob<'_>,
    session: &BackupSession,
    point: &RestorePoint,
    bases: &[Option<DiskBase<'_>>],
    context: JobContext<'_>,
) -> Result<Vec<DiskDraft>> {
    let mut drafts = Vec::with_capacity(bases.len());
    for (disk, base) in point.disks.iter().zip(bases) {
        let device = job.source.open_disk(point, &disk.id)?;
        context.observer.event(Event::DiskStarted {
            disk: disk.id.clone(),
            bytes: base.as_ref().map_or(disk.size_bytes, |base| base.changed.total_bytes()),
            reason: None,
        });
        let plan = DiskPlan {
            id: disk.id.clone(),
            base: base.as_ref().map(|base| base.record),
            changed: match base {
                Some(base) => ChangedRanges::Only(base.changed.clone()),
                None => ChangedRanges::Everything,
            },
        };
        let stored = session.store_disk(&*device, &plan, context.progress, context.cancel)?;
        let counts = stored.counts();
        context.observer.event(Event::DiskFinished { disk: disk.id.clone(), counts });
        drafts.push(DiskDraft {
            stored,
            // The id names what tracks changes for the other repository, and would mislead here.
            tracking: TrackingRecord { id: None, ..disk.tracking.clone() },
            changed_bytes: Some(disk.counts.changed_bytes),
        });
    }
    Ok(drafts)
}

/// The copied point to build a disk on: of the same VM and with the disk in the same size, the newest
/// that is older, else the oldest that is newer; of which the maps can be read.
fn choose_base<'a>(
    job: &CopyJob<'_>,
    point: &RestorePoint,
    disk: &DiskRecord,
    pairs: &'a [Pair<'_>],
) -> Result<Option<DiskBase<'a>>> {
    let mut candidates: Vec<_> = pairs
        .iter()
        .filter(|pair| pair.here.vm == point.vm)
        .filter_map(|pair| {
            let here = pair.here.disk_record(&disk.id)?;
            let there = pair.there.disk_record(&disk.id)?;
            let fits = here.size_bytes == disk.size_bytes && there.size_bytes == disk.size_bytes;
            fits.then_some((pair, here, there))
        })
        .collect();
    candidates.sort_by_key(|(pair, ..)| {
        let is_newer = pair.here.time > point.time;
        (is_newer, pair.here.time.duration_since(point.time).abs(), pair.here.id)
    });
    for (pair, here, record) in candidates {
        if !job.target.is_sound_base(&pair.there)? {
            tracing::warn!(point = %pair.there.id, "a damaged copy is not built on");
            continue;
        }
        match job.source.changed_between(here, disk) {
            Ok(changed) => {
                return Ok(Some(DiskBase { there: &pair.there, record, changed }));
            }
            // The other point's map is damaged; where it is this one's, reading it tells.
            Err(error) if error.is_damage() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}
