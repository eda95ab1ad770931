//! The steps of a job on Hyper-V, as the journal keeps them: each is written down before it is taken, with what is
//! needed to find again what it made when nobody was there to hear the answer.

use crate::gates::OUR_NAME;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmtide_cim::ObjectPath;
use vmtide_hypervisor::{Journal, JournalEntry, Result};

/// A step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "step")]
pub(crate) enum Step {
    /// The job works on a VM.
    Begun {
        /// Its name, for people.
        vm: String,
        /// The lineage.
        lineage: String,
        /// The name of the host; none where it does not tell, or in journals of before it was kept.
        #[serde(default)]
        host: Option<String>,
    },
    /// A recovery checkpoint is about to be made.
    Checkpointing {
        /// The `InstanceID`s of all checkpoints that are there already.
        before: Vec<String>,
        /// The time by the host's clock, in seconds since 1970.
        at: i64,
    },
    /// The host makes it in a job of its own, whose results will name it.
    CheckpointJob {
        /// The job.
        job: ObjectPath,
    },
    /// More than one checkpoint has appeared, and the host's job does not name ours: that one of them is the only one left
    /// proves nothing any more.
    Unclear,
    /// The host has answered that it made none: what is not there yet will not come.
    Refused,
    /// It was made.
    Checkpointed {
        /// Its `InstanceID`.
        snapshot: String,
    },
    /// A checkpoint was removed, or is gone.
    Removed {
        /// Its `InstanceID`.
        snapshot: String,
    },
    /// Its disks are open.
    Frozen {
        /// The files that the VM writes to since; they vanish when they have been merged.
        leaves: Vec<String>,
        /// The ids that the frozen files say they were sealed under, where they do.
        tracking: Vec<String>,
    },
    /// The checkpoint is about to become a reference point.
    Converting {
        /// The `InstanceID`s of all reference points that are there already.
        before: Vec<String>,
    },
    /// The host converts it in a job of its own, whose results will name the reference point.
    ConvertJob {
        /// The job.
        job: ObjectPath,
    },
    /// It has become one.
    Converted {
        /// Its `InstanceID`.
        point: String,
    },
    /// The conversion was not heard of, and these reference points have appeared since it began, of which nothing proves whose
    /// they are. Those that appear later are not of this job.
    Doubted {
        /// Their `InstanceID`s.
        points: Vec<String>,
    },
    /// The restore point stands: older reference points of the lineage are of no more use.
    Committed {
        /// The reference points that the restore point names; none where it has no tracking.
        keep: Option<String>,
        /// Those to destroy.
        destroy: Vec<String>,
    },
    /// Everything but merging is done.
    Merging,
}

/// Writes a step down, before it is taken.
pub(crate) fn record(journal: &mut Journal, step: &Step) -> Result<()> {
    let value = serde_json::to_value(step).map_err(|error| {
        vmtide_hypervisor::HypervisorError::failed(
            "write a step of the job down",
            error.to_string(),
        )
    })?;
    journal.record(value)
}

/// The making of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Making {
    /// The checkpoints that were there before.
    pub before: Vec<String>,
    /// When it was asked for by the host's clock, in seconds since 1970.
    pub at: i64,
    /// The host's job, where it named one.
    pub job: Option<ObjectPath>,
    /// Whether nothing will come of it that is not there yet.
    pub settled: bool,
    /// Whether somebody has looked when there were several that it may have made.
    pub unclear: bool,
}

