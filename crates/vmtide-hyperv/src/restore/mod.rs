//! Restoring VMs to Hyper-V.
//!
//! ```text
//! new VM:    lock name ─► reap ─► checks ─► journal ─► directory, mark, disks ─► (write) ─►
//!            import and adapt (exact) or define and equip (portable) ─► name it ─► tidy up ─► start
//! in place:  lock VM ─► checks ─► changes ─► journal, mark, rename ─► forget tracking ─► (write) ─►
//!            unmark ─► start
//! ```
//!
//! What must hold, and where it is kept:
//! - A VM has its own name only when it is complete ([`journal`]); before, its directory holds a file that
//!   says so to people. Everything is written down before it is made, and one procedure undoes it, for a
//!   failure, an abort and a reaping alike ([`undo`]).
//! - Nothing that exists is replaced: the name, the id and the directory of a new VM must be free
//!   ([`new_vm`]).
//! - A VM that comes back is off and disconnected, unless asked otherwise ([`network`]).
//! - What was written into a disk without the host's knowledge is in no tracking of the host. So tracking
//!   that began before is destroyed before the first byte is written, and the next backup reads the disk in
//!   full ([`in_place`]); a new disk has no tracking yet, and the same follows. What is read is known to
//!   the repository by content and is not stored again.

mod boot;
mod exact;
mod hardware;
mod host_path;
mod in_place;
mod journal;
mod layout;
mod management;
mod native;
mod network;
mod new_vm;
mod outdated;
mod pairing;
mod portable;
mod tracking;
mod typed;
mod undo;

pub(crate) use outdated::{OutdatedPoints, outdated_points};

use crate::{Host, HostFiles, VmRecord};
use journal::{Leftover, Step};
use management::Management;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::CancelToken;
use vmtide_hypervisor::{
    HypervisorError, InPlaceRequest, NewVmRequest, ReapReport, RestoringVm, Result, VmRestorer,
};

/// How long after a restore was given up it is looked for what the host makes all the same, in seconds: far
/// longer than any of its jobs takes. A look costs three queries.
const LOOKED_FOR_S: i64 = 24 * 3600;

/// A Hyper-V host as a place to restore VMs to. Clones share the connections.
#[derive(Clone)]
pub struct HypervRestorer {
    inner: Arc<Inner>,
}

struct Inner {
    host: Host,
    files: Arc<dyn HostFiles>,
    state_directory: PathBuf,
}

impl fmt::Debug for HypervRestorer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HypervRestorer").field("host", &self.inner.host).finish_non_exhaustive()
    }
}

impl HypervRestorer {
    /// A host by its two ways, control and files, with the directory of locks and journals, which is that
    /// of backups. Nothing is asked yet.
    pub fn new(host: Host, files: Arc<dyn HostFiles>, state_directory: impl Into<PathBuf>) -> Self {
        Self { inner: Arc::new(Inner { host, files, state_directory: state_directory.into() }) }
    }

    /// The host.
    pub fn host(&self) -> &Host {
        &self.inner.host
    }

    fn files(&self) -> &dyn HostFiles {
        self.inner.files.as_ref()
    }

    /// Undoes what killed restores left, but for the VM whose lock the caller holds as `held`, which is
    /// undone without locking it again.
    fn reap_all(&self, held: Option<&str>) -> Result<ReapReport> {
        let state = &self.inner.state_directory;
        let leftovers = journal::leftovers(state, self.host().peer(), held)?;
        let mut report = ReapReport { in_use: leftovers.in_use, ..ReapReport::default() };
        let is_alone = report.in_use.is_empty();
        let mut failed = None;
        for leftover in leftovers.jobs {
            // What a job that was given up may have left is told by ids that a living one may use as well.
            if !is_alone && journal::given_up_at(&leftover.steps).is_some() {
                continue;
            }
            if let Err(error) = self.reap_one(leftover, &mut report) {
                failed = failed.or(Some(error));
            }
        }
        failed.map_or(Ok(report), Err)
    }

