//! Removing what a job made on the host, whether it ended well, failed or was killed.
//!
//! One procedure for all cases. It looks at what is there and holds it against the steps of the job, so it can be
//! repeated and continued at any point.
//!
//! What becomes of a reference point that a job made, by how far the job got:
//!
//! | steps                          | the restore point | the new point         | the older points of the lineage |
//! |--------------------------------|-------------------|-----------------------|---------------------------------|
//! | `Converting`, no `Converted`   | is none           | found by what proves it: destroyed | kept                   |
//! | `Converted`, the job failed    | is none           | destroyed             | kept                            |
//! | `Converted`, the job was killed | may stand        | kept, in the ledger   | kept                            |
//! | `Committed`                    | stands            | kept, in the ledger   | destroyed                       |
//!
//! In the third case the next job of the lineage learns from the base it is given which point is of use, and destroys
//! the others.

use crate::cycle::checkpoint;
use crate::cycle::ledger::{Ledger, OwnPoint};
use crate::cycle::points::same_point;
use crate::cycle::steps::{self, JobState, Step};
use crate::cycle::{HypervHypervisor, merge, points, proof};
use crate::{ReferencePointRecord, SnapshotRecord};
use uuid::Uuid;
use vmtide_block::CancelToken;
use vmtide_hypervisor::{HypervisorError, JobId, Journal, Result};

/// What is known of the restore point that the job was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The job itself asks: there is none, unless its steps say `Committed`.
    Told,
    /// The job was killed: nobody knows, unless its steps say `Committed`.
    Unknown,
}

/// What was done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Undone {
    /// What was removed.
    pub removed: Vec<String>,
    /// Checkpoints of ours that could not be removed.
    pub stuck: Vec<String>,
    /// Reference points of ours that could not be removed. They cost little and stand in nobody's way.
    pub points_left: Vec<String>,
    /// Checkpoints that may be ours or another program's: left alone, and told until they are gone.
    pub nameless: Vec<String>,
    /// Reference points that may be ours or another program's: left alone, and told until they are gone.
    pub doubtful: Vec<String>,
    /// Whether that was found just now, and not by an earlier look.
    pub is_new_doubt: bool,
    /// Why the journal is kept for another host, where it is.
    pub elsewhere: Option<String>,
    /// Files that the host has not merged yet.
    pub merging: Vec<String>,
    /// Whether the host may still be making what the job asked for.
    pub unsettled: bool,
}

impl Undone {
    /// Whether nothing is left that the journal is needed for.
    pub fn is_complete(&self) -> bool {
        self.stuck.is_empty()
            && self.points_left.is_empty()
            && self.merging.is_empty()
            && self.nameless.is_empty()
            && self.doubtful.is_empty()
            && self.elsewhere.is_none()
            && !self.unsettled
    }

    /// What is left, one line each.
    pub fn left(&self) -> Vec<String> {
        let mut left = self.stuck.clone();
        left.extend(self.points_left.iter().cloned());
        left.extend(self.nameless.iter().cloned());
        left.extend(self.doubtful.iter().cloned());
        left.extend(self.elsewhere.clone());
        if !self.merging.is_empty() {
            left.push(merge::describe(&self.merging));
        }
        left
    }
}

/// One removal.
pub(crate) struct Undo<'a> {
    pub hyperv: &'a HypervHypervisor,
    pub vm: Uuid,
    pub journal: &'a mut Journal,
    pub fate: Fate,
    pub ledger: &'a mut Ledger,
    /// The reference points that the journals of other killed jobs on the VM name.
    pub of_other_jobs: &'a [String],
    /// Whether the merge is waited for, within its limit.
    pub wait: bool,
}

