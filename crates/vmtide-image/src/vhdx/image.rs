//! A VHDX image that is open for reading.

use super::bat::{BITMAP_BLOCK_BYTES, BatEntry, BatIndex, BitmapBlockState};
use super::bat::{ChunkNumber, ENTRY_BYTES, Geometry};
use super::header::{MIB, read_creator};
use super::tables::Tables;
use super::walk::{Mapping, Run, Walk};
use crate::bytes::{le_u64, length};
use crate::image::push_placement;
use crate::table_cache::{Page, TableCache};
use crate::{DiskImage, Format, Placement};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, ExtentKind, Result, push_extent};

/// The entries of the BAT that are read together: 16 KiB. More would make a random read of a large
/// disk slow, fewer a scan.
pub(super) const BAT_PAGE_ENTRIES: u64 = 2048;
/// The most pages of the BAT in memory, 16 MiB: 64 TiB of disk at 32 MiB blocks, 2 TiB at 1 MiB.
const BAT_PAGES: usize = 1024;
/// The bytes of a sector bitmap that are read together; 16 MiB of disk at 512-byte sectors.
pub(super) const BITMAP_PAGE_BYTES: u64 = 4096;
/// The most pages of sector bitmaps in memory, 8 MiB: 32 GiB of partially present blocks.
const BITMAP_PAGES: usize = 2048;
/// The most extents in one answer.
const MAX_EXTENTS: usize = 1 << 16;
/// The most blocks, or runs of sectors, that one call of `extents` looks at: the caller gets its
/// turn, and its chance to cancel, within milliseconds.
pub(super) const MAX_RUNS_PER_CALL: u64 = 1 << 20;
/// Data runs at least this long are asked for holes in the file. A look costs two system calls; a
/// smaller run is read as fast.
const LEAST_HOLE_RUN: u64 = 256 << 10;

pub(super) type BatPage = Page<Box<[BatEntry]>>;
pub(super) type BitmapPage = Page<Box<[u8]>>;

/// A VHDX image that is open for reading, with the parent it reads through.
///
/// Any number of threads may read at once and no lock is held: entries of the BAT and pieces of
/// sector bitmaps are read when they are first needed and kept in caches of at most 24 MiB,
/// whatever the size of the disk. A log that was not replayed is laid over the file in memory. The
/// image must not be written by anybody while it is open here.
pub struct VhdxImage {
    name: String,
    file: Arc<dyn BlockDevice>,
    pub(super) file_bytes: u64,
    parent: Option<Arc<dyn BlockDevice>>,
    pub(super) geometry: Geometry,
    bat: ByteRange,
    pub(super) bat_cache: TableCache<Box<[BatEntry]>>,
    pub(super) bitmap_cache: TableCache<Box<[u8]>>,
}

impl VhdxImage {
    /// Opens an image from any device: a file, a network export, or bytes in memory. A differencing
    /// image needs its parent.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] naming the structure, its offset and the value found;
    /// [`BlockError::Unsupported`] for required structures that are unknown, and where the parent
    /// is missing.
    pub fn open_device(
        file: Arc<dyn BlockDevice>,
        parent: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        let name = file.name();
        read_creator(&*file)?;
        let (tables, replayed) = Tables::replayed(file)?;
        let file: Arc<dyn BlockDevice> =
            if replayed.is_unchanged() { replayed.into_file() } else { Arc::new(replayed) };
        if let (Some(link), None) = (tables.parent_link(), &parent) {
            return Err(BlockError::unsupported(
                name,
                format!(
                    "depends on the parent {:?}, which was not opened; allow it (backing policy) \
                     if you trust the image",
                    link.names.first().map_or("(not named)", String::as_str)
                ),
            ));
        }
        let geometry = tables.geometry;
        let bat = tables.bat();
        let bitmap_pages = geometry.chunk_count() * (BITMAP_BLOCK_BYTES / BITMAP_PAGE_BYTES);
        Ok(Self {
            name,
            file_bytes: file.size_bytes(),
            file,
            parent: parent.filter(|_| geometry.has_parent),
            geometry,
            bat,
            bat_cache: TableCache::new(
                geometry.entry_count().div_ceil(BAT_PAGE_ENTRIES),
                BAT_PAGES,
            ),
            bitmap_cache: TableCache::new(
                if geometry.has_parent { bitmap_pages } else { 0 },
                BITMAP_PAGES,
            ),
        })
    }

