//! A VHD that is open for reading.

use super::bitmap::Bitmap;
use super::footer::{Kind, Located};
use super::header::{BlockShape, Header, read_entries};
use super::parent::refuse_without_parent;
use super::read::{Layers, Tables};
use crate::bytes::length;
use crate::table_cache::TableCache;
use crate::{DiskImage, Format, Placement};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, Result};

/// The entries of the block table that are read at a time: 64 KiB, which with the usual blocks map
/// 32 GiB of disk.
const PAGE_ENTRIES: u64 = 1 << 14;

/// The most pages of the block table in memory, 8 MiB. With the usual blocks the largest disk has
/// 64 of them.
const MAX_PAGES: usize = 128;

/// The most memory that sector bitmaps take.
const BITMAP_BYTES: u64 = 8 << 20;

/// A VHD that is open for reading.
///
/// Any number of threads may read at once, without locks: what the header says is immutable, and
/// table pages and sector bitmaps come from caches of atomic pointers of at most 16 MiB together
/// (and a few bytes per entry for keeping them). Opening reads the footer and the header only. The
/// image must not be written by anybody while it is open here.
pub struct VhdImage {
    layers: Layers,
    size_bytes: u64,
    tables: CachedTables,
}

/// The block table and the bitmaps, a page at a time.
struct CachedTables {
    file: Arc<dyn BlockDevice>,
    /// None for fixed disks.
    header: Option<Header>,
    entries: u64,
    pages: TableCache<Vec<u32>>,
    bitmaps: TableCache<Bitmap>,
}

impl VhdImage {
    /// Opens an image from any device. A differencing one needs its parent; it is for the caller to
    /// see that it is the right one ([`crate::identity`]).
    ///
    /// # Errors
    /// [`BlockError::Damaged`] naming the structure, its offset and the value found;
    /// [`BlockError::Unsupported`] where the image needs a parent and none was given.
    pub fn open_device(
        file: Arc<dyn BlockDevice>,
        parent: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        let located = Located::find(&*file)?;
        let opened = Opened::new(&*file, &located)?;
        if opened.kind() == Kind::Differencing && parent.is_none() {
            return Err(refuse_without_parent(&*file, &opened));
        }
        let shape = opened.shape();
        let layers = Layers {
            name: file.name(),
            file: file.clone(),
            parent: parent.filter(|_| opened.kind() == Kind::Differencing),
            kind: opened.kind(),
            shape,
        };
        let bitmaps = match opened.kind() {
            Kind::Differencing => opened.entries.min(BITMAP_BYTES / shape.bitmap_bytes),
            _ => 0,
        };
        let tables = CachedTables {
            file,
            entries: opened.entries,
            pages: TableCache::new(opened.entries.div_ceil(PAGE_ENTRIES), MAX_PAGES),
            bitmaps: TableCache::new(opened.entries, length(bitmaps)),
            header: opened.header,
        };
        Ok(Self { layers, size_bytes: opened.size_bytes, tables })
    }
}

/// What the footer and the header say, checked against the file.
pub(crate) struct Opened {
    pub(crate) footer: super::footer::Footer,
    /// None for fixed disks.
    pub(crate) header: Option<Header>,
    pub(crate) size_bytes: u64,
    /// The entries of the block table that the disk needs.
    pub(crate) entries: u64,
}

impl Opened {
    pub(crate) fn new(file: &dyn BlockDevice, located: &Located) -> Result<Self> {
        let footer = located.footer.clone();
        if footer.kind == Kind::Fixed {
            let capacity = located.body_bytes(file);
            let size_bytes = footer.size_bytes(capacity);
            if size_bytes > capacity {
                return Err(BlockError::damaged(
                    file.name(),
                    format!(
                        "footer: a fixed disk of {size_bytes} bytes does not fit in front of it in \
                         {capacity} bytes: the image is truncated"
                    ),
                ));
            }
            return Ok(Self { footer, header: None, size_bytes, entries: 0 });
        }
        let header = Header::read(file, &footer)?;
        let size_bytes = footer.size_bytes(header.capacity_bytes());
        let entries = header.check_table(file, size_bytes)?;
        Ok(Self { footer, header: Some(header), size_bytes, entries })
    }

    pub(crate) fn kind(&self) -> Kind {
        self.footer.kind
    }

    pub(crate) fn shape(&self) -> BlockShape {
        self.header.as_ref().map_or(BlockShape::new(512), Header::blocks)
    }
}

/// Reads the bitmap of the block that begins at `start`.
pub(crate) fn read_bitmap(
    file: &dyn BlockDevice,
    shape: BlockShape,
    block: u64,
    start: u64,
) -> Result<Bitmap> {
    match super::footer::read_at(file, start, shape.bitmap_bytes)? {
        Some(bytes) => Ok(Bitmap::from_bytes(&bytes)),
        None => Err(BlockError::damaged(
            file.name(),
            format!(
                "block table, entry {block}: the sector bitmap at {start:#x} is past the end of \
                 the file of {} bytes: the image is truncated",
                file.size_bytes()
            ),
        )),
    }
}

impl Tables for CachedTables {
    fn block(&self, block: u64) -> Result<Option<u64>> {
        let Some(header) = self.header.as_ref().filter(|_| block < self.entries) else {
            return Ok(None);
        };
        let (number, inside) = (block / PAGE_ENTRIES, block % PAGE_ENTRIES);
        let page = self.pages.get_or_read(number, || {
            let first = number * PAGE_ENTRIES;
            read_entries(&*self.file, header, first, PAGE_ENTRIES.min(self.entries - first))
        })?;
        let entry = page.entries.get(length(inside)).copied();
        match entry.and_then(|entry| header.blocks().start(entry)) {
            // Where the footer's copy is. Other overlaps only show the guest the image's own
            // tables; this is what a table of zeros, which was never written, looks like.
            Some(0) => Err(BlockError::damaged(
                self.file.name(),
                format!("block table at {:#x}, entry {block}: 0 is no block", header.table_offset),
            )),
            start => Ok(start),
        }
    }

    fn sectors(&self, block: u64, start: u64, first: u64, end: u64) -> Result<(bool, u64)> {
        let shape = self.header.as_ref().map_or(BlockShape::new(512), Header::blocks);
        let page =
            self.bitmaps.get_or_read(block, || read_bitmap(&*self.file, shape, block, start))?;
        Ok(page.entries.run(first, end))
    }
}

impl BlockDevice for VhdImage {
    fn name(&self) -> String {
        self.layers.name.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        self.layers.read(&self.tables, buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.check_range(range)?;
        self.layers.extents(&self.tables, range)
    }
}

impl DiskImage for VhdImage {
    fn format(&self) -> Format {
        Format::Vhd
    }

    fn layout(&self, range: ByteRange) -> Result<Vec<Placement>> {
        self.check_range(range)?;
        self.layers.layout(&self.tables, range)
    }
}
