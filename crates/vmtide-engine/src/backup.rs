//! The backup of one VM, the straight line of the design:
//!
//! freeze the VM → learn what changed → store its disks → seal the moment → commit the restore point → release.
//!
//! What must hold, and where it is kept:
//! - The base is chosen after the job's lease can be seen, so that no `prune` takes it away.
//! - Exactly one of [`FrozenVm::commit`] and [`FrozenVm::abort`] is called, whatever happens
//!   between ([`backup`]).
//! - The old change tracking is released only after the restore point is committed: that is what
//!   `FrozenVm::commit` does, and it is called last.
//! - Doubt about changes means reading the disk in full, with the reason recorded
//!   ([`crate::changes`]).
//! - Less consistency than asked for is an error, unless allowed; then it is a warning.

use crate::base::{self, BaseChoice};
use crate::changes::{self, DiskChanges};
use crate::damage::record_damage;
use crate::events::{Event, JobContext, Phase};
use crate::identity::VmLine;
use crate::{EngineError, Result, exclusions, sample};
use jiff::Timestamp;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Instant;
use vmtide_block::{BlockDevice, BlockError, ByteRange, CancelToken, RangeSet};
use vmtide_hypervisor::{
    Consistency, DiskId, FreezeRequest, FrozenDisk, FrozenVm, FullReason, Hypervisor,
    HypervisorError, JobId,
};
use vmtide_repo::{
    BLOCK_BYTES, BackupOptions, BackupSession, ChangedRanges, DiskCounts, DiskDraft, DiskPlan,
    Level, ObjectId, PointDraft, RepoError, Repository, RestorePoint, TrackingRecord,
};

/// The level that the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LevelChoice {
    /// Incremental where there is an earlier restore point, otherwise full.
    #[default]
    Auto,
    /// Read everything.
    Full,
    /// Since the previous restore point.
    Incremental,
    /// Since the last full one.
    Differential,
}

/// The backup of one VM.
pub struct BackupJob<'a> {
    /// Where to.
    pub repository: &'a Repository,
    /// Where from.
    pub hypervisor: &'a dyn Hypervisor,
    /// The VM, as the hypervisor knows it.
    pub vm: String,
    /// The VM's name in the repository; none takes the hypervisor's.
    pub name: Option<String>,
    /// The source as the user wrote it, without secrets; recorded.
    pub source: String,
    /// The level.
    pub level: LevelChoice,
    /// Whether the source's changed ranges come from outside, counted from "the previous restore
    /// point" whichever that is, and not from change tracking that knows its moment.
    pub outside_changes: bool,
    /// The consistency; none means the best that can be had, whatever that is.
    pub consistency: Option<Consistency>,
    /// Whether less than [`consistency`](Self::consistency) is acceptable, with a warning.
    pub allow_downgrade: bool,
    /// Tags to record.
    pub tags: BTreeMap<String, String>,
    /// Disks to leave out.
    pub exclude: Vec<DiskId>,
    /// Whether this is one VM of a selection. Where it does not have a disk of `exclude`, another may: that is no
    /// warning then, and [`BackupSummary::unknown_exclusions`] tells it.
    pub is_one_of_many: bool,
    /// How many blocks of each disk that are said to be unchanged are compared with the stored copy;
    /// one that differs means reading the disk in full.
    pub check_unchanged: u32,
    /// How to store.
    pub options: BackupOptions,
}

/// What a backup did. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BackupSummary {
    /// The new restore point.
    pub point: ObjectId,
    /// The VM's name in the repository.
    pub vm: String,
    /// The level reached.
    pub level: Level,
    /// The consistency reached.
    pub consistency: String,
    /// The disks.
    pub disks: Vec<DiskSummary>,
    /// The bytes of earlier restore points that were damaged and are whole again.
    #[serde(skip_serializing_if = "is_zero")]
    pub healed_bytes: u64,
    /// The disks to leave out that the VM does not have.
    #[serde(skip)]
    pub unknown_exclusions: Vec<DiskId>,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// What the user should know, one line each.
    pub warnings: Vec<String>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "what serde asks for")]
const fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

/// One disk of a [`BackupSummary`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DiskSummary {
    /// The disk.
    pub id: String,
    /// What was moved.
    #[serde(flatten)]
    pub counts: DiskCounts,
    /// Whether change tracking was used, and why not.
    pub tracking: TrackingRecord,
}

/// Backs the VM up.
///
/// # Errors
/// Nothing is visible in the repository then, and the VM is released with its tracking as before.
/// Only what could not be undone on the platform is left, and journalled for the next run.
pub fn backup(job: &BackupJob<'_>, context: JobContext<'_>) -> Result<BackupSummary> {
    // From here on nobody removes what is found in the repository.
    let session = job.repository.begin_backup(&job.options)?;
    let begun = Instant::now();
    let started = Timestamp::now();
    let mut warnings = Vec::new();
    let identity = VmLine::of(job.hypervisor, &job.vm, job.name.as_deref())?;
    let name = identity.name.clone();
    check_name(&name)?;
    let outside = job.outside_changes.then_some(job.source.as_str());
    let mut base = base::choose(job.repository, &session, &identity, job.level, outside)?;
    for note in &base.notes {
        context.warn(&mut warnings, note.clone());
    }
    let unknown_exclusions = exclusions::find_unknown(job, context, &mut warnings)?;

    context.phase(Phase::Freeze, &name);
    let request = freeze_request(job, &identity.lineage_name(), &base, context);
    let mut frozen = job.hypervisor.freeze(&request)?;
    base.moved = moved_disks(frozen.as_ref());
    let stored = check_consistency(job, frozen.as_ref(), context, &mut warnings).and_then(|()| {
        let stored = store_and_commit(
            job,
            session,
            &name,
            started,
            &base,
            frozen.as_mut(),
            context,
            &mut warnings,
        );
        match stored {
            // A map that cannot be read on is no base, whatever the restore point looked like.
            Err(EngineError::Repo(RepoError::Damaged { object, detail }))
                if base.newest.is_some() && object.starts_with("maps/") =>
            {
                let base = base.without_damaged(&object);
                context.warn(
                    &mut warnings,
                    format!(
                        "full backup: the previous restore point is damaged ({object}: {detail})"
                    ),
                );
                let frozen = frozen.as_mut();
                let session = job.repository.begin_backup(&job.options)?;
                store_and_commit(
                    job,
                    session,
                    &name,
                    started,
                    &base,
                    frozen,
                    context,
                    &mut warnings,
                )
            }
            other => other,
        }
    });
    record_damage(job.repository, "backup");
    let (point, healed_bytes) = match stored {
        Ok(stored) => stored,
        Err(error) => {
            abort(frozen, context);
            return Err(error);
        }
    };

    context.phase(Phase::Release, &name);
    release(frozen, context, &mut warnings);
    Ok(BackupSummary { unknown_exclusions, ..summary(point, begun, healed_bytes, warnings) })
}

/// The disks that stand elsewhere in the VM than at the base.
fn moved_disks(frozen: &dyn FrozenVm) -> BTreeMap<DiskId, DiskId> {
    let moved = |disk: &FrozenDisk| Some((disk.id.clone(), frozen.moved_from(&disk.id)?.clone()));
    frozen.disks().iter().filter_map(moved).collect()
}

fn freeze_request(
    job: &BackupJob<'_>,
    lineage_name: &str,
    base: &BaseChoice,
    context: JobContext<'_>,
) -> FreezeRequest {
    FreezeRequest {
        vm: job.vm.clone(),
        job: JobId::random(),
        lineage: lineage(job.repository.config().id, lineage_name),
        // Whoever names none gets the best there is, and no complaint about what it is.
        consistency: job.consistency.unwrap_or(Consistency::Application),
        allow_downgrade: job.consistency.is_none() || job.allow_downgrade,
        bases: base.bases(),
        exclude: job.exclude.clone(),
        cancel: context.cancel.clone(),
    }
}

