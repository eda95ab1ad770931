//! The portable model of a VM's configuration.
//!
//! Kept as JSON in every restore point, so that a VM can be made again on the same or another
//! platform years later. The model holds what all platforms share; what only the source knows is
//! kept as it was, in [`VmConfig::native`], and never lost.

use crate::DiskId;
use serde::{Deserialize, Serialize};

/// A VM's configuration at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmConfig {
    /// The name people use.
    pub name: String,
    /// The platform's own id (a GUID for most).
    pub id: Option<String>,
    /// The platform: `qemu`, `hyper-v`, `vsphere`, `image`.
    pub platform: String,
    /// The platform's version, as it says it.
    pub platform_version: Option<String>,
    /// The machine type or generation, in the platform's word.
    pub machine: Option<String>,
    /// Virtual processors.
    pub processors: Option<u32>,
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// How it boots.
    pub firmware: Option<Firmware>,
    /// Whether secure boot was on; none where the platform does not tell.
    pub secure_boot: Option<bool>,
    /// The disks.
    pub disks: Vec<DiskConfig>,
    /// The network adapters.
    pub network_adapters: Vec<NetworkAdapterConfig>,
    /// Documents of the platform itself (domain XML, VMX, QMP answers), verbatim.
    pub native: Vec<NativeFile>,
}

/// How a VM boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// Legacy BIOS; generation 1 of Hyper-V.
    Bios,
    /// UEFI; generation 2 of Hyper-V.
    Uefi,
}

/// The kind of controller a disk hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBus {
    /// IDE.
    Ide,
    /// SATA (AHCI).
    Sata,
    /// SCSI of any model, virtio-scsi too.
    Scsi,
    /// virtio-blk.
    VirtioBlk,
    /// NVMe.
    Nvme,
    /// USB mass storage.
    Usb,
    /// Something else, or not known.
    Other,
}

/// One disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// The stable id, as in [`FrozenDisk`](crate::FrozenDisk).
    pub id: DiskId,
    /// The size in bytes.
    pub size_bytes: u64,
    /// The controller.
    pub bus: DiskBus,
    /// The image format on the source, e.g. `qcow2`.
    #[serde(default)]
    pub format: Option<String>,
    /// Where it lay on the source.
    #[serde(default)]
    pub path: Option<String>,
    /// The serial number the guest sees.
    #[serde(default)]
    pub serial: Option<String>,
    /// Its place in the boot order, 0 first.
    #[serde(default)]
    pub boot_index: Option<u32>,
}

/// One network adapter of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkAdapterConfig {
    /// The platform's id of the adapter.
    pub id: String,
    /// The model the guest sees.
    #[serde(default)]
    pub model: Option<String>,
    /// The hardware address, lower-case with colons.
    #[serde(default)]
    pub mac: Option<String>,
    /// The network, bridge or switch it was connected to.
    #[serde(default)]
    pub network: Option<String>,
}

/// A document of the platform, kept as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NativeFile {
    /// Its name, without directories.
    pub name: String,
    /// Its text. Binary documents are base64, and the name ends in `.base64`.
    pub content: String,
}
