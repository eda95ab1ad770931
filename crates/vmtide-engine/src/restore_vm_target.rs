//! Where a VM is restored to: from what a user writes to a platform that VMs can be restored to.

use crate::hyperv::{HypervAccess, HypervHost, HypervUrl, WinrmUrl, connect_agent};
use crate::{EngineError, Result};
use std::path::PathBuf;
use vmtide_agent_client::AgentOptions;
use vmtide_block::CancelToken;
use vmtide_hyperv::HypervRestorer;
use vmtide_hypervisor::VmRestorer;

/// How to get at a platform.
#[derive(Clone, Debug, Default)]
pub struct VmTargetOptions {
    /// Hosts without an agent.
    pub hyperv: HypervAccess,
    /// Hosts with one.
    pub agent: AgentOptions,
    /// Where journals and locks are kept.
    pub state_directory: PathBuf,
    /// Ends what is done with disks by way of an agent.
    pub cancel: CancelToken,
}

/// A platform, and the VM that was named.
pub struct OpenVmTarget {
    /// The platform.
    pub restorer: Box<dyn VmRestorer>,
    /// The VM's name; none takes that of the restore point.
    pub name: Option<String>,
    /// Both, as they were understood.
    pub display: String,
}

/// Whether a target is a whole VM: `hyperv+winrm://HOST/NAME`, `hyperv://HOST/NAME`, or `hyperv:///NAME` of this host.
pub fn is_vm_target(text: &str) -> bool {
    WinrmUrl::is_winrm_url(text) || HypervUrl::is_hyperv_url(text)
}

/// Understands the URL of a VM and gets ready to ask its host. Nothing is asked yet.
///
/// # Errors
/// [`EngineError::Usage`] with what is wrong with it; those of the options.
pub fn open_vm_target(text: &str, options: &VmTargetOptions) -> Result<OpenVmTarget> {
    let (found, name, display) = if WinrmUrl::is_winrm_url(text) {
        let url = WinrmUrl::parse(text)?;
        (options.hyperv.connect(&url)?, url.vm.clone(), url.to_string())
    } else if HypervUrl::is_hyperv_url(text) {
        let url = HypervUrl::parse(text)?;
        let name = url.vm().map(str::to_owned);
        (connect_agent(&url, &options.agent, &options.cancel)?, name, url.to_string())
    } else {
        return Err(EngineError::usage(format!(
            "a VM is restored to hyperv+winrm://HOST/NAME or hyperv://HOST/NAME, not to {text}"
        )));
    };
    let HypervHost { host, files } = found;
    let restorer = HypervRestorer::new(host, files, &options.state_directory);
    Ok(OpenVmTarget { restorer: Box::new(restorer), name, display })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hyperv::{Login, Method};

    #[test]
    fn whole_vms_are_told_from_disks() {
        for text in ["hyperv+winrm://hv1/web", "hyperv://hv1/web", "HYPERV:///web"] {
            assert!(is_vm_target(text), "{text}");
        }
        for text in ["/restored/", "agent+https://hv1/web", "nbd://hv1/web", "hyperv-web.vhdx"] {
            assert!(!is_vm_target(text), "{text}");
            assert!(open_vm_target(text, &VmTargetOptions::default()).is_err());
        }
        let login = Login {
            user: r"LAB\admin".into(),
            password: "s3cret".to_owned().into(),
            method: Method::Ntlm,
            kdc: None,
        };
        let hyperv = HypervAccess { login: Some(login), ..HypervAccess::default() };
        let options = VmTargetOptions { hyperv, ..VmTargetOptions::default() };
        let open =
            |text| open_vm_target(text, &options).map(|target| (target.name, target.display));
        let named = open("hyperv+winrm://hv1/web%20two").unwrap();
        assert_eq!(named, (Some("web two".into()), "hyperv+winrm://hv1/web%20two".into()));
        assert_eq!(open("hyperv+winrm://hv1").unwrap().0, None);
        let local = open("hyperv:///web").unwrap_err();
        assert!(matches!(local, EngineError::Usage(_)), "{local}");
    }
}
