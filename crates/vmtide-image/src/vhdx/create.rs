//! Creating a VHDX.

use super::allocate::Space;
use super::bat::{BatEntry, BatIndex, ENTRY_BYTES, EntryOf, Geometry, PayloadState};
use super::guid::Guid;
use super::header::{HEADER_OFFSETS, Header, Headers, MIB, encode_file_identifier};
use super::locator::{
    ABSOLUTE_WIN32_PATH, PARENT_LINKAGE, ParentLocator, RELATIVE_PATH, VOLUME_PATH,
};
use super::log_write::Journal;
use super::metadata::{
    BLOCK_BYTES, MAX_DISK_BYTES, Metadata, MetadataTable, VIRTUAL_DISK_SIZE, encode_region,
};
use super::region::{BAT_REGION, METADATA_REGION, REGION_TABLE_OFFSETS, Region, RegionTable};
use super::writer::{Parts, VhdxWriter};
use crate::bytes::{length, put};
use crate::create::new_file;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result, WritableBlockDevice};

/// The log of a new image: Hyper-V's size. It bounds how many pages change at once.
const LOG: ByteRange = ByteRange::new(MIB, MIB);
/// The metadata of a new image, where Hyper-V puts it.
const METADATA: ByteRange = ByteRange::new(2 * MIB, MIB);
/// The block table of a new image begins behind them.
const BAT_OFFSET: u64 = 3 * MIB;

/// The kind of a new image without a parent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VhdxKind {
    /// Blocks get a place in the file when they are first written.
    #[default]
    Dynamic,
    /// All blocks have their place from the beginning, in order. The file is sparse all the same.
    Fixed,
}

/// The parent of a new differencing image.
#[derive(Clone)]
pub struct VhdxParent {
    /// The parent's DataWriteGuid as [`crate::identity`] gives it, which the child will insist on.
    pub identity: String,
    /// The parent's VirtualDiskId, which a child takes over because the guest must see one disk
    /// whatever its checkpoints; a new one where it is not known.
    pub disk_id: Option<String>,
    /// The parent's path relative to the child's directory, in either spelling.
    pub relative_path: Option<String>,
    /// The parent's absolute path, in either spelling.
    pub absolute_path: Option<String>,
    /// The parent's path from the GUID of its volume (`\\?\Volume{...}\...`), on Windows.
    pub volume_path: Option<String>,
    /// The parent's disk.
    pub device: Arc<dyn BlockDevice>,
}

/// What a new image is like.
#[derive(Clone)]
pub struct VhdxCreateOptions {
    /// The size of the disk in bytes: a multiple of the logical sector size, at most 64 TiB.
    pub size_bytes: u64,
    /// The block size in bytes, a power of two from 1 to 256 MiB. Without it Hyper-V's: 32 MiB for
    /// dynamic images, 2 MiB for fixed and differencing ones.
    pub block_size_bytes: Option<u32>,
    /// The sector size that the guest addresses the disk by: 512 or 4096 bytes. A child must have
    /// its parent's.
    pub logical_sector_bytes: u32,
    /// The sector size that the guest is told the medium has: 512 or 4096 bytes.
    pub physical_sector_bytes: u32,
    /// The kind of an image without a parent.
    pub kind: VhdxKind,
    /// Whether nothing of what is written need be on the medium when it is done
    /// ([`RawDevice::without_flushes`](vmtide_block::RawDevice::without_flushes)): for images that can
    /// be made again.
    pub without_flushes: bool,
    /// The VirtualDiskId of an image without a parent, a GUID: for the copy of a disk that shall be known
    /// as the same one. A new one where it is not given; a child has its parent's.
    pub disk_id: Option<String>,
    /// What blocks that were never written read as.
    pub parent: Option<VhdxParent>,
}

impl VhdxCreateOptions {
    /// An empty dynamic disk of this size, as Hyper-V makes it.
    pub const fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            block_size_bytes: None,
            logical_sector_bytes: 512,
            physical_sector_bytes: 4096,
            kind: VhdxKind::Dynamic,
            without_flushes: false,
            disk_id: None,
            parent: None,
        }
    }
}

