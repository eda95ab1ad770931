//! Virtual disks as files, with vmtide's own change tracking: the provider where there is no `virtdisk.dll`.
//!
//! Formats are read by `vmtide-image`. A disk that another process of this host has open with tracking
//! (`vmtide track`) is asked and read through that process; one that nobody has is opened here, and locked against
//! writers while it is read. Numbers of types are those of Windows for VHD and VHDX, of other formats the type is 0.

use super::{
    ChangePage, DiskInfo, DiskProvider, FrozenDisk, FrozenDisks, NewDisk, OpenDisks, ProviderError,
    Result, TrackingState,
};
use crate::count::{Count, Counted};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, Extent, OpenMode, RawDevice,
    WritableBlockDevice,
};
use vmtide_image::vhdx::{VhdxCreateOptions, VhdxKind, VhdxWriter};
use vmtide_image::{
    BackingPolicy, CreateOptions, Format, ImageInfo, ImageLock, ImageWriter, OpenOptions,
    create_image, image_info_device, open_chain, open_read_only, probe_device,
};
use vmtide_track::{
    FrozenImage, HostOptions, HostedImage, MAX_RANGES_PER_PAGE, RemoteHost, TrackError,
    TrackedImage, freeze_images,
};

/// `VIRTUAL_STORAGE_TYPE_DEVICE_VHD` and `_VHDX` (virtdisk.h).
const STORAGE_TYPE_VHD: u32 = 2;
const STORAGE_TYPE_VHDX: u32 = 3;

/// `GET_VIRTUAL_DISK_INFO_PROVIDER_SUBTYPE` (virtdisk.h).
const SUBTYPE_FIXED: u32 = 2;
const SUBTYPE_DYNAMIC: u32 = 3;
const SUBTYPE_DIFFERENCING: u32 = 4;

/// Virtual disks that are files on this host.
#[derive(Clone, Debug, Default)]
pub struct FilesProvider {
    host: HostOptions,
    open: Count,
}

impl FilesProvider {
    /// A provider that tracks what is written through it in this way, where tracking is on.
    pub fn new(host: HostOptions) -> Self {
        Self { host, open: Count::default() }
    }
}

impl DiskProvider for FilesProvider {
    fn info(&self, path: &Path) -> Result<DiskInfo> {
        let open = options(path)?;
        let info = RawDevice::open_resolved(path, OpenMode::ReadOnly)
            .and_then(|file| image_info_device(&file, open.format))
            .map_err(|error| of_block(path, error))?;
        let small = |bytes: Option<u64>| u32::try_from(bytes.unwrap_or(0)).unwrap_or(u32::MAX);
        let (virtual_storage_type, provider_sub_type) = numbers(&info);
        let is_fixed = provider_sub_type == SUBTYPE_FIXED;
        Ok(DiskInfo {
            virtual_size_bytes: info.size_bytes,
            physical_size_bytes: info.file_size_bytes,
            block_size_bytes: if is_fixed { 0 } else { small(info.block_size_bytes) },
            logical_sector_bytes: info.logical_sector_bytes.unwrap_or(512),
            physical_sector_bytes: info.physical_sector_bytes.unwrap_or(512),
            parent_path: parent_path(path, &open, &info),
            virtual_storage_type,
            provider_sub_type,
            format: info.format.name().to_owned(),
            disk_id: ["virtual_disk_id", "unique_id"]
                .iter()
                .find_map(|name| info.identifiers.get(*name).cloned()),
        })
    }

    fn tracking(&self, path: &Path) -> Result<TrackingState> {
        options(path)?;
        let state = TrackedImage::connect_or_open(path).and_then(|image| image.state());
        let state = state.map_err(|error| of_track(path, error))?;
        Ok(TrackingState {
            enabled: state.enabled,
            newer_changes: state.newer_changes,
            most_recent_id: state.most_recent_id,
        })
    }

    fn set_tracking(&self, path: &Path, enabled: bool) -> Result<()> {
        options(path)?;
        TrackedImage::connect_or_open(path)
            .and_then(|mut image| image.set_enabled(enabled))
            .map_err(|error| of_track(path, error))
    }