    pub(super) fn damaged(&self, detail: String) -> BlockError {
        BlockError::damaged(&self.name, detail)
    }

    /// The bytes of an entry's place in the file, for messages.
    pub(super) const fn entry_at(&self, index: BatIndex) -> u64 {
        self.bat.offset + index.0 * ENTRY_BYTES
    }

    pub(super) fn read_bat_page(&self, number: u64) -> Result<Box<[BatEntry]>> {
        let start = number * BAT_PAGE_ENTRIES * ENTRY_BYTES;
        let bytes = (BAT_PAGE_ENTRIES * ENTRY_BYTES).min(self.bat.length.saturating_sub(start));
        let mut page = vec![0; length(bytes)];
        self.file.read_at(&mut page, self.bat.offset + start)?;
        Ok(page.chunks_exact(8).map(|entry| BatEntry(le_u64(entry, 0))).collect())
    }

    /// Reads a piece of the sector bitmap that `entry`, at `index`, says where it is.
    pub(super) fn read_bitmap_page(
        &self,
        chunk: ChunkNumber,
        index: BatIndex,
        entry: BatEntry,
        start: u64,
    ) -> Result<Box<[u8]>> {
        let offset = entry.offset();
        let end = offset.checked_add(start + BITMAP_PAGE_BYTES);
        let inside = offset >= MIB && end.is_some_and(|end| end <= self.file_bytes);
        if entry.bitmap_state() != Some(BitmapBlockState::Present) || !inside {
            return Err(self.damaged(format!(
                "BAT entry {} at {:#x}: the sector bitmap of chunk {} has the state {} and is at \
                 {offset:#x}; partially present blocks need it present (6), behind the first MiB \
                 and inside the file of {} bytes",
                index.0,
                self.entry_at(index),
                chunk.0,
                entry.raw_state(),
                self.file_bytes
            )));
        }
        let mut page = vec![0; length(BITMAP_PAGE_BYTES)];
        self.file.read_at(&mut page, offset + start)?;
        Ok(page.into_boxed_slice())
    }

    /// Fills `buffer` from the parent, which may be shorter than this disk.
    fn read_parent(&self, buffer: &mut [u8], at: u64) -> Result<()> {
        let parent_bytes = self.parent.as_ref().map_or(0, BlockDevice::size_bytes);
        let present = buffer.len().min(length(parent_bytes.saturating_sub(at)));
        let (present, missing) = buffer.split_at_mut(present);
        missing.fill(0);
        match &self.parent {
            Some(parent) if !present.is_empty() => parent.read_at(present, at),
            _ => Ok(()),
        }
    }

    /// Appends what `source` says of `range` of this disk, which is at `source_offset` of it, and
    /// returns how many bytes that covers, at least one.
    fn push_from(
        extents: &mut Vec<Extent>,
        source: &dyn BlockDevice,
        range: ByteRange,
        source_offset: u64,
        kind_of: impl Fn(ExtentKind) -> ExtentKind,
    ) -> Result<u64> {
        let asked = ByteRange::new(source_offset, range.length);
        let mut covered = 0;
        for extent in source.extents(asked)? {
            if extent.range.offset != source_offset + covered || extent.range.end() > asked.end() {
                return Err(BlockError::damaged(
                    source.name(),
                    format!("extent {} does not continue the answer", extent.range),
                ));
            }
            let kind = kind_of(extent.kind);
            push_extent(extents, Extent::new(range.offset + covered, extent.range.length, kind));
            covered += extent.range.length;
        }
        if covered == 0 {
            return Err(BlockError::damaged(
                source.name(),
                format!("no extents reported for {asked}"),
            ));
        }
        Ok(covered)
    }

