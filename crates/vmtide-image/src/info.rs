//! What an image says of itself.

use crate::Compression;
use crate::format::Format;
use crate::qcow2::header::{Header, LAZY_REFCOUNTS, autoclear, incompatible};
use crate::qcow2::{read_directory, read_snapshots};
use crate::{probe_device, probe_file};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use vmtide_block::{BlockDevice, OpenMode, RawDevice, Result};

/// What an image says of itself. Found without opening any other file, so safe on any image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// The format.
    pub format: Format,
    /// The kind within the format, by its usual name (`dynamic`, `monolithicSparse`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subformat: Option<String>,
    /// The size of the virtual disk in bytes.
    pub size_bytes: u64,
    /// The size of the file in bytes, holes included.
    pub file_size_bytes: u64,
    /// The unit of allocation in bytes, where the format has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_size_bytes: Option<u64>,
    /// The logical sector size in bytes, where the format says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logical_sector_bytes: Option<u32>,
    /// The physical sector size in bytes, where the format says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_sector_bytes: Option<u32>,
    /// The program that made the image, as it names itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creator: Option<String>,
    /// What the image calls itself and its moments, by the names of its specification:
    /// `virtual_disk_id`, `data_write_guid`, `unique_id`, `cid`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub identifiers: BTreeMap<String, String>,
    /// The state of the metadata log, where the format has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<LogState>,
    /// The hypervisor's change tracking file that the image names (VMDK's `changeTrackPath`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change_tracking_file: Option<String>,
    /// The other files that the image's data lies in, as it names them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extent_files: Vec<String>,
    /// The version of the format, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// The file that unallocated clusters are read from, as the image names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<BackingInfo>,
    /// The external data file, as the image names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// Properties switched on in the image: `extended-l2`, `zstd`, `lazy-refcounts`,
    /// `external-data`, `raw-external-data`, `aes`, `luks`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<String>,
    /// The last writer ended without closing the image: reference counts may be stale.
    pub dirty: bool,
    /// A writer found the image damaged; it must be repaired before it is written.
    pub corrupt: bool,
    /// The internal snapshots.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotInfo>,
    /// The persistent dirty bitmaps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<BitmapInfo>,
}

/// A backing file as an image names it. **Untrusted**: whoever wrote the image chose it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackingInfo {
    /// The name: a path, relative to the image's directory, or one of QEMU's URLs.
    pub name: String,
    /// Its format's name, where the image gives it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// The other names it gives, in the order they are tried.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other_names: Vec<String>,
    /// What the parent must say of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
}

/// Whether a format's metadata log holds changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogState {
    /// Nothing to replay.
    Empty,
    /// The last writer did not close the image: readers replay the log in memory, writers on disk.
    Dirty,
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// The unique id.
    pub id: String,
    /// The name a person gave it.
    pub name: String,
    /// The size of the disk in the snapshot, in bytes.
    pub size_bytes: u64,
    /// When it was taken, in seconds since 1970.
    pub created_unix_seconds: u32,
    /// The size of the saved state of the running VM, in bytes; 0 where there is none.
    pub vm_state_bytes: u64,
}

/// A persistent dirty bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapInfo {
    /// The name.
    pub name: String,
    /// The bytes of disk that one bit stands for.
    pub granularity_bytes: u64,
    /// Whether every write to the disk is recorded (QEMU's `auto` flag). One that does not record
    /// says nothing about writes after it was stopped.
    pub recording: bool,
    /// Whether it may be used.
    pub state: BitmapState,
}

/// Whether a bitmap may be used for an incremental backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BitmapState {
    /// It holds what it says.
    Usable,
    /// The program that had it in memory did not store it (flag `in_use`): changes are missing.
    InUse,
    /// A program that does not know bitmaps wrote to the image (autoclear bit 0 is clear).
    Inconsistent,
    /// It has flags or extra data whose meaning is unknown.
    Unknown,
}