impl VhdxWriter {
    /// Creates an image at `path`, which must not exist.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] for options the format does not allow; [`BlockError::Io`] where
    /// the file cannot be made.
    pub fn create(path: impl AsRef<Path>, options: &VhdxCreateOptions) -> Result<Self> {
        let path = path.as_ref();
        let plan = Plan::new(&path.display().to_string(), options)?;
        let file = new_file(path, 0, options.without_flushes)?;
        plan.create(Arc::new(file))
    }

    /// Creates an image on a device that can be resized, whose content is lost.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_device(
        file: Arc<dyn WritableBlockDevice>,
        options: &VhdxCreateOptions,
    ) -> Result<Self> {
        let plan = Plan::new(&file.name(), options)?;
        file.resize(0)?;
        plan.create(file)
    }
}

/// Checked options.
struct Plan {
    parent: Option<Arc<dyn BlockDevice>>,
    metadata: Metadata,
    geometry: Geometry,
    bat: ByteRange,
    metadata_bytes: Vec<u8>,
}

impl Plan {
    fn new(name: &str, options: &VhdxCreateOptions) -> Result<Self> {
        let refuse = |detail: String| BlockError::unsupported(name, detail);
        check_sizes(options).map_err(refuse)?;
        let is_fixed = options.kind == VhdxKind::Fixed && options.parent.is_none();
        let usual = if is_fixed || options.parent.is_some() { 2 << 20 } else { 32 << 20 };
        let disk_id = match &options.parent {
            Some(parent) => parent.disk_id.as_ref(),
            None => options.disk_id.as_ref(),
        };
        let disk_id = match disk_id {
            Some(id) => id.parse().map_err(|_| refuse(format!("the disk id {id:?} is no GUID")))?,
            None => Guid::random()?,
        };
        let metadata = Metadata {
            block_size_bytes: options.block_size_bytes.unwrap_or(usual),
            leave_blocks_allocated: is_fixed,
            has_parent: options.parent.is_some(),
            disk_size_bytes: options.size_bytes,
            disk_id,
            logical_sector_bytes: options.logical_sector_bytes,
            physical_sector_bytes: options.physical_sector_bytes,
            parent_locator: options.parent.as_ref().map(locator).transpose().map_err(refuse)?,
        };
        let geometry = Geometry::of(&metadata);
        let bat_bytes = geometry.table_bytes().next_multiple_of(MIB).max(MIB);
        let metadata_bytes =
            metadata.items().and_then(|items| encode_region(&items)).map_err(refuse)?;
        if metadata_bytes.len() as u64 > METADATA.length {
            return Err(refuse("the names of the parent are too long for the metadata".into()));
        }
        Ok(Self {
            parent: options.parent.as_ref().map(|parent| parent.device.clone()),
            metadata,
            geometry,
            bat: ByteRange::new(BAT_OFFSET, bat_bytes),
            metadata_bytes,
        })
    }

    fn create(self, file: Arc<dyn WritableBlockDevice>) -> Result<VhdxWriter> {
        let name = file.name();
        let blocks =
            if self.metadata.leave_blocks_allocated { self.geometry.block_count() } else { 0 };
        let end = self.bat.end() + (blocks << self.geometry.block_bits);
        let mut space = Space::new(name.clone(), end)?;
        space.mark(0, end)?;
        file.resize(end)?;
        if blocks > 0 {
            self.write_fixed_table(&*file)?;
        }
        file.write_at(&self.metadata_bytes, METADATA.offset)?;
        let region = |id, range| Region { id, range, is_required: true };
        let regions = RegionTable {
            regions: vec![region(METADATA_REGION, METADATA), region(BAT_REGION, self.bat)],
        };
        for offset in REGION_TABLE_OFFSETS {
            file.write_at(&regions.encode(), offset)?;
        }
        let headers = write_headers(&*file)?;
        // All that the file identifier promises is durable before it is there: until then the
        // file is no image.
        file.flush()?;
        let creator = concat!("vmtide ", env!("CARGO_PKG_VERSION"));
        file.write_at(&encode_file_identifier(creator), 0)?;
        file.flush()?;
        let metadata_table = MetadataTable::decode(&self.metadata_bytes, METADATA);
        let size_item = metadata_table
            .map_err(|detail| BlockError::damaged(&name, detail))?
            .find(VIRTUAL_DISK_SIZE)
            .map_or(0, |entry| entry.range.offset);
        let writer = VhdxWriter::assemble(Parts {
            file,
            parent: self.parent,
            geometry: self.geometry,
            keeps_blocks: self.metadata.leave_blocks_allocated,
            size_item,
            regions,
            journal: Journal::new(headers),
        });
        *writer.space.lock() = Some(space);
        // The GUIDs are new already.
        writer.marked.store(true, Ordering::Release);
        Ok(writer)
    }