    /// Appends one run's extents and returns the bytes they cover, at least one.
    fn push_run(&self, extents: &mut Vec<Extent>, run: Run, at: u64) -> Result<u64> {
        let range = ByteRange::new(at, run.length);
        let kind = match (run.mapping, &self.parent) {
            (Mapping::File(offset), _) if run.length >= LEAST_HOLE_RUN => {
                // A hole in the file is zeros, whatever the file says it is.
                let kind_of = |kind: ExtentKind| match kind {
                    ExtentKind::Data => ExtentKind::Data,
                    _ => ExtentKind::Zero,
                };
                return Self::push_from(extents, &*self.file, range, offset, kind_of);
            }
            (Mapping::Below, Some(parent)) => {
                let end = range.end().min(parent.size_bytes());
                let mut covered = 0;
                if end > at {
                    let inside = ByteRange::from_bounds(at, end);
                    covered = Self::push_from(extents, &**parent, inside, at, |kind| kind)?;
                    if covered < inside.length {
                        return Ok(covered);
                    }
                }
                let rest = ByteRange::from_bounds(at + covered, range.end());
                push_extent(extents, Extent { range: rest, kind: ExtentKind::Unallocated });
                return Ok(run.length);
            }
            (mapping, _) => mapping.kind(),
        };
        push_extent(extents, Extent { range, kind });
        Ok(run.length)
    }
}

impl BlockDevice for VhdxImage {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.geometry.disk_size_bytes
    }

    fn block_size_bytes(&self) -> u32 {
        1 << self.geometry.sector_bits
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        let mut walk = Walk::new(self);
        let (mut rest, mut at) = (buffer, offset);
        while !rest.is_empty() {
            // A hostile bitmap can have a run for every sector: the buffer bounds them here.
            walk.steps = 0;
            let run = walk.run(at, rest.len() as u64)?;
            let (piece, after) = rest.split_at_mut(length(run.length));
            match run.mapping {
                Mapping::File(offset) => self.file.read_at(piece, offset)?,
                Mapping::Zero => piece.fill(0),
                Mapping::Below => self.read_parent(piece, at)?,
            }
            at += run.length;
            rest = after;
        }
        Ok(())
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.check_range(range)?;
        let mut extents = Vec::new();
        let mut walk = Walk::new(self);
        let mut at = range.offset;
        while at < range.end() && extents.len() < MAX_EXTENTS && walk.steps < MAX_RUNS_PER_CALL {
            let run = walk.run(at, range.end() - at)?;
            let covered = self.push_run(&mut extents, run, at)?;
            at += covered;
            if covered < run.length {
                // The parent or the file stopped early: the next call goes on.
                break;
            }
        }
        Ok(extents)
    }
}

impl DiskImage for VhdxImage {
    fn format(&self) -> Format {
        Format::Vhdx
    }

    fn layout(&self, range: ByteRange) -> Result<Vec<Placement>> {
        self.check_range(range)?;
        let mut placements = Vec::new();
        let mut walk = Walk::new(self);
        let mut at = range.offset;
        while at < range.end() && placements.len() < MAX_EXTENTS && walk.steps < MAX_RUNS_PER_CALL {
            let run = walk.run(at, range.end() - at)?;
            let file_offset = match run.mapping {
                Mapping::File(offset) => Some(offset),
                _ => None,
            };
            let range = ByteRange::new(at, run.length);
            let kind = run.mapping.kind();
            let placement = Placement { range, kind, file_offset, compressed: false };
            push_placement(&mut placements, placement);
            at += run.length;
        }
        Ok(placements)
    }
}