impl BitmapState {
    /// The state in words, for a person who asks why a whole disk is read.
    pub const fn explanation(self) -> &'static str {
        match self {
            Self::Usable => "is usable",
            Self::InUse => {
                "was not stored by the program that used it last, so changes are missing"
            }
            Self::Inconsistent => "is stale: a program that does not know bitmaps wrote the image",
            Self::Unknown => "has flags or extra data of unknown meaning",
        }
    }
}

/// What the image at `path` says of itself; the format is probed where it is not given.
///
/// # Errors
/// Where the file cannot be read, its header is damaged, or the format is only recognised.
pub fn image_info(path: impl AsRef<Path>, format: Option<Format>) -> Result<ImageInfo> {
    let path = path.as_ref();
    let file = RawDevice::open(path, OpenMode::ReadOnly)?;
    let format = format.map_or_else(|| probe_file(path, &file), Ok)?;
    image_info_device(&file, Some(format))
}

/// As [`image_info`], for an image that is open already: a file on a share, bytes in memory.
///
/// # Errors
/// As [`image_info`].
pub fn image_info_device(file: &dyn BlockDevice, format: Option<Format>) -> Result<ImageInfo> {
    let format = match format {
        Some(format) => format,
        None => probe_device(file)?,
    };
    match format {
        Format::Raw => Ok(raw(file)),
        Format::Qcow2 => qcow2(file),
        Format::Vhdx => crate::vhdx::info(file),
        Format::Vhd => crate::vhd::info(file),
        Format::Vmdk => crate::vmdk::info(file),
    }
}

impl ImageInfo {
    /// What is true of every image of this size; the format's reader fills in the rest.
    pub const fn new(format: Format, size_bytes: u64, file_size_bytes: u64) -> Self {
        Self {
            format,
            subformat: None,
            size_bytes,
            file_size_bytes,
            block_size_bytes: None,
            logical_sector_bytes: None,
            physical_sector_bytes: None,
            creator: None,
            identifiers: BTreeMap::new(),
            log: None,
            change_tracking_file: None,
            extent_files: Vec::new(),
            version: None,
            backing: None,
            data_file: None,
            features: Vec::new(),
            dirty: false,
            corrupt: false,
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
        }
    }
}

fn raw(file: &dyn BlockDevice) -> ImageInfo {
    ImageInfo::new(Format::Raw, file.size_bytes(), file.size_bytes())
}

pub(crate) fn qcow2(file: &dyn BlockDevice) -> Result<ImageInfo> {
    let header = Header::read(file)?;
    let features = [
        (header.has(incompatible::EXTENDED_L2), "extended-l2"),
        (header.compression == Compression::Zstd, "zstd"),
        (header.compatible & LAZY_REFCOUNTS != 0, "lazy-refcounts"),
        (header.has(incompatible::EXTERNAL_DATA), "external-data"),
        (header.autoclear & autoclear::RAW_EXTERNAL_DATA != 0, "raw-external-data"),
        (header.encryption == 1, "aes"),
        (header.encryption == 2, "luks"),
    ];
    Ok(ImageInfo {
        block_size_bytes: Some(header.cluster_bytes()),
        version: Some(header.version),
        snapshots: read_snapshots(file, &header)?.into_iter().map(|entry| entry.info).collect(),
        bitmaps: read_directory(file, &header)?.into_iter().map(|entry| entry.info).collect(),
        backing: header.backing_name.clone().map(|name| BackingInfo {
            name,
            format: header.backing_format.clone(),
            other_names: Vec::new(),
            identity: None,
        }),
        data_file: header.data_file_name.clone(),
        features: features
            .into_iter()
            .filter(|(on, _)| *on)
            .map(|(_, name)| name.to_owned())
            .collect(),
        dirty: header.has(incompatible::DIRTY),
        corrupt: header.has(incompatible::CORRUPT),
        ..ImageInfo::new(Format::Qcow2, header.size_bytes, file.size_bytes())
    })
}