/// Names the line of backups of one VM into one repository, so that two repositories never use
/// each other's change tracking: 16 hexadecimal digits.
pub fn lineage(repository: ObjectId, vm: &str) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("vmtide 2026 tracking lineage");
    hasher.update(&repository.0);
    hasher.update(vm.as_bytes());
    hasher.finalize().to_hex()[..16].to_owned()
}

/// A name ends up in file names, lists and `VM@TIME`; what would confuse those is refused.
fn check_name(name: &str) -> Result<()> {
    let bad = name.is_empty()
        || name.len() > 255
        || name.contains(['@', '/'])
        || name.chars().any(char::is_control);
    if bad {
        return Err(EngineError::usage(format!(
            "{name:?} cannot name a VM in a repository (1 to 255 bytes, no @, / or control \
             characters); give another with --name"
        )));
    }
    Ok(())
}

fn check_consistency(
    job: &BackupJob<'_>,
    frozen: &dyn FrozenVm,
    context: JobContext<'_>,
    warnings: &mut Vec<String>,
) -> Result<()> {
    for warning in frozen.warnings() {
        context.warn(warnings, warning.clone());
    }
    check_consistency_reached(job, frozen, context, warnings)
}

fn check_consistency_reached(
    job: &BackupJob<'_>,
    frozen: &dyn FrozenVm,
    context: JobContext<'_>,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let Some(wanted) = job.consistency else {
        return Ok(());
    };
    let reached = frozen.consistency();
    if reached >= wanted {
        return Ok(());
    }
    let detail = frozen.downgrade_reason().unwrap_or("no reason was given");
    if !job.allow_downgrade {
        return Err(EngineError::Hypervisor(HypervisorError::ConsistencyNotReached {
            wanted,
            detail: detail.into(),
        }));
    }
    context.warn(warnings, format!("{reached} consistency instead of {wanted}: {detail}"));
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "the parts of one backup, each used once")]
fn store_and_commit(
    job: &BackupJob<'_>,
    mut session: BackupSession,
    name: &str,
    started: Timestamp,
    base: &BaseChoice,
    frozen: &mut dyn FrozenVm,
    context: JobContext<'_>,
    warnings: &mut Vec<String>,
) -> Result<(RestorePoint, u64)> {
    let mut disks = store_disks(job, &mut session, name, base, frozen, context, warnings)?;
    context.cancel.check()?;
    // The disks may have stopped being those of one moment while they were read.
    frozen.check()?;
    seal(job, frozen, &mut disks, context, warnings)?;
    context.phase(Phase::Commit, name);
    let draft = PointDraft {
        vm: name.to_owned(),
        level: base.level,
        parent: base.parent.as_ref().map(|point| point.id),
        consistency: frozen.consistency().to_string(),
        tags: job.tags.clone(),
        host: host_name(),
        source: job.source.clone(),
        started,
        config: serde_json::to_value(frozen.config()).map_err(|error| {
            EngineError::refused("record the VM's configuration", error.to_string())
        })?,
        warnings: warnings.clone(),
        disks,
    };
    let healed_bytes = session.healed_bytes();
    Ok((session.commit(draft)?, healed_bytes))
}

/// Names the moment for the next backup. What the platform tells only now of the consistency counts, too.
fn seal(
    job: &BackupJob<'_>,
    frozen: &mut dyn FrozenVm,
    disks: &mut [DiskDraft],
    context: JobContext<'_>,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let before = frozen.consistency();
    let sealed = frozen.seal()?;
    for warning in sealed.warnings {
        context.warn(warnings, warning);
    }
    if frozen.consistency() < before {
        check_consistency_reached(job, frozen, context, warnings)?;
    }
    for disk in disks {
        let id = DiskId(disk.stored.id().to_owned());
        disk.tracking.id = sealed.tracking.get(&id).map(ToString::to_string);
    }
    Ok(())
}

