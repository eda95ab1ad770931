//! The backup cycle of a VM on Hyper-V.
//!
//! ```text
//! lock ─► reap ─► gates ─► recovery checkpoint ─► frozen disks ─► changes ─► (read) ─► check
//!      ─► convert to a reference point ─► (commit the restore point) ─► destroy the older point ─► wait for the merge
//! ```
//!
//! What must hold, and where it is kept:
//! - Nothing is made that is not in the journal before, with what finds it again when its maker did not live to hear
//!   the answer ([`steps`]); one procedure removes it, for an abort, a commit and a reaping alike ([`undo`]).
//! - What is not surely ours is never touched: a checkpoint is ours by the journal, its name or what the host tells of the
//!   job that made it, a reference point by the journal, the [`ledger`], the ids that our own frozen files had, or our
//!   checkpoint that it was ([`proof`]), or because the administrator says that nobody else makes any
//!   ([`HypervOptions::only_backup_program`]).
//! - Any doubt about changes is a reason to read that disk in full ([`disks`], [`changes`], [`token`], [`points`]).
//! - The older reference point is destroyed only after the restore point that replaces it stands. Where a job was
//!   killed between the two, both points are kept until a later restore point tells which one it was ([`undo`]).

mod changes;
mod checkpoint;
mod describe;
mod device;
mod disks;
mod exclusions;
mod freeze;
mod frozen;
mod gate;
mod ledger;
mod line;
mod merge;
mod points;
mod proof;
mod reap;
mod steps;
mod time;
mod token;
mod undo;

pub(crate) use changes::changed_since;
pub(crate) use ledger::Ledger;
pub(crate) use line::Line;
pub(crate) use points::same_point;
pub(crate) use steps::target_of as lock_key;
pub(crate) use time::seconds_of;
pub(crate) use token::{BaseToken, FileFacts, order_doubt};

use crate::{BackupType, Host, HostFiles, HypervRestorer, VmRecord, select};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::CancelToken;
use vmtide_cim::CimInstance;
use vmtide_hypervisor::{
    FreezeRequest, FrozenVm, HealthCheck, Hypervisor, HypervisorError, JobId, ReapReport, Result,
    VmConfig, VmLock, VmRestorer, VmSelector, VmSummary,
};

/// How long a job waits for the merge of its own disks, in milliseconds. Whoever waits longer keeps others waiting for
/// a place; a merge that lasts is looked after by the next job on the VM.
pub const DEFAULT_MERGE_WAIT_MS: u64 = 5 * 60 * 1000;

/// How backups of a host's VMs are made.
#[derive(Clone, Debug)]
pub struct HypervOptions {
    /// Where locks, journals and the list of our reference points are kept. All jobs on a VM must share it, or they
    /// know each other only by the names of checkpoints.
    pub state_directory: PathBuf,
    /// What VSS tells the applications in the guest.
    pub backup_type: BackupType,
    /// How long a job waits for its disks to be merged, in milliseconds.
    pub merge_wait_ms: u64,
    /// Whether somebody who knows says that nothing else makes recovery checkpoints or reference points of these VMs: neither
    /// another backup program nor a vmtide with another state directory. What appeared while a job of ours asked for one is
    /// then ours, and is removed, also where nothing that the host tells proves it. False by default: were it wrong, another
    /// program's backup could fail, or have to read in full.
    pub only_backup_program: bool,
}

impl HypervOptions {
    /// The defaults, with the state in this directory.
    pub fn new(state_directory: impl Into<PathBuf>) -> Self {
        Self {
            state_directory: state_directory.into(),
            backup_type: BackupType::default(),
            merge_wait_ms: DEFAULT_MERGE_WAIT_MS,
            only_backup_program: false,
        }
    }
}

/// The VMs of a Hyper-V host as a source of backups. Clones share the connections.
#[derive(Clone)]
pub struct HypervHypervisor {
    inner: Arc<Inner>,
}

struct Inner {
    host: Host,
    files: Arc<dyn HostFiles>,
    options: HypervOptions,
}

impl fmt::Debug for HypervHypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HypervHypervisor")
            .field("host", self.host())
            .field("options", self.options())
            .finish_non_exhaustive()
    }
}

