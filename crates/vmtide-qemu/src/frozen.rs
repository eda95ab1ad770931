//! All disks of a running VM at one moment.

use crate::moment::{self, Method};
use crate::session::Session;
use crate::watch::ScratchWatch;
use vmtide_hypervisor::{Consistency, FrozenDisk, FrozenVm, HypervisorError, Result, VmConfig};

/// What [`QemuVm`](crate::QemuVm) freezes.
pub(crate) struct FrozenQemu {
    pub config: VmConfig,
    pub consistency: Consistency,
    pub downgrade: Option<String>,
    pub warnings: Vec<String>,
    pub disks: Vec<FrozenDisk>,
    pub watch: Option<ScratchWatch>,
    pub method: Method,
    pub session: Option<Session>,
}

impl FrozenQemu {
    /// Stops reading and watching, and hands out the session.
    fn close(&mut self) -> Result<Session> {
        self.watch = None;
        self.disks.clear();
        self.session
            .take()
            .ok_or_else(|| HypervisorError::failed("end the freeze", "it has ended before"))
    }
}

impl FrozenVm for FrozenQemu {
    fn config(&self) -> &VmConfig {
        &self.config
    }

    fn consistency(&self) -> Consistency {
        self.consistency
    }

    fn downgrade_reason(&self) -> Option<&str> {
        self.downgrade.as_deref()
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }

    fn check(&self) -> Result<()> {
        let session = self.session.as_ref();
        let session =
            session.ok_or_else(|| HypervisorError::failed("check the freeze", "it has ended"))?;
        moment::check(session, self.method)
    }

    fn commit(mut self: Box<Self>) -> Result<Vec<String>> {
        self.close()?.keep()
    }

    fn abort(mut self: Box<Self>) -> Result<()> {
        self.close()?.undo()
    }
}

impl Drop for FrozenQemu {
    fn drop(&mut self) {
        if let Ok(session) = self.close()
            && let Err(error) = session.undo()
        {
            tracing::error!(%error, "left for the next job to remove");
        }
    }
}
