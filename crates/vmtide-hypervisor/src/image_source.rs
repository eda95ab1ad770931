//! Disks that are at rest: image files, block devices and network exports as a one-disk "VM".
//!
//! Nothing is frozen, because nothing runs: the caller opens the device and vouches that nobody
//! writes to it. Without change tracking the whole disk is looked at; with a list of changed
//! ranges from outside (`--changes`) only those are.

use crate::{
    Changes, Consistency, DiskBus, DiskConfig, DiskId, FreezeRequest, FrozenDisk, FrozenVm,
    FullReason, Hypervisor, HypervisorError, ReapReport, Result, TrackingId, VmConfig, VmSummary,
};
use std::sync::Arc;
use vmtide_block::{BlockDevice, RangeSet};

/// One opened disk as a source of backups.
#[derive(Clone)]
pub struct ImageSource {
    name: String,
    format: String,
    device: Arc<dyn BlockDevice>,
    changes: Option<RangeSet>,
    tracking: Option<TrackingId>,
}

impl ImageSource {
    /// The id of the only disk.
    pub const DISK: &'static str = "disk0";

    /// The disk `device` of the image format `format` as the VM `name`.
    pub fn new(name: String, format: String, device: Arc<dyn BlockDevice>) -> Self {
        Self { name, format, device, changes: None, tracking: None }
    }

    /// Trusts that only these ranges differ from the previous restore point.
    #[must_use]
    pub fn with_changes(mut self, changes: RangeSet) -> Self {
        self.changes = Some(changes);
        self
    }

    /// The tracking id to record with the restore point.
    #[must_use]
    pub fn with_tracking(mut self, tracking: TrackingId) -> Self {
        self.tracking = Some(tracking);
        self
    }

    fn config(&self) -> VmConfig {
        VmConfig {
            name: self.name.clone(),
            platform: "image".into(),
            disks: vec![DiskConfig {
                id: DiskId(Self::DISK.into()),
                size_bytes: self.device.size_bytes(),
                bus: DiskBus::Other,
                format: Some(self.format.clone()),
                path: Some(self.device.name()),
                ..DiskConfig::default()
            }],
            ..VmConfig::default()
        }
    }

    fn changes_since(&self, request: &FreezeRequest) -> Changes {
        let size_bytes = self.device.size_bytes();
        match (request.bases.get(&DiskId(Self::DISK.into())), &self.changes) {
            (None, _) => Changes::Everything(FullReason::FirstBackup),
            (Some(base), _) if base.size_bytes != size_bytes => {
                Changes::Everything(FullReason::Resized {
                    from_bytes: base.size_bytes,
                    to_bytes: size_bytes,
                })
            }
            (Some(_), Some(ranges)) => Changes::Ranges(ranges.clamp(size_bytes)),
            (Some(_), None) => {
                Changes::Everything(FullReason::NoTracking("a disk image at rest".into()))
            }
        }
    }
}

impl Hypervisor for ImageSource {
    fn list(&self) -> Result<Vec<VmSummary>> {
        Ok(vec![VmSummary { name: self.name.clone(), id: None, state: "image".into(), disks: 1 }])
    }

    fn describe(&self, _vm: &str) -> Result<VmConfig> {
        Ok(self.config())
    }

    fn freeze(&self, request: &FreezeRequest) -> Result<Box<dyn FrozenVm>> {
        if request.consistency > Consistency::Crash && !request.allow_downgrade {
            return Err(HypervisorError::ConsistencyNotReached {
                wanted: request.consistency,
                detail: NO_GUEST.into(),
            });
        }
        let disk = FrozenDisk {
            id: DiskId(Self::DISK.into()),
            device: Arc::clone(&self.device),
            changes: self.changes_since(request),
            tracking: self.tracking.clone(),
        };
        let downgraded = request.consistency > Consistency::Crash;
        Ok(Box::new(FrozenImage { config: self.config(), downgraded, disks: vec![disk] }))
    }

    fn reap(&self) -> Result<ReapReport> {
        Ok(ReapReport::default())
    }
}

/// Why a disk at rest is only crash consistent.
const NO_GUEST: &str = "a disk image at rest has no guest to ask";

struct FrozenImage {
    config: VmConfig,
    downgraded: bool,
    disks: Vec<FrozenDisk>,
}

impl FrozenVm for FrozenImage {
    fn config(&self) -> &VmConfig {
        &self.config
    }
    fn consistency(&self) -> Consistency {
        Consistency::Crash
    }
    fn downgrade_reason(&self) -> Option<&str> {
        self.downgraded.then_some(NO_GUEST)
    }
    fn warnings(&self) -> &[String] {
        &[]
    }
    fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }
    fn commit(self: Box<Self>) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
    fn abort(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}