    fn reap_one(&self, mut leftover: Leftover, report: &mut ReapReport) -> Result<()> {
        // A cancelled job must not keep what it left from being removed.
        let cancel = CancelToken::new();
        let management = Management::of(self.host(), &cancel)?;
        if in_place::is_unfinished(self.host(), self.files(), &leftover.steps)? {
            // Only the same restore, run again, makes that VM whole.
            report.in_use.push(format!("{} (restored in place, not finished)", leftover.name));
            return Ok(());
        }
        let job = leftover.journal.entry().job.clone();
        let undone = undo::undo(&management, self.files(), &job, &leftover.steps)?;
        report.removed.extend(undone.removed);
        report.removed.extend(undone.left);
        let now_s = self.host().options().clock.unix_s();
        match journal::given_up_at(&leftover.steps) {
            // The host may still be at it.
            Some(since_s) if (since_s..since_s.saturating_add(LOOKED_FOR_S)).contains(&now_s) => {
                Ok(())
            }
            None if !undone.is_complete && leftover.steps.contains(&Step::Registering) => {
                leftover.give_up(now_s)
            }
            _ => leftover.journal.finish(),
        }
    }
}

impl VmRestorer for HypervRestorer {
    fn begin(&self, request: &NewVmRequest) -> Result<Box<dyn RestoringVm>> {
        Ok(Box::new(new_vm::begin(self, request)?))
    }

    fn begin_in_place(&self, request: &InPlaceRequest) -> Result<Box<dyn RestoringVm>> {
        Ok(Box::new(in_place::begin(self, request)?))
    }

    fn reap_restores(&self) -> Result<ReapReport> {
        self.reap_all(None)
    }
}

/// What is known of restores of a VM.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Completeness {
    /// None was left in the middle.
    Complete,
    /// One was.
    Incomplete,
    /// Nothing says so, but these directories may not be listed, in which a mark may lie.
    NotSeen(Vec<String>),
}

/// Whether a VM's name, a file beside its disks, or the journal of a killed job says that a restore of it was not
/// finished.
///
/// # Errors
/// Where the host cannot be asked for its disks, or their directories cannot be listed for another reason than a
/// lacking right.
pub(crate) fn completeness(
    host: &Host,
    files: &dyn HostFiles,
    state_directory: &Path,
    vm: &VmRecord,
) -> Result<Completeness> {
    if is_named_incomplete(vm) {
        return Ok(Completeness::Incomplete);
    }
    let (is_marked, not_seen) = in_place::look_for_mark(host, files, vm)?;
    Ok(if is_marked {
        Completeness::Incomplete
    } else if not_seen.is_empty() {
        Completeness::Complete
    } else if in_place::is_journalled(state_directory, host.peer(), vm.id)? {
        Completeness::Incomplete
    } else {
        Completeness::NotSeen(not_seen)
    })
}

/// Whether a VM's name, or a file beside its disks, says that a restore of it was not finished.
///
/// # Errors
/// Where the host cannot be asked for its disks, or their directories cannot be listed.
pub(crate) fn is_incomplete(host: &Host, files: &dyn HostFiles, vm: &VmRecord) -> Result<bool> {
    Ok(is_named_incomplete(vm) || in_place::has_mark(host, files, vm)?)
}

fn is_named_incomplete(vm: &VmRecord) -> bool {
    journal::is_temporary_name(&vm.name) || vm.name.ends_with(in_place::SUFFIX)
}

/// Whether a VM of this name is one that a restore of vmtide's, here or on another machine, is making or has left.
pub(crate) fn is_being_restored(vm: &VmRecord) -> bool {
    journal::is_temporary_name(&vm.name)
}

/// An error that says what cannot be and what to do instead.
fn refused(what: impl Into<String>, detail: impl Into<String>) -> HypervisorError {
    HypervisorError::failed(what, detail)
}
