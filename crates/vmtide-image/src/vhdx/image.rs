//! A VHDX image that is open for reading.

use super::bat::{BITMAP_BLOCK_BYTES, BatEntry, BatIndex, BlockNumber, ENTRY_BYTES};
use super::bat::{BitmapBlockState, ChunkNumber, Geometry, PayloadState};
use super::bits;
use super::header::{MIB, read_creator};
use super::tables::Tables;
use crate::bytes::{le_u64, length};
use crate::image::push_placement;
use crate::table_cache::{Page, TableCache};
use crate::{DiskImage, Format, Placement};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, ExtentKind, Result, push_extent};

/// The entries of the BAT that are read together: 16 KiB. More would make a random read of a large
/// disk slow, fewer a scan.
const BAT_PAGE_ENTRIES: u64 = 2048;
/// The most pages of the BAT in memory, 16 MiB: 64 TiB of disk at 32 MiB blocks, 2 TiB at 1 MiB.
const BAT_PAGES: usize = 1024;
/// The bytes of a sector bitmap that are read together; 16 MiB of disk at 512-byte sectors.
const BITMAP_PAGE_BYTES: u64 = 4096;
/// The most pages of sector bitmaps in memory, 8 MiB: 32 GiB of partially present blocks.
const BITMAP_PAGES: usize = 2048;
/// The most extents in one answer.
const MAX_EXTENTS: usize = 1 << 16;
/// The most blocks, or runs of sectors, that one call of `extents` looks at: the caller gets its
/// turn, and its chance to cancel, within milliseconds.
const MAX_RUNS_PER_CALL: u64 = 1 << 20;
/// Data runs at least this long are asked for holes in the file. A look costs two system calls; a
/// smaller run is read as fast.
const LEAST_HOLE_RUN: u64 = 256 << 10;

type BatPage = Page<Box<[BatEntry]>>;
type BitmapPage = Page<Box<[u8]>>;

/// A VHDX image that is open for reading, with the parent it reads through.
///
/// Any number of threads may read at once and no lock is held: entries of the BAT and pieces of
/// sector bitmaps are read when they are first needed and kept in caches of at most 24 MiB,
/// whatever the size of the disk. A log that was not replayed is laid over the file in memory. The
/// image must not be written by anybody while it is open here.
pub struct VhdxImage {
    name: String,
    file: Arc<dyn BlockDevice>,
    file_bytes: u64,
    parent: Option<Arc<dyn BlockDevice>>,
    geometry: Geometry,
    bat: ByteRange,
    bat_cache: TableCache<Box<[BatEntry]>>,
    bitmap_cache: TableCache<Box<[u8]>>,
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

    fn damaged(&self, detail: String) -> BlockError {
        BlockError::damaged(&self.name, detail)
    }

    /// The bytes of an entry's place in the file, for messages.
    const fn entry_at(&self, index: BatIndex) -> u64 {
        self.bat.offset + index.0 * ENTRY_BYTES
    }

    fn read_bat_page(&self, number: u64) -> Result<Box<[BatEntry]>> {
        let start = number * BAT_PAGE_ENTRIES * ENTRY_BYTES;
        let bytes = (BAT_PAGE_ENTRIES * ENTRY_BYTES).min(self.bat.length.saturating_sub(start));
        let mut page = vec![0; length(bytes)];
        self.file.read_at(&mut page, self.bat.offset + start)?;
        Ok(page.chunks_exact(8).map(|entry| BatEntry(le_u64(entry, 0))).collect())
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

/// Where a run of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mapping {
    /// At this byte of the file.
    File(u64),
    /// Nowhere: zeros.
    Zero,
    /// In the parent; where there is none, zeros.
    Below,
}

impl Mapping {
    const fn kind(self) -> ExtentKind {
        match self {
            Self::File(_) => ExtentKind::Data,
            Self::Zero => ExtentKind::Zero,
            Self::Below => ExtentKind::Unallocated,
        }
    }

    /// Whether `next` continues this mapping after `length` bytes.
    fn is_continued_by(self, next: Self, length: u64) -> bool {
        match (self, next) {
            (Self::File(offset), Self::File(next)) => offset + length == next,
            (one, other) => one == other,
        }
    }
}

/// A run of the disk with one mapping.
#[derive(Clone, Copy, Debug)]
struct Run {
    mapping: Mapping,
    length: u64,
}

/// A walk over the disk that keeps the pages it is in.
struct Walk<'a> {
    image: &'a VhdxImage,
    bat_page: Option<(u64, Arc<BatPage>)>,
    bitmap_page: Option<(u64, Arc<BitmapPage>)>,
    /// The runs looked at.
    steps: u64,
    /// The run after the last one that was joined, with where it begins.
    ahead: Option<(u64, Run)>,
}

impl<'a> Walk<'a> {
    const fn new(image: &'a VhdxImage) -> Self {
        Self { image, bat_page: None, bitmap_page: None, steps: 0, ahead: None }
    }

