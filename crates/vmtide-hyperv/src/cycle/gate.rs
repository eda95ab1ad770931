//! What a VM and its disks allow, as far as the cycle must know it before and while they are frozen.

use crate::gates::{DiskGate, VersionGate};
use crate::{DiskAttachment, FrozenFile, VmRecord};
use vmtide_hypervisor::FullReason;

/// What was found of a VM.
pub(crate) struct Gates {
    version: VersionGate,
}

impl Gates {
    /// Looks at a VM.
    pub fn of(vm: &VmRecord) -> Self {
        Self { version: VersionGate::of(&vm.settings) }
    }

    /// What the user should know of the VM, where there is something.
    pub fn warning(&self) -> Option<String> {
        match &self.version {
            VersionGate::Doubtful(why) => Some(why.clone()),
            VersionGate::Tracked | VersionGate::Untracked(_) => None,
        }
    }

    /// Whether a checkpoint holds a disk, by what is known before it is opened.
    pub fn is_held(&self, disk: &DiskAttachment) -> bool {
        !matches!(DiskGate::of(&self.version, disk, None), DiskGate::NotHeld(_))
    }

    /// Why the changes of a disk cannot be tracked; none where they can.
    pub fn untracked(&self, disk: &DiskAttachment, file: &FrozenFile) -> Option<FullReason> {
        match DiskGate::of(&self.version, disk, Some(&file.format)) {
            DiskGate::InFull(reason) => Some(reason),
            DiskGate::NotHeld(why) => Some(FullReason::NoTracking(why)),
            DiskGate::Tracked if file.disk_id.is_none() => {
                Some(FullReason::NoTracking("the file does not tell the disk's id".into()))
            }
            DiskGate::Tracked => None,
        }
    }

    /// Why a disk is not among those that are backed up.
    pub fn skipped(&self, disk: &DiskAttachment) -> String {
        match DiskGate::of(&self.version, disk, None) {
            DiskGate::NotHeld(why) => why,
            DiskGate::Tracked | DiskGate::InFull(_) => {
                "the host's checkpoint does not hold it".into()
            }
        }
    }
}
