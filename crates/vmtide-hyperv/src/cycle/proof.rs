//! What proves a checkpoint or a reference point to be ours although the host's answer, or its job's end, was not heard of.
//!
//! The host lists its jobs, also those of others, for some five minutes after their end, with what each worked on. From that
//! three things can follow:
//! - the result of a job of ours is ours, and what another job made is not;
//! - the reference point of a job that worked on our checkpoint is ours, whoever named that job;
//! - where a job of ours did its work and names no result, the only new object is that result, if no other job can have made
//!   or removed one since it began, and nobody has seen several.
//!
//! A call of ours whose job was never named proves nothing: a job that is listed may be another program's, and our call may
//! not have reached the host.

use crate::cycle::checkpoint::created_s;
use crate::cycle::points::{self, only};
use crate::cycle::steps::{JobState, Making};
use crate::gates::job_of_checkpoint;
use crate::job::{JobElement, JobPhase, JobRecord};
use crate::model::{codes, point_path};
use crate::{Host, ReferencePointRecord, SnapshotKind, SnapshotRecord};
use uuid::Uuid;
use vmtide_cim::ObjectPath;

/// How far two times of the host's clock may differ that name one moment, in seconds: they are written in whole ones.
const ROUNDING_S: i64 = 1;

/// How long a job is listed after its end, in seconds (`TimeBeforeRemoval` of `Msvm_ConcreteJob`).
const LISTED_S: i64 = 5 * 60;

/// What the jobs of the host tell of the making of a checkpoint.
#[derive(Debug, Default)]
pub(crate) struct MakingProof {
    /// The `InstanceID`s of the checkpoints that it made.
    pub made: Vec<String>,
    /// The `InstanceID`s of those that another job made.
    pub of_others: Vec<String>,
    /// Whether nothing came of it, and nothing will.
    pub came_to_nothing: bool,
    /// Whether there are several that it may have made.
    pub is_unclear: bool,
}

/// Asks the host what came of a making whose job is known. Whatever cannot be asked proves nothing.
pub(crate) fn of_making(
    host: &Host,
    vm: Uuid,
    state: &JobState,
    making: &Making,
    snapshots: &[SnapshotRecord],
) -> MakingProof {
    let mut proof = MakingProof::default();
    let Some(job) = &making.job else { return proof };
    let new: Vec<_> = snapshots.iter().filter(|one| is_new_recovery(one, &making.before)).collect();
    if !new.is_empty() {
        proof.made = host.snapshots_of_job(job, snapshots, &making.before);
    }
    if !proof.made.is_empty() {
        return proof;
    }
    let Ok(Some(record)) = host.job(job) else { return proof };
    match record.phase {
        JobPhase::Failed(code) => proof.came_to_nothing = codes::is_last_word(code),
        JobPhase::Open => {}
        JobPhase::Done => {
            let elements = host.job_elements().unwrap_or_default();
            let is_other = |one: &&&SnapshotRecord| is_of_other(&elements, job, one);
            let of_others = new.iter().filter(is_other);
            proof.of_others = of_others.map(|one| one.settings.instance_id.clone()).collect();
            let is_rest =
                |one: &&&SnapshotRecord| !proof.of_others.contains(&one.settings.instance_id);
            let rest: Vec<_> = new.iter().filter(is_rest).collect();
            proof.is_unclear = making.unclear || rest.len() > 1;
            if proof.is_unclear {
                return proof;
            }
            let one = only(rest.into_iter()).filter(|one| is_within(one, &record));
            let is_ours = one.is_some() && has_no_rival(host, vm, state, &record, &elements);
            let one = one.filter(|_| is_ours).map(|one| one.settings.instance_id.clone());
            proof.made.extend(one);
        }
    }
    proof
}

/// The reference point that a conversion of ours made, where its answer was not heard.
pub(crate) fn point_of<'a>(
    host: &Host,
    vm: Uuid,
    state: &JobState,
    points: &'a [ReferencePointRecord],
    before: &[String],
) -> Option<&'a ReferencePointRecord> {
    let named = || {
        let job = state.convert_job.as_ref();
        let named = job.map(|job| host.points_of_job(job)).unwrap_or_default();
        if named.is_empty() { points_from(host, &state.snapshots) } else { named }
    };
    // What was not there at the first look came later and is of another job, whatever its ids are: a VM that is taken back to a
    // checkpoint may give them out again.
    let later = state.doubted.iter().flat_map(|doubted| {
        let ids = points.iter().map(|point| &point.instance_id);
        ids.filter(|id| !points::is_among(id, doubted))
    });
    let before: Vec<String> = before.iter().chain(later).cloned().collect();
    let before = before.as_slice();
    let found = points::made_of(points, before, &state.tracking, &state.snapshots, named);
    if found.is_some() {
        return found;
    }
    // What was one of several once is not ours because the others are gone.
    if state.doubted.is_some() {
        return None;
    }
    let new = points.iter().filter(|point| !points::is_among(&point.instance_id, before));
    let point = only(new)?;
    let record = host.job(state.convert_job.as_ref()?).ok().flatten()?;
    let elements = host.job_elements().ok()?;
    let is_made =
        record.phase == JobPhase::Done && has_no_rival(host, vm, state, &record, &elements);
    is_made.then_some(point)
}