/// How far a job got, by its steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct JobState {
    /// The lineage.
    pub lineage: String,
    /// The host that the job worked on, where that is known.
    pub host: Option<String>,
    /// The makings of checkpoints of which none is known to have made one. More than one where the first was refused and a
    /// lesser one was tried.
    pub making: Vec<Making>,
    /// The checkpoints that were made.
    pub snapshots: Vec<String>,
    /// Those of them that are gone.
    pub removed: Vec<String>,
    /// The files that the VM writes to.
    pub leaves: Vec<String>,
    /// The ids of the frozen files.
    pub tracking: Vec<String>,
    /// The reference points that were there before the conversion, where it began.
    pub converting: Option<Vec<String>>,
    /// The host's job of the conversion, where it named one.
    pub convert_job: Option<ObjectPath>,
    /// All jobs of the host that were named to this job.
    pub jobs: Vec<ObjectPath>,
    /// The reference point that was made.
    pub point: Option<String>,
    /// The reference points that may be it, where it was not heard of and somebody has looked.
    pub doubted: Option<Vec<String>>,
    /// What the commit wants, where the restore point is known to stand.
    pub committed: Option<(Option<String>, Vec<String>)>,
}

impl JobState {
    /// Reads the steps of a journal. One that this version does not know is skipped: names still tell what is ours.
    pub fn of(entry: &JournalEntry) -> Self {
        let mut state = Self::default();
        for value in &entry.steps {
            match serde_json::from_value(value.clone()) {
                Ok(step) => state.add(step),
                Err(error) => tracing::warn!(%error, job = %entry.job, "an unknown step of a job"),
            }
        }
        state
    }

    /// Takes a step into account.
    pub fn add(&mut self, step: Step) {
        match step {
            Step::Begun { lineage, host, .. } => (self.lineage, self.host) = (lineage, host),
            Step::Checkpointing { before, at } => {
                self.making.push(Making { before, at, job: None, settled: false, unclear: false });
            }
            Step::CheckpointJob { job } => {
                self.jobs.push(job.clone());
                if let Some(making) = self.making.last_mut() {
                    making.job = Some(job);
                }
            }
            Step::Unclear => self.making.iter_mut().for_each(|making| making.unclear = true),
            Step::Refused => {
                if let Some(making) = self.making.last_mut() {
                    making.settled = true;
                }
            }
            Step::Checkpointed { snapshot } => {
                // Earlier tries were refused: what appeared meanwhile is another program's.
                self.making.clear();
                self.snapshots.push(snapshot);
            }
            Step::Removed { snapshot } => self.removed.push(snapshot),
            Step::Frozen { leaves, tracking } => (self.leaves, self.tracking) = (leaves, tracking),
            Step::Converting { before } => self.converting = Some(before),
            Step::ConvertJob { job } => {
                self.jobs.push(job.clone());
                self.convert_job = Some(job);
            }
            Step::Converted { point } => self.point = Some(point),
            Step::Doubted { points } => self.doubted = Some(points),
            Step::Committed { keep, destroy } => self.committed = Some((keep, destroy)),
            Step::Merging => {}
        }
    }

    /// Whether a checkpoint of the job may stand: one was asked for, and what is written down does not say that none
    /// came of it, that it was removed, or that it became a reference point.
    pub fn may_have_checkpoint(&self) -> bool {
        let is_open = self.making.iter().any(|making| !making.settled);
        is_open
            || self.point.is_none() && self.snapshots.iter().any(|id| !self.removed.contains(id))
    }

    /// Whether the job worked on this host, as far as is known.
    pub fn is_of(&self, host: Option<&str>) -> bool {
        is_same_host(self.host.as_deref(), host)
    }
}

/// Whether two names of hosts are of one host; so is one that is not known.
pub(crate) fn is_same_host(one: Option<&str>, other: Option<&str>) -> bool {
    one.zip(other).is_none_or(|(one, other)| one.eq_ignore_ascii_case(other))
}

/// The name that a checkpoint of ours gets, so that an administrator recognises a leftover.
pub(crate) fn checkpoint_name(job: &str) -> String {
    format!("{OUR_NAME}{job}")
}