    fn changes(&self, path: &Path, id: &str, range: ByteRange) -> Result<ChangePage> {
        options(path)?;
        let page = TrackedImage::connect_or_open(path)
            .and_then(|image| image.changes_since(id, range, MAX_RANGES_PER_PAGE))
            .map_err(|error| of_track(path, error))?;
        Ok(ChangePage { ranges: page.ranges, processed_bytes: page.processed_bytes })
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn BlockDevice>> {
        let open = options(path)?;
        let host = RemoteHost::connect(path).map_err(|error| of_track(path, error))?;
        if let Some(host) = host {
            let device = Arc::new(host.open().map_err(|error| of_track(path, error))?);
            return Ok(Arc::new(Reading { device, _lock: None, _counted: self.open.enter() }));
        }
        let lock = ImageLock::take_for_reading(path).map_err(|error| of_block(path, error))?;
        let device = open_read_only(path, &open).map_err(|error| of_block(path, error))?;
        Ok(Arc::new(Reading { device, _lock: Some(lock), _counted: self.open.enter() }))
    }

    fn open_writable(&self, path: &Path) -> Result<Arc<dyn WritableBlockDevice>> {
        let open = options(path)?;
        let image =
            HostedImage::open(path, &open, &self.host).map_err(|error| of_track(path, error))?;
        Ok(Arc::new(Writing { image, _counted: self.open.enter() }))
    }

    /// Takes no time worth giving up: space is reserved, not written.
    fn create(&self, path: &Path, disk: &NewDisk, _: &CancelToken) -> Result<()> {
        let format: Format = disk.format.parse().map_err(|_| ProviderError::Unsupported {
            path: path.display().to_string(),
            reason: format!(
                "{:?} is no format that can be made: vhdx, vhd, qcow2, vmdk or raw",
                disk.format
            ),
        })?;
        if path.symlink_metadata().is_ok() {
            return Err(ProviderError::Exists { path: path.display().to_string() });
        }
        let created = match format {
            Format::Vhdx => create_vhdx(path, disk),
            _ => create_other(path, format, disk),
        };
        created.map_err(|error| of_block(path, error))
    }

    fn freeze(&self, paths: &[PathBuf]) -> Result<Box<dyn FrozenDisks>> {
        for path in paths {
            options(path)?;
        }
        let open = |path: &Path| {
            let open = options(path).map_err(|error| {
                BlockError::unsupported(path.display().to_string(), error.to_string())
            })?;
            Ok(open_read_only(path, &open)?)
        };
        let first = paths.first().map_or(Path::new(""), PathBuf::as_path);
        let images = freeze_images(paths, &open).map_err(|error| of_track(first, error))?;
        let disk = |image: FrozenImage| FrozenDisk {
            path: image.path,
            device: image.device,
            tracking_id: image.tracking_id,
        };
        let disks: Vec<_> = images.into_iter().map(disk).collect();
        let counted = disks.iter().map(|_| self.open.enter()).collect();
        Ok(Box::new(Frozen { disks, _counted: counted }))
    }

    fn open_disks(&self) -> OpenDisks {
        OpenDisks { open: self.open.now(), attached: 0 }
    }
}

/// How an image is opened: as what it is by its content, where its name does not say that it is raw. What has no
/// known content must be called raw: any file would be a disk otherwise. Parents come from the image's own
/// directory, and only where name and content agree on the format, which a guest could forge alone. Paths come here
/// resolved, and so a link that is found in one was put there meanwhile.
fn options(path: &Path) -> Result<OpenOptions> {
    let metadata = std::fs::metadata(path)
        .map_err(|error| of_block(path, BlockError::io(path.display().to_string(), error)))?;
    let not_a_disk = |reason: &str| ProviderError::NotADisk {
        path: path.display().to_string(),
        reason: reason.to_owned(),
    };
    if !metadata.is_file() {
        return Err(not_a_disk("it is no file"));
    }
    let extension = path.extension().and_then(|name| name.to_str()).unwrap_or_default();
    let extension = extension.to_ascii_lowercase();
    let named = match extension.as_str() {
        "vhdx" | "avhdx" => Some(Format::Vhdx),
        "vhd" | "avhd" | "vpc" => Some(Format::Vhd),
        "qcow2" => Some(Format::Qcow2),
        "vmdk" => Some(Format::Vmdk),
        "raw" | "img" => Some(Format::Raw),
        _ => None,
    };
    let format = match extension.as_str() {
        "raw" => Format::Raw,
        _ => RawDevice::open_resolved(path, OpenMode::ReadOnly)
            .and_then(|file| probe_device(&file))
            .map_err(|error| of_block(path, error))?,
    };
    if format == Format::Raw && named != Some(Format::Raw) {
        return Err(not_a_disk(
            "its content is of no known format (a raw disk is named .raw or .img)",
        ));
    }
    let backing = match named == Some(format) {
        true => BackingPolicy::SameDirectory,
        false => BackingPolicy::Refuse,
    };
    Ok(OpenOptions { format: Some(format), backing, no_links: true, ..OpenOptions::default() })
}

/// The numbers by which Windows knows the disk; of formats that it does not know, what of them means the same.
fn numbers(info: &ImageInfo) -> (u32, u32) {
    let storage = match info.format {
        Format::Vhd => STORAGE_TYPE_VHD,
        Format::Vhdx => STORAGE_TYPE_VHDX,
        Format::Raw | Format::Qcow2 | Format::Vmdk => 0,
    };
    let is_fixed = info.format == Format::Raw
        || matches!(
            info.subformat.as_deref(),
            Some("fixed" | "monolithicFlat" | "twoGbMaxExtentFlat" | "vmfs")
        );
    let subtype = match (is_fixed, info.backing.is_some()) {
        (true, _) => SUBTYPE_FIXED,
        (false, true) => SUBTYPE_DIFFERENCING,
        (false, false) => SUBTYPE_DYNAMIC,
    };
    (storage, subtype)
}

/// The parent as it is found, or else as the image names it.
fn parent_path(path: &Path, open: &OpenOptions, info: &ImageInfo) -> Option<String> {
    let named = info.backing.as_ref()?.name.clone();
    let found = open_chain(path, open)
        .ok()
        .and_then(|layers| layers.get(1).map(|parent| parent.path.display().to_string()));
    Some(found.unwrap_or(named))
}

fn create_vhdx(path: &Path, disk: &NewDisk) -> vmtide_block::Result<()> {
    let mut create = VhdxCreateOptions::new(disk.virtual_size_bytes);
    create.logical_sector_bytes = disk.logical_sector_bytes.unwrap_or(create.logical_sector_bytes);
    create.physical_sector_bytes =
        disk.physical_sector_bytes.unwrap_or(create.physical_sector_bytes);
    create.block_size_bytes = disk.block_size_bytes;
    create.disk_id.clone_from(&disk.disk_id);
    if disk.fixed {
        create.kind = VhdxKind::Fixed;
    }
    finish(path, Arc::new(VhdxWriter::create(path, &create)?))
}

fn create_other(path: &Path, format: Format, disk: &NewDisk) -> vmtide_block::Result<()> {
    let refuse = |detail: &str| Err(BlockError::unsupported(path.display().to_string(), detail));
    let mut create = CreateOptions::new(format, disk.virtual_size_bytes);
    create.subformat = match (format, disk.fixed) {
        (Format::Vhd, true) => Some("fixed".to_owned()),
        (Format::Vmdk, true) => Some("monolithicFlat".to_owned()),
        (Format::Qcow2, true) => {
            return refuse("qcow2 images are never fixed; vhdx, vhd, vmdk and raw can be");
        }
        _ => None,
    };
    let sectors = [disk.logical_sector_bytes, disk.physical_sector_bytes];
    if sectors.into_iter().flatten().any(|bytes| bytes != 512) {
        return refuse("only vhdx images have sectors of other than 512 bytes");
    }
    if disk.disk_id.is_some() || disk.block_size_bytes.is_some() {
        return refuse("only vhdx images are given a disk id and a block size");
    }
    finish(path, create_image(path, &create)?)
}

/// Ends a new image; one that cannot be ended is removed, for it would look like one.
fn finish(path: &Path, image: Arc<dyn ImageWriter>) -> vmtide_block::Result<()> {
    image.finish().inspect_err(|_| {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(path);
    })
}

/// Disks of one moment.
struct Frozen {
    disks: Vec<FrozenDisk>,
    _counted: Vec<Counted>,
}

impl FrozenDisks for Frozen {
    fn disks(&self) -> &[FrozenDisk] {
        &self.disks
    }
}

/// An image that nobody writes to while it is read: it is locked, or the process that hosts it sees to that.
struct Reading {
    device: Arc<dyn BlockDevice>,
    _lock: Option<ImageLock>,
    _counted: Counted,
}

impl BlockDevice for Reading {
    fn name(&self) -> String {
        self.device.name()
    }
    fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }
    fn block_size_bytes(&self) -> u32 {
        self.device.block_size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.device.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.device.extents(range)
    }
}

