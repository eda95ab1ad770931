//! Creating an image of any format.

use crate::qcow2::{CreateBacking, Qcow2CreateOptions, Qcow2Version, Qcow2Writer};
use crate::vhdx::{VhdxCreateOptions, VhdxKind, VhdxParent, VhdxWriter};
use crate::vmdk::{VmdkCreateOptions, VmdkKind, VmdkParent, VmdkWriter};
use crate::{Format, ImageInfo, ImageWriter, vhdx};
use std::path::Path;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, OpenMode, RawDevice, Result};

/// What a new image is like. What is not given is the format's usual default.
#[derive(Clone)]
pub struct CreateOptions {
    /// The format.
    pub format: Format,
    /// The kind within the format, by its usual name; see [`subformats`].
    pub subformat: Option<String>,
    /// The size of the disk in bytes.
    pub size_bytes: u64,
    /// The unit of allocation in bytes: qcow2's cluster, VHDX's and VHD's block, VMDK's grain.
    pub block_size_bytes: Option<u64>,
    /// The logical sector size in bytes, 512 or 4096 (VHDX).
    pub logical_sector_bytes: Option<u32>,
    /// Whether clusters will be written compressed (qcow2; streamOptimized VMDK always).
    pub compress: bool,
    /// How clusters are compressed where the format has a choice (qcow2); zlib, which every program
    /// reads, where it is not given.
    pub compression: Option<Compression>,
    /// Whether nothing of what is written need be on the medium when it is done
    /// ([`RawDevice::without_flushes`](vmtide_block::RawDevice::without_flushes)): for images that can
    /// be made again.
    pub without_flushes: bool,
    /// The parent of a differencing image.
    pub parent: Option<CreateParent>,
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Deflate; in qcow2 raw with a window of 4 KiB.
    #[default]
    Zlib,
    /// Zstandard: several times faster at the same size. QEMU reads it since 5.1 (2020), other
    /// programs seldom.
    Zstd,
}

impl std::str::FromStr for Compression {
    type Err = BlockError;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "zlib" => Ok(Self::Zlib),
            "zstd" => Ok(Self::Zstd),
            _ => Err(BlockError::unsupported(
                format!("compression {name:?}"),
                "is unknown; known are zlib and zstd",
            )),
        }
    }
}

impl CreateOptions {
    /// An empty disk in the format's usual kind.
    pub const fn new(format: Format, size_bytes: u64) -> Self {
        Self {
            format,
            subformat: None,
            size_bytes,
            block_size_bytes: None,
            logical_sector_bytes: None,
            compress: false,
            compression: None,
            without_flushes: false,
            parent: None,
        }
    }
}

/// The parent of a new differencing image.
#[derive(Clone)]
pub struct CreateParent {
    /// Where it is, as the child shall find it: its path relative to the child's directory, or an
    /// absolute one.
    pub name: String,
    /// Its absolute path, for formats that store that as well.
    pub absolute_path: Option<String>,
    /// Its format.
    pub format: Format,
    /// What it says of itself ([`crate::identity`]), which the child will insist on.
    pub identity: Option<String>,
    /// Its disk, for the parts of blocks that a write leaves alone.
    pub device: Arc<dyn BlockDevice>,
}

/// The kinds within a format, the default first.
pub const fn subformats(format: Format) -> &'static [&'static str] {
    match format {
        Format::Raw => &[],
        // Version 3 is QEMU's compat=1.1, version 2 compat=0.10; with the extended entries clusters have 32 parts.
        Format::Qcow2 => &["v3", "v2", "extended-l2"],
        Format::Vhdx | Format::Vhd => &["dynamic", "fixed", "differencing"],
        Format::Vmdk => &[
            "monolithicSparse",
            "monolithicFlat",
            "twoGbMaxExtentSparse",
            "twoGbMaxExtentFlat",
            "streamOptimized",
            "vmfs",
        ],
    }
}

/// Creates an image at `path`, which must not exist. The other files of an image that has several
/// stand beside it under names that begin with its name; they must not exist either.
///
/// # Errors
/// [`BlockError::Unsupported`] for options that the format does not allow; [`BlockError::Io`] where
/// a file cannot be made.
pub fn create_image(
    path: impl AsRef<Path>,
    options: &CreateOptions,
) -> Result<Arc<dyn ImageWriter>> {
    let path = path.as_ref();
    check_subformat(path, options)?;
    if options.compression == Some(Compression::Zstd) && options.format != Format::Qcow2 {
        return Err(BlockError::unsupported(
            path.display().to_string(),
            format!("{} images cannot be compressed with zstd; only qcow2 can", options.format),
        ));
    }
    match options.format {
        Format::Raw => Ok(Arc::new(new_file(path, options.size_bytes, options.without_flushes)?)),
        Format::Qcow2 => create_qcow2(path, options),
        Format::Vhdx => create_vhdx(path, options),
        Format::Vhd => Ok(Arc::new(crate::vhd::create(path, options)?)),
        Format::Vmdk => create_vmdk(path, options),
    }
}

/// A new file of `size_bytes` that is to be an image, or a part of one.
pub(crate) fn new_file(path: &Path, size_bytes: u64, without_flushes: bool) -> Result<RawDevice> {
    let file = RawDevice::open(path, OpenMode::CreateNew { size_bytes })?;
    Ok(if without_flushes { file.without_flushes() } else { file })
}

fn check_subformat(path: &Path, options: &CreateOptions) -> Result<()> {
    let known = subformats(options.format);
    match &options.subformat {
        Some(name) if !known.contains(&name.as_str()) => Err(BlockError::unsupported(
            path.display().to_string(),
            match known.is_empty() {
                true => format!("{} has no subformats; {name:?} was asked for", options.format),
                false => format!(
                    "{name:?} is no subformat of {}; known are {}",
                    options.format,
                    known.join(", ")
                ),
            },
        )),
        _ => Ok(()),
    }
}