/// Stores all disks, healed where the repository was damaged.
fn store_disks(
    job: &BackupJob<'_>,
    session: &mut BackupSession,
    name: &str,
    base: &BaseChoice,
    frozen: &dyn FrozenVm,
    context: JobContext<'_>,
    warnings: &mut Vec<String>,
) -> Result<Vec<DiskDraft>> {
    let plans = plan_disks(job, base, frozen, context, warnings)?;
    // What the comparison with the stored copy met is not to be shared.
    session.look_for_damage()?;
    warn_of_missing_disks(job, base, frozen, context, warnings);
    context.phase(Phase::Store, name);
    for (disk, plan) in &plans {
        let bytes = plan.bytes_to_look_at(disk.device.size_bytes(), BLOCK_BYTES as u64);
        context.progress.add_total(bytes);
    }
    let mut disks = Vec::with_capacity(plans.len());
    for (disk, plan) in &plans {
        context.cancel.check()?;
        disks.push(store_disk(job, session, base, disk, plan, context)?);
    }
    mend_disks(session, &plans, disks, context, warnings)
}

/// Times that the disks are looked at again because damage was found. What is read again can meet
/// more of it, but a repository that goes on falling apart is no place for a backup.
const MAX_MENDS: usize = 4;

/// Reads again what the disks share with places that were found damaged while they were stored.
fn mend_disks(
    session: &mut BackupSession,
    plans: &[(&FrozenDisk, DiskChanges)],
    mut disks: Vec<DiskDraft>,
    context: JobContext<'_>,
    warnings: &mut Vec<String>,
) -> Result<Vec<DiskDraft>> {
    for _ in 0..MAX_MENDS {
        if !session.look_for_damage()? {
            return Ok(disks);
        }
        let mut mended = Vec::with_capacity(disks.len());
        for (draft, (disk, _)) in disks.into_iter().zip(plans) {
            let DiskDraft { stored, .. } = draft;
            let source = disk.device.as_ref();
            let (stored, lost) =
                session.mend_disk(source, stored, context.progress, context.cancel)?;
            if !lost.is_empty() {
                let bytes = lost.total_bytes();
                let message = format!(
                    "{bytes} bytes of disk {} are damaged in earlier restore points and were read \
                     again; run `vmtide verify` to see which",
                    disk.id
                );
                context.warn(warnings, message);
            }
            mended.push(DiskDraft { stored, ..draft });
        }
        disks = mended;
    }
    context.warn(
        warnings,
        "damage was found in the repository again and again while this backup ran: this restore \
         point may not be whole; run `vmtide verify --read-data`",
    );
    Ok(disks)
}

/// Decides for every disk what is read, and warns of what was lost.
fn plan_disks<'a>(
    job: &BackupJob<'_>,
    base: &BaseChoice,
    frozen: &'a dyn FrozenVm,
    context: JobContext<'_>,
    warnings: &mut Vec<String>,
) -> Result<Vec<(&'a FrozenDisk, DiskChanges)>> {
    // Not every platform leaves excluded disks out by itself.
    let disks: Vec<_> =
        frozen.disks().iter().filter(|disk| !job.exclude.contains(&disk.id)).collect();
    if disks.is_empty() {
        return Err(EngineError::refused(
            format!("back up {}", frozen.config().name),
            "it has no disk to back up (or all are excluded)",
        ));
    }
    let mut plans: Vec<(&FrozenDisk, DiskChanges)> = Vec::with_capacity(disks.len());
    for disk in disks {
        if plans.iter().any(|(other, _)| other.id == disk.id) {
            return Err(EngineError::Hypervisor(HypervisorError::protocol(
                frozen.config().name.clone(),
                format!("two disks have the id {}", disk.id),
            )));
        }
        let plan = check_sample(job, base, disk, changes::decide(disk, base), context, warnings)?;
        if let Some(reason) = plan.full_reason().filter(|reason| reason.is_loss()) {
            context.warn(warnings, format!("disk {} is read in full: {reason}", disk.id));
        }
        plans.push((disk, plan));
    }
    Ok(plans)
}

