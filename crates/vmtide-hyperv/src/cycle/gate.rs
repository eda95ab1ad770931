//! What a VM and its disks allow, as far as the cycle must know it before and while they are frozen.

use crate::{DiskAttachment, FrozenFile, VmRecord};
use vmtide_hypervisor::FullReason;

/// The first version of a VM's configuration whose changes are tracked (Windows Server 2016).
const FIRST_TRACKED: (u16, u16) = (6, 2);

/// The first version at which tracking is the ordinary case.
const FIRST_ORDINARY: (u16, u16) = (8, 0);

/// The format whose changes are tracked.
const VHDX: &str = "vhdx";

/// What was found.
pub(crate) struct Gates {
    /// What the user should know, one line each.
    pub warnings: Vec<String>,
    /// Why nothing of the VM is tracked; none where it can be.
    version: Option<String>,
}

impl Gates {
    /// Looks at a VM and its disks.
    pub fn of(vm: &VmRecord) -> Self {
        let (major, minor) = vm.settings.version;
        let mut warnings = Vec::new();
        let version = (vm.settings.version < FIRST_TRACKED).then(|| {
            format!(
                "the VM's configuration has version {major}.{minor}, and changes are tracked from 6.2 on; \
                 Update-VMVersion raises it for good"
            )
        });
        if version.is_none() && vm.settings.version < FIRST_ORDINARY {
            warnings.push(format!(
                "the VM's configuration has version {major}.{minor}: change tracking may not work below 8.0; \
                 Update-VMVersion raises it for good"
            ));
        }
        Self { warnings, version }
    }

    /// Why the changes of a disk cannot be tracked; none where they can.
    pub fn untracked(&self, disk: &DiskAttachment, file: &FrozenFile) -> Option<FullReason> {
        if let Some(version) = &self.version {
            return Some(FullReason::NoTracking(version.clone()));
        }
        if !file.format.eq_ignore_ascii_case(VHDX) {
            return Some(FullReason::NoTracking(format!(
                "{} is a {} file and not VHDX",
                disk.host_resource, file.format
            )));
        }
        if disk.shared {
            return Some(FullReason::NoTracking("the disk is shared by several VMs".into()));
        }
        if file.disk_id.is_none() {
            return Some(FullReason::NoTracking("the file does not tell the disk's id".into()));
        }
        None
    }

    /// Why the host leaves a disk out of checkpoints, where that is known.
    pub fn skipped(disk: &DiskAttachment) -> &'static str {
        if disk.pass_through {
            "it is a physical disk of the host handed through, which no checkpoint holds; back it up from within the guest"
        } else if disk.shared || disk.host_resource.to_lowercase().ends_with(".vhds") {
            "it is shared by several VMs, and checkpoints of one VM do not hold it; back it up from within the guests"
        } else {
            "the host's checkpoint does not hold it"
        }
    }
}
