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
    /// The host has answered that it made none: what is not there yet will not come.
    Refused,
    /// It was made.
    Checkpointed {
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
}

/// How far a job got, by its steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct JobState {
    /// The lineage.
    pub lineage: String,
    /// The makings of checkpoints of which none is known to have made one. More than one where the first was refused and a
    /// lesser one was tried.
    pub making: Vec<Making>,
    /// The checkpoints that were made.
    pub snapshots: Vec<String>,
    /// The files that the VM writes to.
    pub leaves: Vec<String>,
    /// The ids of the frozen files.
    pub tracking: Vec<String>,
    /// The reference points that were there before the conversion, where it began.
    pub converting: Option<Vec<String>>,
    /// The host's job of the conversion, where it named one.
    pub convert_job: Option<ObjectPath>,
    /// The reference point that was made.
    pub point: Option<String>,
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
            Step::Begun { lineage, .. } => self.lineage = lineage,
            Step::Checkpointing { before, at } => {
                self.making.push(Making { before, at, job: None, settled: false });
            }
            Step::CheckpointJob { job } => {
                if let Some(making) = self.making.last_mut() {
                    making.job = Some(job);
                }
            }
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
            Step::Frozen { leaves, tracking } => (self.leaves, self.tracking) = (leaves, tracking),
            Step::Converting { before } => self.converting = Some(before),
            Step::ConvertJob { job } => self.convert_job = Some(job),
            Step::Converted { point } => self.point = Some(point),
            Step::Committed { keep, destroy } => self.committed = Some((keep, destroy)),
            Step::Merging => {}
        }
    }
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
            Step::Begun { vm: "web".into(), lineage: "l".into() },
            Step::Checkpointing { before: vec!["a".into()], at: 5 },
            Step::Refused,
            Step::Checkpointing { before: vec!["b".into()], at: 7 },
            Step::Checkpointed { snapshot: "c".into() },
            Step::Frozen { leaves: vec!["f".into()], tracking: vec!["t".into()] },
            Step::Converting { before: vec![] },
            Step::ConvertJob { job: job.clone() },
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
            making: Vec::new(),
            snapshots: vec!["c".into()],
            leaves: vec!["f".into()],
            tracking: vec!["t".into()],
            converting: Some(vec![]),
            convert_job: Some(job),
            point: Some("p".into()),
            committed: Some((Some("p".into()), vec!["o".into()])),
        };
        assert_eq!(JobState::of(read[0].entry()), expected);
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