/// Holds what is said to be unchanged against the stored copy, as far as the job asks for.
fn check_sample(
    job: &BackupJob<'_>,
    base: &BaseChoice,
    disk: &FrozenDisk,
    plan: DiskChanges,
    context: JobContext<'_>,
    warnings: &mut Vec<String>,
) -> Result<DiskChanges> {
    let (DiskChanges::Ranges(changed), Some(newest)) = (&plan, &base.newest) else {
        return Ok(plan);
    };
    let (source, cancel) = (disk.device.as_ref(), context.cancel);
    let stored = job.repository.open_disk(newest, base.id_in_base(&disk.id))?;
    // What is damaged is read from the source again anyway, and is nothing to compare with.
    let damaged = match base.stored_base(&disk.id) {
        Some(record) => job.repository.damaged_ranges(record)?,
        None => RangeSet::new(),
    };
    let mut known = changed.union(&damaged);
    let mut missed = None;
    for attempt in 0..=MAX_NEW_DAMAGE {
        let found = find_missed(source, stored.as_ref(), &known, job.check_unchanged, cancel);
        match found {
            Err(EngineError::Block(BlockError::Damaged { .. })) if attempt < MAX_NEW_DAMAGE => {
                record_damage(job.repository, "backup");
                if let Some(record) = base.stored_base(&disk.id) {
                    known = known.union(&job.repository.damaged_ranges(record)?);
                }
            }
            other => {
                missed = other?;
                break;
            }
        }
    }
    if !damaged.is_empty() {
        let bytes = damaged.total_bytes();
        let message = format!(
            "{bytes} bytes of disk {} are damaged in the previous restore point and are read again",
            disk.id
        );
        context.warn(warnings, message);
    }
    Ok(match missed {
        None => plan,
        Some(block) => DiskChanges::Everything(FullReason::AnswerDoubtful(format!(
            "bytes {block} differ from the previous restore point and were not reported"
        ))),
    })
}

/// Damaged places that the comparison may come upon, one after the other, before it is given up.
const MAX_NEW_DAMAGE: usize = 16;

/// Compares samples of what is said to be unchanged; answers with bytes that differ.
fn find_missed(
    source: &dyn BlockDevice,
    stored: &dyn BlockDevice,
    changed: &RangeSet,
    samples: u32,
    cancel: &CancelToken,
) -> Result<Option<ByteRange>> {
    let missed = sample::find_lost_end(source, stored, changed, cancel)?;
    if missed.is_some() {
        return Ok(missed);
    }
    sample::find_missed_change(source, stored, changed, samples, cancel)
}

/// A disk that was backed up before and is not there now may have been detached on purpose, or not.
fn warn_of_missing_disks(
    job: &BackupJob<'_>,
    base: &BaseChoice,
    frozen: &dyn FrozenVm,
    context: JobContext<'_>,
    warnings: &mut Vec<String>,
) {
    for known in base.newest.iter().flat_map(|point| &point.disks) {
        let is_there = frozen.disks().iter().any(|disk| base.id_in_base(&disk.id) == known.id);
        let is_excluded = job.exclude.iter().any(|disk| disk.0 == known.id);
        if !is_there && !is_excluded {
            let message = format!(
                "disk {} of the previous restore point is no longer among the VM's disks",
                known.id
            );
            context.warn(warnings, message);
        }
    }
}

