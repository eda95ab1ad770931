//! What a restore makes on a host, written down before it is made.
//!
//! A VM that is being restored is called `vmtide restore JOB` on the host until it is complete; giving it
//! its own name is the last step and the one that counts. So whatever the journal cannot know (an answer
//! that was lost, a process that was killed between a call and its record) is found by that name. Only a
//! VM just imported has its old name for a moment; see [`super::undo`].

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_hypervisor::{HypervisorError, JobId, Journal, Result, VmLock};

/// The beginning of the names of VMs that are not complete.
const TEMPORARY: &str = "vmtide restore ";

/// The name of a VM that `job` is restoring.
pub(super) fn temporary_name(job: &JobId) -> String {
    format!("{TEMPORARY}{job}")
}

/// Whether a name is one of those: nobody may call a VM so.
pub(super) fn is_temporary_name(name: &str) -> bool {
    name.get(..TEMPORARY.len()).is_some_and(|start| start.eq_ignore_ascii_case(TEMPORARY))
}

/// One step. Names of fields are read by later versions: they only get more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub(super) enum Step {
    /// A restore of the VM `name` begins.
    Begin {
        /// The name it is to have.
        name: String,
    },
    /// A directory may be made.
    Directory {
        /// Where.
        path: String,
        /// Whether it goes when all is done too.
        temporary: bool,
    },
    /// A file may be made. It did not exist.
    File {
        /// Where.
        path: String,
        /// Whether it goes when all is done too.
        temporary: bool,
    },
    /// The host is asked for a VM from here on: it may go on when nobody waits any more.
    Registering,
    /// A VM may be planned by an import.
    Import {
        /// The planned VMs that there are.
        before: Vec<Uuid>,
        /// The id it will have, where it keeps its own.
        keeps_id: Option<Uuid>,
        /// The disks that its configuration names: an import has these until it is changed.
        disks: Vec<String>,
        /// Where it is imported from.
        directory: String,
    },
    /// This VM, planned or not, is ours.
    System {
        /// Its id.
        id: Uuid,
    },
    /// The VM is complete and may get its name.
    Commit {
        /// Its id.
        id: Uuid,
    },
    /// All was undone, and the host may still be at something that it was asked for: what comes of that is looked
    /// for by the VM's name and id. Files and directories of steps before this are no longer ours.
    GivenUp {
        /// When, in seconds since 1970 by this machine's clock.
        unix_s: i64,
    },
    /// The disks of a VM may be changed in place: what stands there is neither what it was nor what it
    /// is to be.
    InPlace {
        /// Its id.
        id: Uuid,
        /// The files of the disks that are written; none in the journals of versions that did not say.
        #[serde(default)]
        files: Vec<String>,
    },
}

/// The journal of one restore, with the locks on what it restores.
#[derive(Debug)]
pub(super) struct RestoreJournal {
    journal: Journal,
    _locks: Vec<VmLock>,
}

impl RestoreJournal {
    /// Begins the journal under the locks that the caller took, that of `name` among them.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn begin(
        state: &Path,
        job: &JobId,
        peer: &str,
        name: &str,
        locks: Vec<VmLock>,
    ) -> Result<Self> {
        let journal = Journal::begin(state, job.clone(), &target_of(peer))?;
        let mut journal = Self { journal, _locks: locks };
        journal.record(&Step::Begin { name: name.to_owned() })?;
        Ok(journal)
    }

    /// Writes a step down, before it is taken.
    ///
    /// # Errors
    /// Where that fails: then the step must not be taken.
    pub fn record(&mut self, step: &Step) -> Result<()> {
        record(&mut self.journal, step)
    }

    /// The steps so far.
    pub fn steps(&self) -> Vec<Step> {
        read_steps(&self.journal)
    }

    /// The job.
    pub fn job(&self) -> &JobId {
        &self.journal.entry().job
    }

    /// Everything is done or undone.
    ///
    /// # Errors
    /// Where the file cannot be removed.
    pub fn finish(self) -> Result<()> {
        self.journal.finish()
    }
}

