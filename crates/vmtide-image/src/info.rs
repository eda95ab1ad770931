//! What an image says of itself.

use crate::format::Format;
use crate::probe_device;
use crate::qcow2::header::{Compression, Header, LAZY_REFCOUNTS, autoclear, incompatible};
use crate::qcow2::{read_directory, read_snapshots};
use serde::{Deserialize, Serialize};
use std::path::Path;
use vmtide_block::{BlockDevice, OpenMode, RawDevice, Result};

/// What an image says of itself. Found without opening any other file, so safe on any image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// The format.
    pub format: Format,
    /// The size of the virtual disk in bytes.
    pub size_bytes: u64,
    /// The size of the file in bytes, holes included.
    pub file_size_bytes: u64,
    /// The unit of allocation in bytes, where the format has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size_bytes: Option<u64>,
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
    let file = RawDevice::open(path, OpenMode::ReadOnly)?;
    let format = match format {
        Some(format) => format,
        None => probe_device(&file)?,
    };
    match format {
        Format::Raw => Ok(raw(&file)),
        Format::Qcow2 => qcow2(&file),
        other => Err(other.not_supported(file.name())),
    }
}

fn raw(file: &dyn BlockDevice) -> ImageInfo {
    ImageInfo {
        format: Format::Raw,
        size_bytes: file.size_bytes(),
        file_size_bytes: file.size_bytes(),
        cluster_size_bytes: None,
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

fn qcow2(file: &dyn BlockDevice) -> Result<ImageInfo> {
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
        format: Format::Qcow2,
        size_bytes: header.size_bytes,
        file_size_bytes: file.size_bytes(),
        cluster_size_bytes: Some(header.cluster_bytes()),
        version: Some(header.version),
        snapshots: read_snapshots(file, &header)?.into_iter().map(|entry| entry.info).collect(),
        bitmaps: read_directory(file, &header)?.into_iter().map(|entry| entry.info).collect(),
        backing: header
            .backing_name
            .clone()
            .map(|name| BackingInfo { name, format: header.backing_format.clone() }),
        data_file: header.data_file_name.clone(),
        features: features
            .into_iter()
            .filter(|(on, _)| *on)
            .map(|(_, name)| name.to_owned())
            .collect(),
        dirty: header.has(incompatible::DIRTY),
        corrupt: header.has(incompatible::CORRUPT),
    })
}
