//! A VM that is restored to a Hyper-V host: its disks are made there, empty, get what comes from the volumes as it comes, and
//! become a VM, under its name, when all of them are whole. Before that it is not there, whatever happens.

use crate::object::{DiskSummary, PointObject};
use crate::{BackendError, BackendOptions, Result, names};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use vmtide_block::CancelToken;
use vmtide_engine::{VmTargetOptions, open_vm_target};
use vmtide_hypervisor::{
    DiskId, DiskToRestore, JobId, NetworkPlan, NewVmRequest, RestoreRoute, RestoredVm,
    RestoringDisk, RestoringVm, VmIdentity,
};

/// A VM in the making.
pub struct HostVm {
    vm: Box<dyn RestoringVm>,
    name: String,
    /// The disks of which something has come.
    begun: BTreeSet<DiskId>,
}

impl HostVm {
    /// Makes the empty disks of the VM that `point` describes on the host of `url`.
    ///
    /// # Errors
    /// Those of the host; nothing is left there then.
    pub fn begin(
        url: &str,
        point: &PointObject,
        options: &BackendOptions,
        state_directory: PathBuf,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let target = open_vm_target(
            url,
            &VmTargetOptions {
                hyperv: (options.hyperv)(url)?,
                agent: (options.agent)(url)?,
                state_directory,
                cancel: cancel.clone(),
            },
        )?;
        let name = target.name.unwrap_or_else(|| point.config.name.clone());
        let disk = |(id, disk): (&String, &DiskSummary)| DiskToRestore {
            id: DiskId(id.clone()),
            size_bytes: disk.size_bytes,
            data_bytes: None,
            // The next backup is of a disk that no earlier job has read.
            tracking: None,
        };
        let request = NewVmRequest {
            config: point.config.clone(),
            name: name.clone(),
            job: JobId::random(),
            disks: point.disks.iter().map(disk).collect(),
            identity: VmIdentity::Auto,
            route: RestoreRoute::Auto,
            directory: None,
            // It may come back beside its original.
            networks: NetworkPlan::default(),
            firmware: None,
            cancel: cancel.clone(),
        };
        let vm = target.restorer.begin(&request)?;
        Ok(Self { vm, name, begun: BTreeSet::new() })
    }

    /// What the user should know so far.
    pub fn warnings(&self) -> &[String] {
        self.vm.warnings()
    }

    /// The disk that Bacula calls `output`, and whether it holds nothing but zeros yet.
    ///
    /// # Errors
    /// Where the VM has none of that name.
    pub fn disk(&mut self, output: &Path) -> Result<(RestoringDisk, bool)> {
        let stem = output.file_stem().unwrap_or_default().to_string_lossy();
        let found = self.vm.disks().iter().find(|disk| names::component(&disk.id.0) == stem);
        let disk = found.cloned().ok_or_else(|| {
            BackendError::Refused(format!(
                "{}: no disk of {} in what the newest of the selected jobs says of the VM",
                output.display(),
                self.name
            ))
        })?;
        let is_new = self.begun.insert(disk.id.clone());
        Ok((disk, is_new))
    }

    /// All that was selected is there: makes the VM of it. Nobody may hold one of its disks any more.
    ///
    /// # Errors
    /// Where a disk has not come; those of the host. Nothing is left there then, or what [`abort`](Self::abort) tells.
    pub fn finish(self) -> Result<RestoredVm> {
        let all = self.vm.disks().iter().map(|disk| &disk.id);
        let missing: Vec<_> =
            all.filter(|id| !self.begun.contains(*id)).map(|id| id.0.clone()).collect();
        if missing.is_empty() {
            return Ok(self.vm.finish(false)?);
        }
        let refused = format!(
            "{}: a host gets all disks of a VM or none, and {} was not selected: mark all of its files, or restore to a \
             directory",
            self.name,
            missing.join(", ")
        );
        self.abort()?;
        Err(BackendError::Refused(refused))
    }

    /// Removes what was made.
    ///
    /// # Errors
    /// What could not be removed; the next backup of a VM on the host does it.
    pub fn abort(self) -> Result<()> {
        Ok(self.vm.abort()?)
    }
}