/// When a job was given up, where it was; the steps before that are of no use for files any more.
pub(super) fn given_up_at(steps: &[Step]) -> Option<i64> {
    steps.iter().rev().find_map(|step| match step {
        Step::GivenUp { unix_s } => Some(*unix_s),
        _ => None,
    })
}

/// What a killed restore left: its journal, under the lock now.
///
/// # Errors
/// Where the state directory cannot be read or locked.
pub(super) fn leftovers(state: &Path, peer: &str, held: Option<&str>) -> Result<Leftovers> {
    let mut found = Leftovers::default();
    let mut locks: BTreeMap<String, Arc<VmLock>> = BTreeMap::new();
    for journal in Journal::leftovers(state, &target_of(peer))? {
        let steps = read_steps(&journal);
        let name = steps.iter().find_map(|step| match step {
            Step::Begin { name } => Some(name.clone()),
            _ => None,
        });
        let name = name.unwrap_or_default();
        let key = name.to_lowercase();
        // The lock of a name that the caller itself holds: nobody else works on it.
        let is_held = held.is_some_and(|held| held.to_lowercase() == key);
        let lock = match locks.get(&key) {
            _ if is_held => None,
            // Several jobs of one name.
            Some(lock) => Some(Arc::clone(lock)),
            None => match lock_name(state, peer, &name, &journal.entry().job) {
                Ok(lock) => {
                    let lock = Arc::new(lock);
                    locks.insert(key, Arc::clone(&lock));
                    Some(lock)
                }
                Err(HypervisorError::Busy { .. }) => {
                    found.in_use.push(name);
                    continue;
                }
                Err(error) => return Err(error),
            },
        };
        // Until the lock was taken its job may have ended well.
        let job = journal.entry().job.clone();
        let is_there = Journal::leftovers(state, &target_of(peer))?
            .iter()
            .any(|journal| journal.entry().job == job);
        if is_there {
            found.jobs.push(Leftover { journal, steps, name, _lock: lock });
        }
    }
    Ok(found)
}

/// What [`leftovers`] found.
#[derive(Default)]
pub(super) struct Leftovers {
    /// Those of killed jobs.
    pub jobs: Vec<Leftover>,
    /// The VMs that living jobs work on.
    pub in_use: Vec<String>,
}

/// The journal of a killed job.
pub(super) struct Leftover {
    pub journal: Journal,
    pub steps: Vec<Step>,
    /// The name the VM was to have.
    pub name: String,
    _lock: Option<Arc<VmLock>>,
}

impl Leftover {
    /// All was undone at `unix_s`, and the host may still be at something.
    ///
    /// # Errors
    /// Where that cannot be written.
    pub fn give_up(&mut self, unix_s: i64) -> Result<()> {
        record(&mut self.journal, &Step::GivenUp { unix_s })
    }
}

fn record(journal: &mut Journal, step: &Step) -> Result<()> {
    let value = serde_json::to_value(step).map_err(|error| {
        HypervisorError::failed("write the journal of a restore", error.to_string())
    })?;
    journal.record(value)
}

/// Takes the name of a VM to be restored on a host, for one job of this machine.
///
/// # Errors
/// [`HypervisorError::Busy`] where another restores it.
pub(super) fn lock_name(state: &Path, peer: &str, name: &str, job: &JobId) -> Result<VmLock> {
    let key = format!("restore {peer} {}", name.to_lowercase());
    VmLock::acquire(state, name, &key, job)
}

/// The target of journals of restores: those of backups are not ours to undo.
fn target_of(peer: &str) -> String {
    format!("restore to {peer}")
}

/// What can be read of the steps. One of a later version is skipped: that version's own kind of thing.
fn read_steps(journal: &Journal) -> Vec<Step> {
    let steps = journal.entry().steps.iter();
    steps.filter_map(|step| serde_json::from_value(step.clone()).ok()).collect()
}
