//! The recovery checkpoint: making it, and finding it again.

use crate::cycle::proof::{self, is_new_recovery};
use crate::cycle::steps::{self, JobState, Step};
use crate::cycle::{HypervHypervisor, time};
use crate::model::NotMade;
use crate::{BackupType, SnapshotKind, SnapshotRecord, SnapshotRequest, VmRecord};
use uuid::Uuid;
use vmtide_hypervisor::{Consistency, FreezeRequest, HypervisorError, JobId, Journal, Result};

/// How much the host's clock may be set meanwhile, or differ from this machine's where the host does not tell its time, in
/// seconds, when an unnamed checkpoint is held against the time at which a killed job asked for one.
const CLOCK_TOLERANCE_S: i64 = 10 * 60;

/// How old a checkpoint with our name that no journal here knows must be, in seconds, for it to keep no backup waiting: another
/// installation may be working with it, whose lock cannot be seen from here. Hardly a backup takes three days.
pub(crate) const ORPHAN_AGE_S: i64 = 3 * 24 * 3600;

/// A checkpoint with the consistency it was made with.
pub(crate) struct Made {
    pub snapshot: SnapshotRecord,
    pub consistency: Consistency,
    pub downgrade: Option<String>,
}

/// Makes a recovery checkpoint, as consistent as is asked for, or less where that is allowed.
///
/// # Errors
/// [`HypervisorError::ConsistencyNotReached`], or what the host says. What may have been made is in the journal.
pub(crate) fn make(
    hyperv: &HypervHypervisor,
    vm: &VmRecord,
    request: &FreezeRequest,
    journal: &mut Journal,
) -> Result<Made> {
    if request.consistency == Consistency::Crash {
        let snapshot = make_one(hyperv, vm, Consistency::Crash, request, journal)?;
        return Ok(Made { snapshot, consistency: Consistency::Crash, downgrade: None });
    }
    // VSS (or the Linux daemon that answers for it) brings file systems to rest, too: there is nothing in between.
    let reason = match make_one(hyperv, vm, request.consistency, request, journal) {
        Ok(snapshot) => {
            return Ok(Made { snapshot, consistency: Consistency::Application, downgrade: None });
        }
        Err(HypervisorError::ConsistencyNotReached { detail, .. }) if request.allow_downgrade => {
            detail
        }
        Err(error) => return Err(error),
    };
    request.cancel.check()?;
    tracing::info!(vm = %vm.name, reason, "trying a crash-consistent checkpoint");
    let snapshot = make_one(hyperv, vm, Consistency::Crash, request, journal)?;
    Ok(Made { snapshot, consistency: Consistency::Crash, downgrade: Some(reason) })
}

/// Makes one. Where the host refuses it because it merges or removes what was before, that is waited for: an earlier job's
/// checkpoint was removed a moment ago, and with a user's checkpoint above it no leaf of it tells how far the merge is.
fn make_one(
    hyperv: &HypervHypervisor,
    vm: &VmRecord,
    consistency: Consistency,
    request: &FreezeRequest,
    journal: &mut Journal,
) -> Result<SnapshotRecord> {
    let clock = hyperv.host().options().clock.as_ref();
    let deadline = clock.now_ms().saturating_add(hyperv.options().merge_wait_ms);
    loop {
        let not_made = match try_one(hyperv, vm, consistency, request, journal)? {
            Ok(snapshot) => return Ok(snapshot),
            Err(not_made) => not_made,
        };
        let waits = not_made.refused && not_made.busy && clock.now_ms() < deadline;
        if !waits || !hyperv.host().is_at_checkpoints(vm.id).unwrap_or(false) {
            return Err(not_made.error);
        }
        tracing::info!(vm = %vm.name, "the host is at an earlier checkpoint; waiting for it");
        while clock.now_ms() < deadline && hyperv.host().is_at_checkpoints(vm.id)? {
            request.cancel.check()?;
            clock.sleep_ms(hyperv.host().options().poll_interval_ms.max(1));
        }
    }
}

/// Asks for one. What the host says to that is in the answer; where nothing can be said, an error.
fn try_one(
    hyperv: &HypervHypervisor,
    vm: &VmRecord,
    consistency: Consistency,
    request: &FreezeRequest,
    journal: &mut Journal,
) -> Result<std::result::Result<SnapshotRecord, NotMade>> {
    let host = hyperv.host();
    let before: Vec<String> =
        host.snapshots(vm.id)?.into_iter().map(|snapshot| snapshot.settings.instance_id).collect();
    let at = host.unix_s();
    steps::record(journal, &Step::Checkpointing { before, at })?;
    let wanted = SnapshotRequest {
        consistency,
        backup_type: backup_type(hyperv, consistency),
        // What cannot be held is left out by the host, and told by comparing the lists of disks.
        ignore_non_snapshottable: true,
    };
    let made = host.make_recovery_snapshot(vm, &wanted, &request.cancel, &mut |job| {
        steps::record(journal, &Step::CheckpointJob { job: job.clone() })
    });
    let snapshot = match made {
        Ok(snapshot) => snapshot,
        Err(not_made) => {
            if not_made.refused {
                steps::record(journal, &Step::Refused)?;
            }
            match adopt(hyperv, vm, journal, &not_made.error) {
                Some(snapshot) => snapshot,
                None => return Ok(Err(not_made)),
            }
        }
    };
    let id = snapshot.settings.instance_id.clone();
    steps::record(journal, &Step::Checkpointed { snapshot: id })?;
    if let Err(error) =
        host.rename(&snapshot.settings, &steps::checkpoint_name(request.job.as_str()))
    {
        // The journal knows it by its id. The name is for people.
        tracing::warn!(%error, vm = %vm.name, "the checkpoint keeps the name that the host gave it");
    }
    Ok(Ok(snapshot))
}