    /// The block table of an image all of whose blocks follow it in order.
    fn write_fixed_table(&self, file: &dyn WritableBlockDevice) -> Result<()> {
        let entries = self.geometry.entry_count();
        let mut first = 0;
        while first < entries {
            let count = (entries - first).min(MIB / ENTRY_BYTES);
            let mut bytes = vec![0; length(count * ENTRY_BYTES)];
            for index in 0..count {
                if let EntryOf::Payload(block) = self.geometry.entry_at(BatIndex(first + index)) {
                    let at = self.bat.end() + (block.0 << self.geometry.block_bits);
                    let entry = BatEntry::payload(PayloadState::FullyPresent, at);
                    put(&mut bytes, length(index * ENTRY_BYTES), &entry.0.to_le_bytes());
                }
            }
            file.write_at(&bytes, self.bat.offset + first * ENTRY_BYTES)?;
            first += count;
        }
        Ok(())
    }
}

fn check_sizes(options: &VhdxCreateOptions) -> Result<(), String> {
    for (what, size) in
        [("logical", options.logical_sector_bytes), ("physical", options.physical_sector_bytes)]
    {
        if !matches!(size, 512 | 4096) {
            return Err(format!("the {what} sector size is {size} bytes, must be 512 or 4096"));
        }
    }
    if let Some(size) = options.block_size_bytes
        && (!size.is_power_of_two() || !BLOCK_BYTES.contains(&size))
    {
        return Err(format!(
            "the block size is {size} bytes, must be a power of two from 1048576 to 268435456"
        ));
    }
    let (size, sector) = (options.size_bytes, options.logical_sector_bytes);
    if size > MAX_DISK_BYTES || !size.is_multiple_of(u64::from(sector)) {
        return Err(format!(
            "the disk has {size} bytes, must be a multiple of the sector size {sector} and at most \
             {MAX_DISK_BYTES}"
        ));
    }
    Ok(())
}

/// Both headers of a new file; the second one is current.
fn write_headers(file: &dyn WritableBlockDevice) -> Result<Headers> {
    let mut header = Header {
        sequence_number: 0,
        file_write_guid: Guid::random()?,
        data_write_guid: Guid::random()?,
        log_guid: Guid::NIL,
        log_version: 0,
        log: LOG,
    };
    for offset in HEADER_OFFSETS {
        header.sequence_number += 1;
        file.write_at(&header.encode(), offset)?;
    }
    Ok(Headers { current: header, slot: 1, other_fault: None })
}

/// The parent's names as Windows spells them. vmtide reads them in both spellings.
fn locator(parent: &VhdxParent) -> Result<ParentLocator, String> {
    let guid: Guid = parent
        .identity
        .parse()
        .map_err(|_| format!("the parent's identity {:?} is no GUID", parent.identity))?;
    let mut entries = vec![(PARENT_LINKAGE.to_owned(), format!("{{{guid}}}"))];
    let relative = parent.relative_path.as_deref().map(|path| {
        let path = windows_spelling(path);
        // Windows marks a path without directories as relative.
        if path.starts_with('.') { path } else { format!(".\\{path}") }
    });
    for (key, path) in [
        (RELATIVE_PATH, relative),
        (VOLUME_PATH, parent.volume_path.clone()),
        (ABSOLUTE_WIN32_PATH, parent.absolute_path.as_deref().map(windows_spelling)),
    ] {
        if let Some(path) = path.filter(|path| !path.is_empty()) {
            entries.push((key.to_owned(), path));
        }
    }
    if entries.len() == 1 {
        return Err("the parent of a differencing image needs a path".into());
    }
    Ok(ParentLocator { entries })
}

pub(super) fn windows_spelling(path: &str) -> String {
    path.replace('/', "\\")
}