fn store_disk(
    job: &BackupJob<'_>,
    session: &BackupSession,
    base: &BaseChoice,
    disk: &FrozenDisk,
    plan: &DiskChanges,
    context: JobContext<'_>,
) -> Result<DiskDraft> {
    let device: &dyn BlockDevice = disk.device.as_ref();
    let reason = plan.full_reason().map(ToString::to_string);
    context.observer.event(Event::DiskStarted {
        disk: disk.id.to_string(),
        bytes: plan.bytes_to_look_at(device.size_bytes(), 1),
        reason: reason.clone(),
    });
    let stored = session.store_disk(
        device,
        &DiskPlan {
            id: disk.id.to_string(),
            base: base.stored_base(&disk.id),
            changed: match plan {
                DiskChanges::Ranges(ranges) => ChangedRanges::Only(ranges.clone()),
                DiskChanges::Everything(_) => ChangedRanges::Everything,
            },
        },
        context.progress,
        context.cancel,
    )?;
    let changed_bytes =
        changes::bytes_since_full(job.repository, base, &disk.id, plan, stored.counts())?;
    context.observer.event(Event::DiskFinished {
        disk: disk.id.to_string(),
        counts: DiskCounts {
            changed_bytes: changed_bytes.unwrap_or(stored.counts().changed_bytes),
            ..stored.counts()
        },
    });
    Ok(DiskDraft {
        stored,
        tracking: TrackingRecord {
            used: reason.is_none(),
            reason,
            id: disk.tracking.as_ref().map(ToString::to_string),
        },
        changed_bytes,
    })
}

/// Undoes the freeze. The job has failed already: what cannot be undone is logged and shown, but
/// must not hide the reason of the failure.
fn abort(frozen: Box<dyn FrozenVm>, context: JobContext<'_>) {
    context.phase(Phase::Abort, frozen.config().name.clone());
    if let Err(error) = frozen.abort() {
        context.warn(
            &mut Vec::new(),
            format!("not everything could be undone on the VM, the next run will: {error}"),
        );
    }
}

/// Ends the freeze of a committed restore point, which stands whatever happens here.
fn release(frozen: Box<dyn FrozenVm>, context: JobContext<'_>, warnings: &mut Vec<String>) {
    match frozen.commit() {
        Ok(left) => {
            for what in left {
                context
                    .warn(warnings, format!("left on the VM, the next run will remove it: {what}"));
            }
        }
        Err(error) => context.warn(
            warnings,
            format!(
                "the restore point is complete, but change tracking could not be kept, so the \
                 next backup reads in full: {error}"
            ),
        ),
    }
}

fn summary(
    point: RestorePoint,
    begun: Instant,
    healed_bytes: u64,
    warnings: Vec<String>,
) -> BackupSummary {
    BackupSummary {
        point: point.id,
        vm: point.vm,
        level: point.level,
        consistency: point.consistency,
        disks: point
            .disks
            .into_iter()
            .map(|disk| DiskSummary { id: disk.id, counts: disk.counts, tracking: disk.tracking })
            .collect(),
        healed_bytes,
        unknown_exclusions: Vec::new(),
        duration_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        warnings,
    }
}

/// This host, as the operating system names it.
pub fn host_name() -> String {
    vmtide_block::files::host_name()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lineage_is_stable_and_differs_by_repository_and_vm() {
        let (one, two) = (ObjectId([1; 16]), ObjectId([2; 16]));
        assert_eq!(lineage(one, "web"), lineage(one, "web"));
        assert_ne!(lineage(one, "web"), lineage(two, "web"));
        assert_ne!(lineage(one, "web"), lineage(one, "db"));
        let text = lineage(one, "web");
        assert!(text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit()));
    }

    #[test]
    fn names_that_break_lists_and_paths_are_refused() {
        for bad in ["", "a@b", "a/b", "a\nb", &"x".repeat(256)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        for good in ["web", "Web Server 1", "müller.db"] {
            check_name(good).unwrap();
        }
    }
}
