//! What a VM and its disks allow, as far as the cycle must know it before and while they are frozen.

use crate::gates::{Checkpoints, DiskGate, VersionGate};
use crate::{DiskAttachment, FrozenFile, SnapshotRecord, VmRecord};
use vmtide_hypervisor::FullReason;

/// What was found.
pub(crate) struct Gates {
    /// What the user should know, one line each.
    pub warnings: Vec<String>,
    version: VersionGate,
}

impl Gates {
    /// Looks at a VM and the checkpoints it has before ours.
    pub fn of(vm: &VmRecord, snapshots: Vec<SnapshotRecord>) -> Self {
        let version = VersionGate::of(&vm.settings);
        let mut warnings = Vec::new();
        if let VersionGate::Doubtful(why) = &version {
            warnings.push(why.clone());
        }
        warnings.extend(Checkpoints::of(snapshots).warning());
        Self { warnings, version }
    }

    /// Why the changes of a disk cannot be tracked; none where they can.
    pub fn untracked(&self, disk: &DiskAttachment, file: &FrozenFile) -> Option<FullReason> {
        match DiskGate::of(&self.version, disk, Some(&file.format)) {
            DiskGate::Tracked if file.disk_id.is_none() => {
                Some(FullReason::NoTracking("the file does not tell the disk's id".into()))
            }
            DiskGate::Tracked => None,
            DiskGate::InFull(reason) => Some(reason),
            // The host held it all the same.
            DiskGate::NotHeld(_) => {
                Some(FullReason::NoTracking("the disk is shared by several VMs".into()))
            }
        }
    }

    /// Why the host leaves a disk out of checkpoints, where that is known.
    pub fn skipped(disk: &DiskAttachment) -> String {
        match DiskGate::of(&VersionGate::Tracked, disk, None) {
            DiskGate::NotHeld(why) => why,
            _ => "the host's checkpoint does not hold it".into(),
        }
    }
}