/// The reference points of the jobs that worked on these checkpoints.
fn points_from(host: &Host, checkpoints: &[String]) -> Vec<String> {
    let Ok(elements) = host.job_elements() else { return Vec::new() };
    let is_ours = |one: &JobElement| {
        let key = one.element.key("InstanceID");
        key.is_some_and(|key| checkpoints.iter().any(|id| id.eq_ignore_ascii_case(key)))
    };
    let jobs: Vec<&str> =
        elements.iter().filter(|one| is_ours(one)).map(|one| one.job.as_str()).collect();
    let results = elements.iter().filter(|one| {
        point_path(&one.element) && jobs.iter().any(|job| job.eq_ignore_ascii_case(&one.job))
    });
    results.filter_map(|one| one.element.key("InstanceID").map(str::to_owned)).collect()
}

/// Whether a checkpoint for a backup is neither among these nor named by a job of vmtide.
pub(crate) fn is_new_recovery(snapshot: &SnapshotRecord, before: &[String]) -> bool {
    snapshot.kind == SnapshotKind::Recovery
        && !before.contains(&snapshot.settings.instance_id)
        && job_of_checkpoint(&snapshot.settings.name).is_none()
}

/// Whether another job than `own` is listed as the one that made a checkpoint.
fn is_of_other(elements: &[JobElement], own: &ObjectPath, snapshot: &SnapshotRecord) -> bool {
    let Some(own) = own.key("InstanceID") else { return false };
    let id = &snapshot.settings.instance_id;
    elements.iter().any(|one| {
        one.created
            && !one.job.eq_ignore_ascii_case(own)
            && one.element.key("InstanceID").is_some_and(|key| key.eq_ignore_ascii_case(id))
    })
}

/// Whether a checkpoint was made while the job was at work.
fn is_within(snapshot: &SnapshotRecord, job: &JobRecord) -> bool {
    let times = job.begun_s.zip(job.changed_s).zip(created_s(snapshot));
    times.is_some_and(|((begun, ended), created)| {
        (begun - ROUNDING_S..=ended + ROUNDING_S).contains(&created)
    })
}

/// Whether no job that is not ours can have made or removed a checkpoint or a reference point of the VM since `own` began.
fn has_no_rival(
    host: &Host,
    vm: Uuid,
    state: &JobState,
    own: &JobRecord,
    elements: &[JobElement],
) -> bool {
    let (Some(begun), Ok(jobs)) = (own.begun_s, host.jobs()) else { return false };
    let is_named = |id: &str| {
        let mut ours = state.jobs.iter().filter_map(|job| job.key("InstanceID"));
        ours.any(|own| own.eq_ignore_ascii_case(id))
    };
    let is_ours = |job: &JobRecord| job.id.as_deref().is_some_and(is_named);
    let is_over = |job: &JobRecord| {
        job.phase != JobPhase::Open
            && job.changed_s.is_some_and(|changed| changed < begun - ROUNDING_S)
    };
    // None that was at work since `own` began is forgotten yet, and a list without our own job is not the whole list.
    let is_whole = host.told_unix_s().is_some_and(|now| now < begun + LISTED_S - ROUNDING_S);
    is_whole
        && jobs.iter().any(is_ours)
        && jobs.iter().all(|job| {
            is_ours(job)
                || is_over(job)
                || job.kind.is_some_and(leaves_checkpoints_alone)
                || is_of_another_vm(job, elements, vm)
        })
}

/// Whether a job of this `JobType` neither makes nor removes checkpoints of an existing VM, nor reference points: those for
/// VMs, their resources, memory and merges, pools, switches, planned VMs and settings. Not those for checkpoints (70 to 73),
/// replication (90 to 125) and backups (170), nor any that is unknown.
fn leaves_checkpoints_alone(kind: u16) -> bool {
    matches!(kind, 1..=64 | 80..=81 | 130..=162 | 180..=181)
}

/// Whether what a job worked on names another VM, and not this one.
fn is_of_another_vm(job: &JobRecord, elements: &[JobElement], vm: Uuid) -> bool {
    let Some(id) = &job.id else { return false };
    let own = elements.iter().filter(|one| one.job.eq_ignore_ascii_case(id));
    let names: Vec<_> = own
        .filter(|one| one.element.class.eq_ignore_ascii_case("Msvm_ComputerSystem"))
        .filter_map(|one| one.element.key("Name")?.parse::<Uuid>().ok())
        .collect();
    !names.is_empty() && !names.contains(&vm)
}