/// An image that is written, closed in order with the last reference.
struct Writing {
    image: Arc<HostedImage>,
    _counted: Counted,
}

impl BlockDevice for Writing {
    fn name(&self) -> String {
        self.image.disk().name()
    }
    fn size_bytes(&self) -> u64 {
        self.image.disk().size_bytes()
    }
    fn block_size_bytes(&self) -> u32 {
        self.image.disk().block_size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.image.disk().read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.image.disk().extents(range)
    }
}

impl WritableBlockDevice for Writing {
    fn write_at(&self, data: &[u8], offset: u64) -> vmtide_block::Result<()> {
        self.image.disk().write_at(data, offset)
    }
    fn write_zeroes(&self, range: ByteRange) -> vmtide_block::Result<()> {
        self.image.disk().write_zeroes(range)
    }
    fn flush(&self) -> vmtide_block::Result<()> {
        self.image.disk().flush()
    }
    fn expect_bulk_writes(&self) {
        self.image.disk().expect_bulk_writes();
    }
}

/// An error of a disk, as the agent tells them apart.
fn of_block(path: &Path, error: BlockError) -> ProviderError {
    let (path, reason) = (path.display().to_string(), error.to_string());
    match error.io_kind() {
        Some(ErrorKind::NotFound) => return ProviderError::NotFound { path },
        Some(ErrorKind::PermissionDenied) => return ProviderError::Denied { path, reason },
        Some(ErrorKind::AlreadyExists) => return ProviderError::Exists { path },
        Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            return ProviderError::NoSpace { path, reason };
        }
        Some(ErrorKind::ResourceBusy) => {
            let reason = "another program has it open for writing, or reads it as it is".into();
            return ProviderError::InUse { path, reason };
        }
        _ => {}
    }
    match error {
        BlockError::Damaged { .. } => ProviderError::NotADisk { path, reason },
        BlockError::Unsupported { .. } => ProviderError::Unsupported { path, reason },
        _ => ProviderError::Failed { path, reason },
    }
}

/// An error of tracking, as the agent tells them apart.
fn of_track(path: &Path, error: TrackError) -> ProviderError {
    let name = path.display().to_string();
    match error {
        TrackError::UnknownId { id, .. } => ProviderError::UnknownTrackingId { path: name, id },
        TrackError::Disabled { .. } => ProviderError::TrackingDisabled { path: name },
        TrackError::Lost { reason, .. } => ProviderError::TrackingLost { path: name, reason },
        TrackError::InUse { reason, .. } => ProviderError::InUse { path: name, reason },
        TrackError::Unsupported { reason, .. } => ProviderError::Unsupported { path: name, reason },
        TrackError::Io { context, source } => of_block(path, BlockError::Io { context, source }),
        TrackError::Block(error) => of_block(path, error),
    }
}
