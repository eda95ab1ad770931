//! How a job tells its front end what it does. Jobs print nothing.

use serde::Serialize;
use vmtide_block::{CancelToken, Progress};
use vmtide_repo::{DiskCounts, ObjectId};

/// What happened in a job. The serialised form is what `--json` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// A step of the job begins.
    Phase {
        /// The step, e.g. `freeze`, `store`, `commit`.
        phase: Phase,
        /// What it is about, e.g. the VM; for people.
        detail: String,
    },
    /// Work on one disk begins.
    DiskStarted {
        /// The disk.
        disk: String,
        /// The bytes that will be looked at: the changes, or the whole disk.
        bytes: u64,
        /// Why the disk is read in full, where it is.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// One disk is stored.
    DiskFinished {
        /// The disk.
        disk: String,
        /// What was moved.
        #[serde(flatten)]
        counts: DiskCounts,
    },
    /// One restore point is copied.
    PointCopied {
        /// Its id in the repository it was copied from.
        from: ObjectId,
        /// Its id where it is now.
        point: ObjectId,
        /// Its VM.
        vm: String,
    },
    /// Something the user should know; the job goes on.
    Warning {
        /// One line.
        message: String,
    },
}

/// The steps of jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The VM is brought to its consistency and all its disks are fixed at one moment.
    Freeze,
    /// Disks are read and stored.
    Store,
    /// The restore point becomes visible.
    Commit,
    /// The VM is released: new tracking kept, old released, everything else removed.
    Release,
    /// No restore point came of it; everything made on the platform is undone.
    Abort,
    /// A place for what is restored is made ready.
    Prepare,
    /// Disks are written from a restore point.
    Restore,
    /// A VM is made of restored disks.
    Register,
    /// The repository is checked.
    Verify,
    /// What no restore point needs is removed.
    Prune,
    /// What is damaged is made right.
    Repair,
    /// A disk is copied into another image.
    Convert,
    /// Two disks are compared.
    Compare,
    /// The structure of an image is checked.
    Check,
    /// A part of the machine or of a store is measured.
    Measure,
    /// A layer of a chain is merged into another.
    Merge,
    /// A restore point is copied into another repository.
    Copy,
    /// A delta is made.
    Delta,
    /// A delta is applied to a disk.
    Apply,
}

/// Takes the events of a job, from one thread at a time.
pub trait Observer: Sync {
    /// Something happened. Called between steps, never in the hot path.
    fn event(&self, event: Event);
}

/// Takes no notice.
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _event: Event) {}
}

/// What every job is watched and stopped by.
#[derive(Clone, Copy)]
pub struct JobContext<'a> {
    /// Counters that the front end samples.
    pub progress: &'a Progress,
    /// Set by the front end to end the job early.
    pub cancel: &'a CancelToken,
    /// Takes the events.
    pub observer: &'a dyn Observer,
}

impl JobContext<'_> {
    pub(crate) fn phase(&self, phase: Phase, detail: impl Into<String>) {
        self.observer.event(Event::Phase { phase, detail: detail.into() });
    }

    pub(crate) fn warn(&self, warnings: &mut Vec<String>, message: impl Into<String>) {
        let message = message.into();
        // The observer shows it; the log has it for those who read only that.
        tracing::info!("{message}");
        self.observer.event(Event::Warning { message: message.clone() });
        warnings.push(message);
    }
}