fn create_qcow2(path: &Path, options: &CreateOptions) -> Result<Arc<dyn ImageWriter>> {
    let mut create = Qcow2CreateOptions::new(options.size_bytes);
    if let Some(bytes) = options.block_size_bytes {
        create.cluster_size_bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
    }
    match options.subformat.as_deref() {
        Some("v2") => create.version = Qcow2Version::V2,
        Some("extended-l2") => create.extended_l2 = true,
        _ => {}
    }
    create.compress = options.compress;
    create.without_flushes = options.without_flushes;
    create.compression = options.compression.unwrap_or_default();
    create.backing = options.parent.as_ref().map(|parent| CreateBacking {
        name: parent.name.clone(),
        format: parent.format,
        device: parent.device.clone(),
    });
    Ok(Arc::new(Qcow2Writer::create(path, &create)?))
}

fn create_vmdk(path: &Path, options: &CreateOptions) -> Result<Arc<dyn ImageWriter>> {
    let refuse = |detail: String| BlockError::unsupported(path.display().to_string(), detail);
    let mut create = VmdkCreateOptions::new(options.size_bytes);
    if let Some(kind) = options.subformat.as_deref().and_then(VmdkKind::from_name) {
        create.kind = kind;
    } else if options.compress {
        create.kind = VmdkKind::StreamOptimized;
    }
    if options.compress && create.kind != VmdkKind::StreamOptimized {
        return Err(refuse(format!(
            "{} images are not compressed; only streamOptimized is",
            create.kind.name()
        )));
    }
    if let Some(bytes) = options.block_size_bytes {
        create.grain_size_bytes = bytes;
    }
    create.without_flushes = options.without_flushes;
    if let Some(parent) = &options.parent {
        if parent.format != Format::Vmdk {
            return Err(refuse(format!(
                "the parent of a VMDK must be a VMDK, not {}",
                parent.format
            )));
        }
        let identity = parent.identity.clone();
        create.parent = Some(VmdkParent {
            hint: parent.name.clone(),
            content_id: identity.ok_or_else(|| refuse("its parent has no content id".into()))?,
            device: parent.device.clone(),
        });
    }
    Ok(Arc::new(VmdkWriter::create(path, &create)?))
}

fn create_vhdx(path: &Path, options: &CreateOptions) -> Result<Arc<dyn ImageWriter>> {
    let refuse = |detail: String| BlockError::unsupported(path.display().to_string(), detail);
    let mut create = VhdxCreateOptions::new(options.size_bytes);
    create.block_size_bytes =
        options.block_size_bytes.map(|bytes| u32::try_from(bytes).unwrap_or(u32::MAX));
    match (options.subformat.as_deref(), &options.parent) {
        (Some("differencing"), None) => {
            return Err(refuse("a differencing image needs a parent".into()));
        }
        (Some(kind @ ("fixed" | "dynamic")), Some(_)) => {
            return Err(refuse(format!("an image with a parent is differencing, not {kind}")));
        }
        (Some("fixed"), None) => create.kind = VhdxKind::Fixed,
        _ => {}
    }
    create.without_flushes = options.without_flushes;
    let mut sector_bytes = options.logical_sector_bytes;
    if let Some(parent) = &options.parent {
        let (link, info) = vhdx_parent(path, parent)?;
        create.parent = Some(link);
        // A child takes over what the guest sees of the disk (MS-VHDX 2.6.1.2, IsVirtualDisk).
        sector_bytes = sector_bytes.or(info.as_ref().and_then(|info| info.logical_sector_bytes));
        let physical = info.and_then(|info| info.physical_sector_bytes);
        create.physical_sector_bytes = physical.unwrap_or(create.physical_sector_bytes);
    }
    create.logical_sector_bytes = sector_bytes.unwrap_or(create.logical_sector_bytes);
    Ok(Arc::new(VhdxWriter::create(path, &create)?))
}

/// The parent of a new VHDX, and what it says of itself where its file can be found.
fn vhdx_parent(child: &Path, parent: &CreateParent) -> Result<(VhdxParent, Option<ImageInfo>)> {
    let refuse = |detail: String| BlockError::unsupported(child.display().to_string(), detail);
    if parent.format != Format::Vhdx {
        return Err(refuse(format!("the parent of a VHDX must be a VHDX, not {}", parent.format)));
    }
    let identity = parent.identity.clone();
    let identity = identity.ok_or_else(|| refuse("its parent has no DataWriteGuid".into()))?;
    let name = parent.name.as_str();
    let is_absolute = name.starts_with(['/', '\\']) || name.as_bytes().get(1) == Some(&b':');
    // What else a child has of its parent. Where the file is not there now, the child is made
    // without: it needs only the linkage.
    let beside = child.parent().map_or_else(|| name.into(), |directory| directory.join(name));
    let at = parent.absolute_path.as_ref().map_or(beside, Into::into);
    let info = RawDevice::open(at, OpenMode::ReadOnly)
        .and_then(|file| vhdx::info(&file))
        .ok()
        .filter(|info| info.identifiers.values().any(|value| *value == identity));
    let link = VhdxParent {
        identity,
        disk_id: info.as_ref().and_then(|info| info.identifiers.get("virtual_disk_id").cloned()),
        relative_path: (!is_absolute).then(|| name.to_owned()),
        absolute_path: parent
            .absolute_path
            .clone()
            .or_else(|| is_absolute.then(|| name.to_owned())),
        volume_path: None,
        device: parent.device.clone(),
    };
    Ok((link, info))
}