impl Undo<'_> {
    /// Removes it.
    ///
    /// # Errors
    /// Only where the host cannot be asked what is there, or the ledger cannot be written; what it refuses to remove
    /// is in the answer.
    pub fn run(mut self, cancel: &CancelToken) -> Result<Undone> {
        let mut done = Undone::default();
        let job = self.journal.entry().job.clone();
        let mut state = JobState::of(self.journal.entry());
        match self.hyperv.host().vm(self.vm) {
            Ok(_) => {}
            // What the job made went with the VM, and is looked for where that comes up again; points are in the ledger.
            Err(HypervisorError::NotFound { .. }) => {
                done.elsewhere = state
                    .may_have_checkpoint()
                    .then(|| format!("{}: the VM is not there", kept(&job, &state)));
                return Ok(done);
            }
            Err(error) => return Err(error),
        }
        let snapshots = self.hyperv.host().snapshots(self.vm)?;
        let mut found = checkpoint::ours(self.hyperv, self.vm, &snapshots, &job, &state);
        if !state.is_of(self.hyperv.host().identity().as_deref()) {
            if found.ours.is_empty() && state.may_have_checkpoint() {
                // It did not come with the VM: this is its twin, or the job's own host has removed it since.
                done.elsewhere =
                    Some(format!("{}: no checkpoint of it is here", kept(&job, &state)));
                return Ok(done);
            }
            // What was there before, and when, was written down of the other host.
            (found.doubtful, found.unsettled) = (Vec::new(), false);
        }
        if found.is_unclear {
            steps::record(self.journal, &Step::Unclear)?;
        }
        if self.hyperv.options().only_backup_program {
            found.ours.append(&mut found.doubtful);
        }
        done.nameless = found.doubtful.into_iter().map(checkpoint::doubt).collect();
        done.unsettled = found.unsettled;
        let converted = found.ours.is_empty();
        for snapshot in found.ours {
            let id = &snapshot.settings.instance_id;
            if !state.snapshots.contains(id) {
                // When it is gone nothing tells that another one that appeared is not the one asked for.
                let step = Step::Checkpointed { snapshot: id.clone() };
                steps::record(self.journal, &step)?;
                state.add(step);
            }
            self.note_leaves(snapshot, &snapshots, &mut state)?;
            self.destroy_snapshot(snapshot, &mut done, cancel)?;
        }
        self.points(&state, converted, &mut done, cancel)?;
        done.merging = if self.wait {
            merge::wait(self.hyperv, self.vm, &state.leaves, cancel)?
        } else {
            merge::left(self.hyperv, self.vm, &state.leaves)?
        };
        Ok(done)
    }

    /// Writes down which files the VM writes to because of a checkpoint, where the job did not come to that: nobody can
    /// tell when it is gone.
    ///
    /// Where somebody has made a checkpoint since, a user or another product, the VM writes to that one's files and ours are
    /// held by it: those are not ours any more, and nothing is waited for.
    fn note_leaves(
        &mut self,
        snapshot: &SnapshotRecord,
        all: &[SnapshotRecord],
        state: &mut JobState,
    ) -> Result<()> {
        let made = checkpoint::created_s(snapshot);
        let is_later = |other: &SnapshotRecord| {
            other.settings.instance_id != snapshot.settings.instance_id
                && checkpoint::created_s(other) >= made
        };
        if !state.leaves.is_empty() || all.iter().any(is_later) {
            return Ok(());
        }
        let held = self.hyperv.host().disks(&snapshot.settings)?;
        let vm = self.hyperv.host().vm(self.vm)?;
        let live = self.hyperv.host().disks(&vm.settings)?;
        let leaves = merge::leaves(&live, &held);
        let step = Step::Frozen { leaves, tracking: state.tracking.clone() };
        steps::record(self.journal, &step)?;
        state.add(step);
        Ok(())
    }

    fn destroy_snapshot(
        &mut self,
        snapshot: &SnapshotRecord,
        done: &mut Undone,
        cancel: &CancelToken,
    ) -> Result<()> {
        let what = format!("checkpoint {:?}", snapshot.settings.name);
        let host = self.hyperv.host();
        let id = &snapshot.settings.instance_id;
        if let Err(error) = host.destroy_snapshot(snapshot, cancel) {
            // The answer may have been lost on its way, and not the call.
            if host.snapshots(self.vm)?.iter().any(|other| other.settings.instance_id == *id) {
                done.stuck.push(format!("{what}: {error}"));
                return Ok(());
            }
        }
        done.removed.push(what);
        steps::record(self.journal, &Step::Removed { snapshot: id.clone() })
    }

    fn points(
        &mut self,
        state: &JobState,
        converted: bool,
        done: &mut Undone,
        cancel: &CancelToken,
    ) -> Result<()> {
        if state.converting.is_none() && state.committed.is_none() {
            return Ok(());
        }
        let points = self.hyperv.host().reference_points(self.vm)?;
        let unheard = state.converting.as_ref().filter(|_| state.point.is_none());
        let host = self.hyperv.host();
        let made = unheard
            .and_then(|before| proof::point_of(host, self.vm, state, &points, before))
            .map(|point| point.instance_id.clone());
        let mut useless: Vec<String> = Vec::new();
        if let Some(before) = unheard.filter(|_| made.is_none() && converted) {
            useless = self.doubt(state, &points, before, done)?;
        }
        match (&state.point, &state.committed) {
            (point, Some((keep, destroy))) => {
                useless.extend(destroy.iter().cloned());
                // One whose making was not heard of is in no restore point.
                useless.extend(point.clone().or(made));
                useless.retain(|id| keep.as_ref().is_none_or(|keep| !same_point(keep, id)));
            }
            (Some(point), None) if self.fate == Fate::Told => useless.push(point.clone()),
            (Some(point), None) => self.keep(state, point)?,
            (None, None) => useless.extend(made),
        }
        for id in useless {
            match points.iter().find(|point| same_point(&point.instance_id, &id)) {
                Some(point) => self.destroy_point(point, done, cancel)?,
                None => {
                    let here = self.hyperv.host().identity();
                    self.ledger.remove_missing(&id, here.as_deref())?;
                }
            }
        }
        Ok(())
    }

    /// Tells of the points that may be what became of the checkpoint, or answers with them where nobody else makes any. At
    /// the first look they are written down: what appears later is another job's, or another program's.
    fn doubt(
        &mut self,
        state: &JobState,
        points: &[ReferencePointRecord],
        before: &[String],
        done: &mut Undone,
    ) -> Result<Vec<String>> {
        let doubted = match &state.doubted {
            Some(doubted) => doubted.clone(),
            None => {
                let is_ours = |id: &str| {
                    self.ledger.all().any(|point| same_point(&point.id, id))
                        || points::is_among(id, self.of_other_jobs)
                };
                let ids = points.iter().map(|point| &point.instance_id);
                let new = ids.filter(|id| !points::is_among(id, before) && !is_ours(id));
                let new: Vec<String> = new.cloned().collect();
                steps::record(self.journal, &Step::Doubted { points: new.clone() })?;
                done.is_new_doubt = true;
                new
            }
        };
        let ids = points.iter().map(|point| &point.instance_id);
        let left = ids.filter(|id| points::is_among(id, &doubted));
        if self.hyperv.options().only_backup_program {
            return Ok(left.cloned().collect());
        }
        done.doubtful.extend(left.map(|id| {
            format!(
                "reference point {id} appeared while a killed job converted its checkpoint; it may be another program's, so it \
                 is left alone; it holds no data; if no other program backs up the VM, say so (--only-backup-program)"
            )
        }));
        Ok(Vec::new())
    }

    /// Keeps a point until it is known whether a restore point names it.
    fn keep(&mut self, state: &JobState, point: &str) -> Result<()> {
        self.ledger.add(OwnPoint {
            id: point.to_owned(),
            lineage: state.lineage.clone(),
            job: self.journal.entry().job.to_string(),
            host: state.host.clone(),
        })
    }

    fn destroy_point(
        &mut self,
        point: &ReferencePointRecord,
        done: &mut Undone,
        cancel: &CancelToken,
    ) -> Result<()> {
        match destroy_point(self.hyperv, point, cancel)? {
            None => {
                done.removed.push(format!("reference point {}", point.instance_id));
                self.ledger.remove(&point.instance_id)
            }
            Some(error) => {
                done.points_left.push(format!("reference point {}: {error}", point.instance_id));
                Ok(())
            }
        }
    }
}

/// Destroys a reference point of ours. Answers with why it is still there.
///
/// # Errors
/// Where the host cannot be asked whether it is.
pub(crate) fn destroy_point(
    hyperv: &HypervHypervisor,
    point: &ReferencePointRecord,
    cancel: &CancelToken,
) -> Result<Option<HypervisorError>> {
    let host = hyperv.host();
    let Err(error) = host.destroy_reference_point(point, cancel) else {
        return Ok(None);
    };
    let points = host.reference_points(point.vm)?;
    let is_there = points.iter().any(|other| same_point(&other.instance_id, &point.instance_id));
    Ok(is_there.then_some(error))
}

/// What is told of a job whose journal is kept.
fn kept(job: &JobId, state: &JobState) -> String {
    let host = state.host.as_deref().unwrap_or("this host");
    format!(
        "the journal of job {job}, which may have left a checkpoint on {host}, is kept until that is found (vmtide doctor \
         on {host}, or on the host that the VM has moved to)"
    )
}
