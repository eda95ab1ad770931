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
    /// The template of keys that secure boot trusts, in the platform's word (a GUID for Hyper-V).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secure_boot_template: Option<String>,
    /// Whether there was a virtual TPM; none where the platform does not tell. What it held is bound to
    /// the host and not in a backup.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<bool>,
    /// How the memory may grow and shrink; none where its size was fixed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dynamic_memory: Option<DynamicMemory>,
    /// The disk controllers, those without disks too, where the platform tells them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub controllers: Vec<ControllerConfig>,
    /// The disks.
    pub disks: Vec<DiskConfig>,
    /// The network adapters.
    pub network_adapters: Vec<NetworkAdapterConfig>,
    /// What people have noted about the VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notes: Option<String>,
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

/// Memory that the platform gives and takes while the VM runs. [`VmConfig::memory_bytes`] is what it
/// starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DynamicMemory {
    /// The least, in bytes.
    pub minimum_bytes: u64,
    /// The most, in bytes.
    pub maximum_bytes: u64,
    /// What is kept free above what the guest uses, in percent of that.
    #[serde(default)]
    pub buffer_percent: Option<u32>,
}

/// A disk controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControllerConfig {
    /// Its kind.
    pub bus: DiskBus,
    /// Its number among those of its kind, from 0.
    pub number: u32,
}

/// The kind of controller a disk hangs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    #[default]
    Other,
}

/// One disk of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The logical sector size that the guest sees, in bytes; none is 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logical_sector_bytes: Option<u32>,
    /// The physical sector size that the guest sees, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_sector_bytes: Option<u32>,
    /// Whether the image had all its space taken at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed: Option<bool>,
    /// The block size of the image, in bytes, where its format has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_bytes: Option<u32>,
    /// The id in the image that outlives renaming and copying (`VIRTUAL_DISK_ID` of VHDX).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_id: Option<String>,
}

/// One network adapter of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The name people gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether the hardware address was set by people and not by the platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub static_mac: Option<bool>,
    /// The VLAN its frames are tagged with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Its place in the boot order, 0 first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_index: Option<u32>,
}

/// A document of the platform, kept as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NativeFile {
    /// Its name, without directories.
    pub name: String,
    /// Its text. Binary documents are base64, and the name ends in `.base64`.
    pub content: String,
}
