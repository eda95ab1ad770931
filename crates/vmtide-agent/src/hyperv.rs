//! Hyper-V on the host that the agent runs on.

use crate::config::AgentOptions;
use crate::limits::MAX_CALL_ANSWER_BYTES;
use crate::provider;
use crate::run::Platform;
use crate::vms::VmPlatform;
use std::sync::Arc;
use vmtide_cim::{Cim, CimError, VIRTUALIZATION_NAMESPACE};
use vmtide_hyperv::{Host, HostOptions, HypervHypervisor, HypervOptions, LocalFiles};
use vmtide_wmi_ffi::ComCim;

/// The disks of this host and, where it has Hyper-V, its VMs. Journals are kept in the agent's state directory.
pub fn platform_of_this_host(options: &AgentOptions) -> Platform {
    let cim: Arc<dyn Cim> = Arc::new(ComCim::new());
    let vms = has_hyperv(&*cim).then(|| {
        let host = Host::new(Arc::clone(&cim), HostOptions::default());
        // Its own, with answers that several clients may have at once.
        let lent: Arc<dyn Cim> =
            Arc::new(ComCim::new().with_max_answer_bytes(MAX_CALL_ANSWER_BYTES));
        let mut how = HypervOptions::new(&options.state_directory);
        how.only_backup_program = options.only_backup_program;
        let hypervisor = HypervHypervisor::new(host, Arc::new(LocalFiles::new()), how);
        VmPlatform { hypervisor: Arc::new(hypervisor), cim: Some(lent), host_path: None }
    });
    Platform { disks: provider::of_this_host(), vms }
}

/// Whether there is Hyper-V's namespace. A host that cannot say now, because its services are starting, has it: requests
/// say later what is wrong.
fn has_hyperv(cim: &dyn Cim) -> bool {
    let query = "SELECT Name FROM Msvm_VirtualSystemManagementService";
    match cim.query(VIRTUALIZATION_NAMESPACE, query) {
        Ok(_) => true,
        Err(error @ (CimError::NotFound { .. } | CimError::Protocol { .. })) => {
            tracing::info!(%error, "this host has no Hyper-V: its disks are served, and no VMs");
            false
        }
        Err(error) => {
            tracing::warn!(%error, "Hyper-V does not answer yet");
            true
        }
    }
}
