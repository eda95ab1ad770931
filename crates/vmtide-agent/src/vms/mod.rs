//! The VMs of the host: listed, described, and frozen for clients.
//!
//! What knows the platform is a [`Hypervisor`], the same one that a backup on the host itself would use, with its
//! journal and its reaping; the agent adds what being asked over a network needs: whose freeze it is, how long it
//! lives when nobody asks for it any more, what a request means that is sent twice, and that only disks below the
//! configured roots leave the host. An agent whose host has no such platform answers that it is not supported.

mod freeze;
mod registry;

pub use registry::{BeginError, EndError, VmFreezes};

use crate::limits::Limits;
use crate::parents;
use crate::state::Shared;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_cim::Cim;
use vmtide_hypervisor::{DiskId, Hypervisor, HypervisorError, Result, VmConfig};

pub use freeze::VmDiskUse;

/// How a path is found on this host that the platform names.
pub type HostPath = Arc<dyn Fn(&str) -> PathBuf + Send + Sync>;

/// What an agent needs of the platform whose VMs it serves.
#[derive(Clone)]
pub struct VmPlatform {
    /// Its VMs. Its journal is the agent's.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Its management objects, for restores and examinations from elsewhere; none where that is not served.
    pub cim: Option<Arc<dyn Cim>>,
    /// How its paths are found; none where they are those of this host.
    pub host_path: Option<HostPath>,
}

/// The VMs of one agent.
pub struct Vms {
    platform: VmPlatform,
    /// Moments that are held.
    pub freezes: Arc<VmFreezes>,
}

impl Vms {
    /// The VMs of `platform`; none is frozen yet.
    pub fn new(platform: VmPlatform, limits: &Limits) -> Self {
        let freezes = VmFreezes::new(Arc::clone(&platform.hypervisor), limits);
        Self { platform, freezes }
    }

    /// Those who know the VMs.
    pub fn hypervisor(&self) -> &Arc<dyn Hypervisor> {
        &self.platform.hypervisor
    }

    /// The management objects.
    pub fn cim(&self) -> Option<&Arc<dyn Cim>> {
        self.platform.cim.as_ref()
    }

    /// Removes on a thread of its own what an earlier process left, so that neither the agent's start nor its
    /// first client waits for it.
    pub fn reap_in_background(&self) {
        let hypervisor = Arc::clone(&self.platform.hypervisor);
        let reap = move || match hypervisor.reap() {
            Ok(report) => {
                for line in report.removed {
                    tracing::info!(removed = line, "left by an earlier job");
                }
                for note in report.notes {
                    tracing::warn!(note, "left by an earlier job");
                }
            }
            Err(error) => tracing::warn!(%error, "what earlier jobs left could not be removed"),
        };
        if let Err(error) = std::thread::Builder::new().name("reap".into()).spawn(reap) {
            tracing::warn!(%error, "what earlier jobs left was not looked for");
        }
    }

    /// What succeeds for a VM whose disks, but for those left out, all lie below the roots with all of their parents.
    /// Blocks.
    pub fn admission(&self, state: &Shared) -> Admission {
        let (host_path, state) = (self.platform.host_path.clone(), Arc::clone(state));
        Arc::new(move |config: &VmConfig, exclude: &[DiskId]| {
            let disks = config.disks.iter().filter(|disk| !exclude.contains(&disk.id));
            for disk in disks {
                let named = disk.path.as_deref().unwrap_or_default();
                let path = match &host_path {
                    Some(find) => find(named),
                    None => Path::new(named).to_path_buf(),
                };
                if let Err(refusal) = state.roots.locate(&path.to_string_lossy()) {
                    tracing::debug!(vm = config.name, path = named, %refusal, "disk refused");
                    let detail = format!(
                        "its disk {} ({named}) is not in a directory that the agent serves; add that \
                         directory with --root, or exclude the disk",
                        disk.id
                    );
                    return Err(refused(config, detail, parents::is_missing(&refusal)));
                }
                let find = host_path.as_ref().map(|find| &**find as &dyn Fn(&str) -> PathBuf);
                parents::check(&*state.provider, &state.roots, &path, find).map_err(|error| {
                    let missing = error.is_missing();
                    let detail =
                        format!("its disk {} ({named}): {error}, or exclude the disk", disk.id);
                    refused(config, detail, missing)
                })?;
            }
            Ok(())
        })
    }
}

/// That a VM is refused; as one that is not found where a file was not there, of which nothing can be read.
fn refused(config: &VmConfig, detail: String, is_missing: bool) -> HypervisorError {
    let what = format!("the VM {}", config.name);
    match is_missing {
        true => HypervisorError::NotFound { what, detail },
        false => HypervisorError::Denied { what, detail },
    }
}

/// Whether a VM may be frozen, without the disks that are left out.
pub type Admission = Arc<dyn Fn(&VmConfig, &[DiskId]) -> Result<()> + Send + Sync>;