    fn entry(&mut self, index: BatIndex) -> Result<BatEntry> {
        let (number, inside) = (index.0 / BAT_PAGE_ENTRIES, length(index.0 % BAT_PAGE_ENTRIES));
        let page = match &mut self.bat_page {
            Some((held, page)) if *held == number => page,
            slot => {
                let image = self.image;
                let page = image.bat_cache.get_or_read(number, || image.read_bat_page(number))?;
                &mut slot.insert((number, page)).1
            }
        };
        Ok(page.entries.get(inside).copied().unwrap_or_default())
    }

    /// The whole run at `at`, as far as mappings continue each other, at most `limit` bytes.
    fn run(&mut self, at: u64, limit: u64) -> Result<Run> {
        let mut run = match self.ahead.take() {
            Some((start, run)) if start == at => Run { length: run.length.min(limit), ..run },
            _ => self.piece(at, limit)?,
        };
        while run.length < limit && self.steps < MAX_RUNS_PER_CALL {
            let next_at = at + run.length;
            let next = self.piece(next_at, limit - run.length)?;
            if !run.mapping.is_continued_by(next.mapping, run.length) {
                self.ahead = Some((next_at, next));
                break;
            }
            run.length += next.length;
        }
        Ok(run)
    }

    /// The run at `at` inside its block, at most `limit` bytes.
    fn piece(&mut self, at: u64, limit: u64) -> Result<Run> {
        self.steps += 1;
        let geometry = self.image.geometry;
        let block = geometry.block_of(at);
        let inside = at & (geometry.block_bytes() - 1);
        let length = limit.min(geometry.block_bytes() - inside);
        let index = geometry.payload_index(block);
        let entry = self.entry(index)?;
        let mapping = match entry.payload_state() {
            Some(PayloadState::NotPresent) => Mapping::Below,
            Some(PayloadState::Undefined | PayloadState::Zero | PayloadState::Unmapped) => {
                Mapping::Zero
            }
            Some(PayloadState::FullyPresent) => self.in_file(block, index, entry, inside)?,
            Some(PayloadState::PartiallyPresent) if geometry.has_parent => {
                let (is_present, length) = self.bits(at, length)?;
                let mapping = match is_present {
                    true => self.in_file(block, index, entry, inside)?,
                    false => Mapping::Below,
                };
                return Ok(Run { mapping, length });
            }
            _ => {
                return Err(self.image.damaged(format!(
                    "BAT entry {} at {:#x}: the state of payload block {} is {}, which {}",
                    index.0,
                    self.image.entry_at(index),
                    block.0,
                    entry.raw_state(),
                    if entry.raw_state() == 7 { "needs a parent" } else { "does not exist" }
                )));
            }
        };
        Ok(Run { mapping, length })
    }

    /// Where byte `inside` of a block is in the file. All of the block that is disk must be there.
    fn in_file(
        &self,
        block: BlockNumber,
        index: BatIndex,
        entry: BatEntry,
        inside: u64,
    ) -> Result<Mapping> {
        let image = self.image;
        let offset = entry.offset();
        let end = offset.checked_add(image.geometry.bytes_of(block));
        if offset < MIB || end.is_none_or(|end| end > image.file_bytes) {
            return Err(image.damaged(format!(
                "BAT entry {} at {:#x}: payload block {} at {offset:#x} is not behind the first \
                 MiB and inside the file of {} bytes",
                index.0,
                image.entry_at(index),
                block.0,
                image.file_bytes
            )));
        }
        Ok(Mapping::File(offset + inside))
    }

    /// Whether the sector at `at` is in this image, and for how many bytes that goes on; `limit`
    /// does not leave the block.
    fn bits(&mut self, at: u64, limit: u64) -> Result<(bool, u64)> {
        let geometry = self.image.geometry;
        let chunk = geometry.chunk_of(geometry.block_of(at));
        let bit = geometry.bitmap_bit(at);
        let bits_per_page = BITMAP_PAGE_BYTES * 8;
        let page_in_chunk = bit / bits_per_page;
        let number = chunk.0 * (BITMAP_BLOCK_BYTES / BITMAP_PAGE_BYTES) + page_in_chunk;
        if self.bitmap_page.as_ref().is_none_or(|(held, _)| *held != number) {
            let image = self.image;
            let index = geometry.bitmap_index(chunk);
            let entry = self.entry(index)?;
            let page = image.bitmap_cache.get_or_read(number, || {
                image.read_bitmap_page(chunk, index, entry, page_in_chunk * BITMAP_PAGE_BYTES)
            })?;
            self.bitmap_page = Some((number, page));
        }
        let bytes: &[u8] = self.bitmap_page.as_ref().map_or(&[], |(_, page)| &page.entries);
        let from = bit % bits_per_page;
        // The first sector may begin before `at`.
        let skipped = at & (geometry.sector_bytes() - 1);
        let end = bits_per_page.min(from + (skipped + limit).div_ceil(geometry.sector_bytes()));
        let (is_present, sectors) = bits::run(bytes, from, end);
        let run_bytes = (sectors << geometry.sector_bits) - skipped;
        Ok((is_present, run_bytes.min(limit)))
    }
}

impl VhdxImage {
    fn read_bitmap_page(
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
