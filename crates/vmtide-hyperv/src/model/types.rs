//! Records of the objects of `root\virtualization\v2`, checked when they are read. Names of properties and
//! their numbers are those of the class pages of Microsoft's "Hyper-V WMI provider (V2)".

use serde::{Deserialize, Serialize};
use std::fmt;
use uuid::Uuid;
use vmtide_cim::{CimInstance, ObjectPath};

/// A VM: `Msvm_ComputerSystem` with its realized `Msvm_VirtualSystemSettingData`.
#[derive(Clone, Debug)]
pub struct VmRecord {
    /// `Name`: the id, which outlives renaming and migration.
    pub id: Uuid,
    /// `ElementName`: the name people use; not unique.
    pub name: String,
    /// `EnabledState`.
    pub state: VmState,
    /// The path of the `Msvm_ComputerSystem`.
    pub path: ObjectPath,
    /// The settings in force.
    pub settings: VmSettings,
}

/// `EnabledState` of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// 2: running.
    Running,
    /// 3: off.
    Off,
    /// 32768 or 9: paused.
    Paused,
    /// 32769 or 6: saved.
    Saved,
    /// Starting, saving, stopping, …: the number.
    Other(u16),
}

/// `Msvm_VirtualSystemSettingData`: the settings of a VM or of one of its checkpoints.
#[derive(Clone, Debug)]
pub struct VmSettings {
    /// `InstanceID`: `Microsoft:` and a GUID.
    pub instance_id: String,
    /// Where it lives.
    pub path: ObjectPath,
    /// `VirtualSystemIdentifier`: the id of the VM it belongs to.
    pub vm: Uuid,
    /// `ElementName`.
    pub name: String,
    /// `VirtualSystemType`, e.g. `Microsoft:Hyper-V:System:Realized`.
    pub system_type: String,
    /// `Version` of the configuration, major and minor: 8.0 is `(8, 0)`.
    pub version: (u16, u16),
    /// From `VirtualSystemSubType`.
    pub generation: Generation,
    /// `ConfigurationDataRoot`: the directory of the configuration, as the host names it.
    pub configuration_root: String,
    /// `ConfigurationFile`, relative to the root; none where the host does not tell.
    pub configuration_file: Option<String>,
    /// `GuestStateDataRoot` and `GuestStateFile` (generation 2's `.vmgs`).
    pub guest_state: Option<(String, String)>,
    /// `SnapshotDataRoot`.
    pub snapshot_root: Option<String>,
    /// `SecureBootEnabled`; none where the host does not tell.
    pub secure_boot: Option<bool>,
    /// All properties, for what is kept verbatim.
    pub instance: CimInstance,
}

/// The generation of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Generation {
    /// BIOS, IDE boot.
    One,
    /// UEFI, SCSI boot.
    Two,
}

/// A virtual disk attached to a VM or held by a checkpoint: `Msvm_StorageAllocationSettingData` with the
/// drive and the controller it hangs on.
#[derive(Clone, Debug)]
pub struct DiskAttachment {
    /// `InstanceID` of the allocation.
    pub instance_id: String,
    /// The path of the allocation.
    pub path: ObjectPath,
    /// `HostResource[0]`: the file as the host names it, or the disk object for a pass-through disk.
    pub host_resource: String,
    /// Where it is attached.
    pub location: DiskLocation,
    /// Whether this is a physical disk of the host handed through, which no checkpoint holds.
    pub pass_through: bool,
    /// Whether the allocation says that other VMs share it (`PersistentReservationsSupported`).
    pub shared: bool,
    /// All properties of the allocation.
    pub instance: CimInstance,
}

/// The attachment point of a disk. Its text, `scsi0:3` or `ide1:0`, is the disk's id to people; tracking
/// follows the disk's own GUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DiskLocation {
    /// The kind of controller.
    pub controller: ControllerKind,
    /// The number of the controller among those of its kind, from 0.
    pub controller_number: u32,
    /// The location on it (LUN), from 0.
    pub location: u32,
}

impl fmt::Display for DiskLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.controller {
            ControllerKind::Ide => "ide",
            ControllerKind::Scsi => "scsi",
        };
        write!(f, "{kind}{}:{}", self.controller_number, self.location)
    }
}

impl std::str::FromStr for DiskLocation {
    type Err = ();

    /// Reads what [`Display`](fmt::Display) writes.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (controller, rest) = match text.strip_prefix("ide") {
            Some(rest) => (ControllerKind::Ide, rest),
            None => (ControllerKind::Scsi, text.strip_prefix("scsi").ok_or(())?),
        };
        let (number, location) = rest.split_once(':').ok_or(())?;
        let parse = |text: &str| text.parse::<u32>().map_err(|_| ());
        Ok(Self { controller, controller_number: parse(number)?, location: parse(location)? })
    }
}

/// The kinds of controllers of Hyper-V.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ControllerKind {
    /// Emulated IDE (`ResourceType` 5).
    Ide,
    /// Synthetic SCSI (`ResourceType` 6).
    Scsi,
}

/// A checkpoint.
#[derive(Clone, Debug)]
pub struct SnapshotRecord {
    /// Its settings; the path is that of the checkpoint.
    pub settings: VmSettings,
    /// From `VirtualSystemType`.
    pub kind: SnapshotKind,
}

/// The kinds of checkpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotKind {
    /// `Snapshot:Realized`: made by a user or by Hyper-V's automatic checkpoints.
    Standard,
    /// `Snapshot:Recovery`: made for a backup, ours or another product's.
    Recovery,
    /// Replica's and planned ones: the rest of the type.
    Other(String),
}

/// `Msvm_VirtualSystemReferencePoint`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReferencePointRecord {
    /// `InstanceID`: `Microsoft:VM\POINT` up to Server 2022, `Microsoft:POINT` later. Opaque.
    pub instance_id: String,
    /// `VirtualSystemIdentifier`.
    pub vm: Uuid,
    /// `ReferencePointType`: 1 log-based, 2 by resilient change tracking.
    pub kind: u16,
    /// `ConsistencyLevel`: 1 application, 2 crash; none where the host does not tell.
    pub consistency: Option<u16>,
    /// `VirtualDiskIdentifiers[i]` with `ResilientChangeTrackingIdentifiers[i]`, as they came: a host
    /// whose two lists differ in length is caught when they are used, not here.
    pub disk_identifiers: Vec<String>,
    /// See [`disk_identifiers`](Self::disk_identifiers).
    pub tracking_ids: Vec<String>,
}

/// `GuestBackupType`: what VSS tells the applications in the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackupType {
    /// 1: applications truncate their logs. Breaks the log chain of another backup of theirs.
    Full,
    /// 2: applications keep their logs.
    #[default]
    Copy,
}