/// Names a VM to the journal and the lock, wherever it runs: the line of its jobs follows it from host to host.
pub(crate) fn target_of(vm: Uuid) -> String {
    format!("hyper-v:{vm}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gates::job_of_checkpoint;
    use vmtide_hypervisor::JobId;

    #[test]
    fn a_state_is_read_back_from_a_journal() {
        let directory = tempfile::tempdir().unwrap();
        let target = target_of(Uuid::nil());
        let mut journal = Journal::begin(directory.path(), JobId::random(), &target).unwrap();
        let job = ObjectPath::new("Msvm_ConcreteJob", &[("InstanceID", "j")]);
        for step in [
            Step::Begun { vm: "web".into(), lineage: "l".into(), host: Some("hv1".into()) },
            Step::Checkpointing { before: vec!["a".into()], at: 5 },
            Step::Refused,
            Step::Checkpointing { before: vec!["b".into()], at: 7 },
            Step::Checkpointed { snapshot: "c".into() },
            Step::Removed { snapshot: "c".into() },
            Step::Frozen { leaves: vec!["f".into()], tracking: vec!["t".into()] },
            Step::Converting { before: vec![] },
            Step::ConvertJob { job: job.clone() },
            Step::Doubted { points: vec!["d".into()] },
            Step::Converted { point: "p".into() },
            Step::Committed { keep: Some("p".into()), destroy: vec!["o".into()] },
            Step::Merging,
        ] {
            record(&mut journal, &step).unwrap();
        }
        journal.record(serde_json::json!({"step": "of-the-future"})).unwrap();
        let read = Journal::leftovers(directory.path(), &target).unwrap();
        let expected = JobState {
            lineage: "l".into(),
            host: Some("hv1".into()),
            making: Vec::new(),
            snapshots: vec!["c".into()],
            removed: vec!["c".into()],
            leaves: vec!["f".into()],
            tracking: vec!["t".into()],
            converting: Some(vec![]),
            convert_job: Some(job.clone()),
            jobs: vec![job],
            point: Some("p".into()),
            doubted: Some(vec!["d".into()]),
            committed: Some((Some("p".into()), vec!["o".into()])),
        };
        assert_eq!(JobState::of(read[0].entry()), expected);
    }

    #[test]
    fn what_may_stand_on_a_host_is_told_by_the_steps() {
        let state = |steps: &[Step]| {
            let mut state = JobState::default();
            steps.iter().cloned().for_each(|step| state.add(step));
            state
        };
        let making = Step::Checkpointing { before: vec![], at: 5 };
        let made = Step::Checkpointed { snapshot: "c".into() };
        let removed = Step::Removed { snapshot: "c".into() };
        let converted = Step::Converted { point: "p".into() };
        let begun = Step::Begun { vm: "w".into(), lineage: "l".into(), host: Some("HV1".into()) };
        for (steps, may) in [
            (vec![begun.clone()], false),
            (vec![making.clone()], true),
            (vec![making.clone(), Step::Refused], false),
            (vec![making.clone(), made.clone()], true),
            (vec![making.clone(), made.clone(), removed], false),
            (vec![making, made, converted], false),
        ] {
            assert_eq!(state(&steps).may_have_checkpoint(), may, "{steps:?}");
        }
        let state = state(&[begun]);
        assert!(state.is_of(Some("hv1")) && state.is_of(None) && !state.is_of(Some("hv2")));
        // As it was written before the host was kept.
        let older: Step =
            serde_json::from_str(r#"{"step":"begun","vm":"w","lineage":"l"}"#).unwrap();
        assert_eq!(older, Step::Begun { vm: "w".into(), lineage: "l".into(), host: None });
    }

    #[test]
    fn only_our_names_are_ours() {
        let job = JobId::random();
        assert_eq!(job_of_checkpoint(&checkpoint_name(job.as_str())), Some(job.as_str()));
        for name in [
            "vmtide",
            "vmtide x",
            "vmtide 0123456789ABCDEF",
            "my vmtide 0123456789abcdef",
            "web - Backup",
        ] {
            assert_eq!(job_of_checkpoint(name), None, "{name}");
        }
    }
}
