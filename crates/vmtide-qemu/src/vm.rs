//! One running VM.

use crate::qmp::QmpClient;
use crate::{QemuTarget, cleanup, describe, inventory, names};
use std::time::Duration;
use vmtide_hypervisor::{
    FreezeRequest, FrozenVm, Hypervisor, HypervisorError, JobId, ReapReport, Result, VmConfig,
    VmSummary,
};

/// How long to wait for the monitor to greet. Longer only delays the news that another program
/// holds it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The VM of one QEMU process.
#[derive(Clone, Debug)]
pub struct QemuVm {
    target: QemuTarget,
}

impl QemuVm {
    /// The VM at `target`. Nothing is connected yet.
    pub fn new(target: QemuTarget) -> Self {
        Self { target }
    }

    /// What it was made from.
    pub fn target(&self) -> &QemuTarget {
        &self.target
    }

    pub(crate) fn connect(&self) -> Result<QmpClient> {
        Ok(QmpClient::connect(&self.target.qmp, CONNECT_TIMEOUT)?)
    }

    /// The name this VM goes by: as configured, as QEMU says, else after its socket.
    pub(crate) fn name(&self, qmp: &QmpClient) -> Result<String> {
        if let Some(name) = &self.target.name {
            return Ok(name.clone());
        }
        if let Some(name) = describe::name_of(qmp)? {
            return Ok(name);
        }
        Ok(match &self.target.qmp {
            crate::Address::Unix(path) => path
                .file_stem()
                .map_or_else(|| "qemu".into(), |stem| stem.to_string_lossy().into_owned()),
            crate::Address::Tcp(address) => address.clone(),
        })
    }

    /// Removes the tracking bitmaps of one lineage, or of all of ours, for a repository that is no
    /// longer used. The next backup of that lineage reads everything. Answers with their names.
    ///
    /// # Errors
    /// [`HypervisorError::Busy`] while a job runs; where QEMU refuses to remove one.
    pub fn end_tracking(&self, lineage: Option<&str>) -> Result<Vec<String>> {
        let _lock = self.lock(&JobId::random())?;
        let qmp = self.connect()?;
        self.reap_locked(&qmp)?;
        let mut removed = Vec::new();
        for (node, bitmaps) in cleanup::nodes_with_bitmaps(&qmp)? {
            for bitmap in bitmaps {
                let ours = names::parse_tracking(&bitmap.name)
                    .is_some_and(|name| lineage.is_none_or(|wanted| wanted == name.lineage));
                if ours {
                    let data = serde_json::json!({"node": node, "name": bitmap.name});
                    qmp.execute("block-dirty-bitmap-remove", data)?;
                    removed.push(format!("{} on {node}", bitmap.name));
                }
            }
        }
        Ok(removed)
    }

    fn summary(&self) -> Result<VmSummary> {
        let qmp = self.connect()?;
        Ok(VmSummary {
            name: self.name(&qmp)?,
            id: describe::uuid_of(&qmp)?,
            state: describe::state_of(&qmp)?,
            disks: inventory::take(&qmp)?.drives.len(),
        })
    }
}

impl Hypervisor for QemuVm {
    fn list(&self) -> Result<Vec<VmSummary>> {
        Ok(vec![self.summary()?])
    }

    /// The one VM, by any name.
    fn describe(&self, _vm: &str) -> Result<VmConfig> {
        let qmp = self.connect()?;
        let inventory = inventory::take(&qmp)?;
        Ok(describe::describe(&qmp, self.name(&qmp)?, &inventory)?)
    }

    fn freeze(&self, request: &FreezeRequest) -> Result<Box<dyn FrozenVm>> {
        self.freeze_vm(request)
    }

    fn reap(&self) -> Result<ReapReport> {
        match self.lock(&JobId::random()) {
            Ok(_lock) => {
                let report = self.reap_locked(&self.connect()?)?;
                Ok(ReapReport { removed: report.removed, ..ReapReport::default() })
            }
            Err(HypervisorError::Busy { vm, detail }) => {
                let in_use = vec![format!("{vm}: {detail}")];
                Ok(ReapReport { in_use, ..ReapReport::default() })
            }
            Err(error) => Err(error),
        }
    }
}