impl HypervHypervisor {
    /// A host by its two ways: control and files. Nothing is asked yet.
    pub fn new(host: Host, files: Arc<dyn HostFiles>, options: HypervOptions) -> Self {
        Self { inner: Arc::new(Inner { host, files, options }) }
    }

    /// The host.
    pub fn host(&self) -> &Host {
        &self.inner.host
    }

    /// Its files.
    pub fn files(&self) -> &dyn HostFiles {
        self.inner.files.as_ref()
    }

    /// How backups are made.
    pub fn options(&self) -> &HypervOptions {
        &self.inner.options
    }

    /// Takes the lock of a VM, which is the same on whatever host it runs.
    fn lock(&self, name: &str, vm: Uuid, job: &JobId) -> Result<VmLock> {
        VmLock::acquire(&self.options().state_directory, name, &steps::target_of(vm), job)
    }

    /// The VMs that are wanted by name, id and settings; also those that cannot be read, with the reason.
    fn summaries(
        &self,
        is_wanted: impl Fn(&str, Option<String>, &CimInstance) -> bool,
    ) -> Result<Vec<VmSummary>> {
        let (vms, unreadable) = self.host().all_vms()?;
        let mut found = Vec::new();
        for vm in &vms {
            if is_wanted(&vm.name, Some(vm.id.to_string()), &vm.settings.instance) {
                found.push(self.summary(vm)?);
            }
        }
        for vm in unreadable {
            let id = vm.id.map(|id| id.to_string());
            if is_wanted(&vm.name, id.clone(), &vm.settings) {
                found.push(VmSummary::unreadable(vm.name, id, &vm.error.to_string()));
            }
        }
        found.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
        Ok(found)
    }

    fn summary(&self, vm: &VmRecord) -> Result<VmSummary> {
        let (name, id) = (vm.name.clone(), Some(vm.id.to_string()));
        let disks = match self.host().disks(&vm.settings) {
            Ok(disks) => disks,
            Err(error) if is_of_connection(&error) => return Err(error),
            Err(error) => return Ok(VmSummary::unreadable(name, id, &error.to_string())),
        };
        Ok(VmSummary {
            name,
            id,
            state: describe::state_word(vm.state).into(),
            disks: disks.iter().filter(|disk| !disk.pass_through).count(),
        })
    }

    fn reap_all(&self, orphans: bool) -> Result<ReapReport> {
        let inner = &self.inner;
        let state = &inner.options.state_directory;
        let restorer = HypervRestorer::new(inner.host.clone(), inner.files.clone(), state);
        let restores = restorer.reap_restores();
        let mut report = self.reap_host(orphans, &CancelToken::new())?;
        let restores = restores?;
        report.removed.extend(restores.removed);
        report.in_use.extend(restores.in_use);
        report.notes.extend(restores.notes);
        Ok(report)
    }
}

/// Whether an error is none of the one VM that was asked for.
fn is_of_connection(error: &HypervisorError) -> bool {
    matches!(
        error,
        HypervisorError::Unreachable { .. }
            | HypervisorError::Timeout { .. }
            | HypervisorError::Denied { .. }
    )
}

impl Hypervisor for HypervHypervisor {
    fn list(&self) -> Result<Vec<VmSummary>> {
        self.summaries(|_, _, _| true)
    }

    fn describe(&self, vm: &str) -> Result<VmConfig> {
        let vm = self.host().find(vm)?;
        self.describe_vm(&vm)
    }

    fn freeze(&self, request: &FreezeRequest) -> Result<Box<dyn FrozenVm>> {
        self.freeze_vm(request)
    }

    fn has_lasting_ids(&self) -> bool {
        true
    }

    fn select(&self, selector: &VmSelector) -> Result<Vec<VmSummary>> {
        self.summaries(|name, id, settings| {
            selector.matches(name, id.as_deref(), &select::tags_of(settings))
        })
    }

    fn reap(&self) -> Result<ReapReport> {
        self.reap_all(false)
    }

    fn reap_orphans(&self) -> Result<ReapReport> {
        self.reap_all(true)
    }

    fn examine(&self, vm: Option<&str>) -> Vec<HealthCheck> {
        crate::doctor::examine(self.host(), Some(self.files()), vm)
    }
}