fn backup_type(hyperv: &HypervHypervisor, consistency: Consistency) -> BackupType {
    match consistency {
        // Nobody in the guest is told anything.
        Consistency::Crash => BackupType::Copy,
        _ => hyperv.options().backup_type,
    }
}

/// The checkpoint that the host made without its answer arriving, where its job proves it; none where nothing proves one to
/// be ours. That it is new proves nothing: other products make checkpoints, too.
fn adopt(
    hyperv: &HypervHypervisor,
    vm: &VmRecord,
    journal: &Journal,
    error: &HypervisorError,
) -> Option<SnapshotRecord> {
    let was_lost =
        matches!(error, HypervisorError::Unreachable { .. } | HypervisorError::Protocol { .. });
    let state = JobState::of(journal.entry());
    let making = state.making.last().filter(|_| was_lost)?;
    let mut snapshots = hyperv.host().snapshots(vm.id).ok()?;
    let ours = proof::of_making(hyperv.host(), vm.id, &state, making, &snapshots).made;
    snapshots.retain(|snapshot| ours.contains(&snapshot.settings.instance_id));
    let snapshot = snapshots.pop().filter(|_| snapshots.is_empty())?;
    tracing::warn!(%error, vm = %vm.name, "the host made the checkpoint, but its answer was lost");
    Some(snapshot)
}

/// The checkpoints of a job.
pub(crate) struct Found<'a> {
    /// Surely made by it.
    pub ours: Vec<&'a SnapshotRecord>,
    /// Perhaps: each appeared when the job asked for one, and nothing proves whose it is.
    pub doubtful: Vec<&'a SnapshotRecord>,
    /// Whether the host may still be making one.
    pub unsettled: bool,
    /// Whether there are several of which one is its, which is to be written down.
    pub is_unclear: bool,
}

/// Finds the checkpoints of a job: by id, by name, or, where it was not there to learn either, as what the host's job proves
/// to be ours. Any other that appeared when the job asked for one is told, and left alone: it may be another product's.
pub(crate) fn ours<'a>(
    hyperv: &HypervHypervisor,
    vm: Uuid,
    snapshots: &'a [SnapshotRecord],
    job: &JobId,
    state: &JobState,
) -> Found<'a> {
    let name = steps::checkpoint_name(job.as_str());
    let is_known = |snapshot: &SnapshotRecord| {
        state.snapshots.contains(&snapshot.settings.instance_id)
            || (snapshot.settings.name == name && snapshot.kind == SnapshotKind::Recovery)
    };
    let ours: Vec<_> = snapshots.iter().filter(|snapshot| is_known(snapshot)).collect();
    let mut found = Found { ours, doubtful: Vec::new(), unsettled: false, is_unclear: false };
    // The name is proof enough: one job has one checkpoint.
    if !found.ours.is_empty() {
        return found;
    }
    for making in &state.making {
        let new = snapshots.iter().filter(|one| is_new_recovery(one, &making.before));
        let proof = proof::of_making(hyperv.host(), vm, state, making, snapshots);
        found.ours.extend(new.clone().filter(|one| is_among(&proof.made, one)));
        found.is_unclear |= proof.is_unclear && !making.unclear;
        if making.settled || proof.came_to_nothing || !found.ours.is_empty() {
            continue;
        }
        let limit_s = limit_s(hyperv);
        let may_be = |one: &&SnapshotRecord| {
            may_be(one, making.at, limit_s) && !is_among(&proof.of_others, one)
        };
        let likely: Vec<_> = new.filter(may_be).collect();
        found.unsettled |=
            likely.is_empty() && hyperv.host().unix_s() < making.at.saturating_add(limit_s);
        found.doubtful.extend(likely);
    }
    found
}

/// What is told of a checkpoint of which nothing proves whose it is.
pub(crate) fn doubt(snapshot: &SnapshotRecord) -> String {
    let name = &snapshot.settings.name;
    format!(
        "checkpoint {name:?} appeared when an earlier job asked for one; it may be another program's, so it is left \
         alone: if no other program backs up the VM, say so (--only-backup-program), or remove it (Get-VMSnapshot, \
         Remove-VMSnapshot)"
    )
}

fn is_among(ids: &[String], snapshot: &SnapshotRecord) -> bool {
    ids.contains(&snapshot.settings.instance_id)
}

/// Whether a checkpoint can be the one that was asked for at `at`.
fn may_be(snapshot: &SnapshotRecord, at: i64, limit_s: i64) -> bool {
    let from = at.saturating_sub(CLOCK_TOLERANCE_S);
    created_s(snapshot).is_none_or(|created| (from..=at.saturating_add(limit_s)).contains(&created))
}

/// How long after it was asked for a checkpoint may appear, in seconds.
fn limit_s(hyperv: &HypervHypervisor) -> i64 {
    let timeout_s = hyperv.host().options().job_timeout_ms / 1000;
    i64::try_from(timeout_s).unwrap_or(i64::MAX).saturating_add(CLOCK_TOLERANCE_S)
}

/// When a checkpoint was made, in seconds since 1970; none where the host does not tell.
pub(crate) fn created_s(snapshot: &SnapshotRecord) -> Option<i64> {
    let text = snapshot.settings.instance.optional_text("CreationTime").ok().flatten()?;
    time::seconds_of(text)
}
