//! A VHDX that is open for writing.

use super::allocate::{Claim, Space, UNIT_BYTES};
use super::bat::{BatEntry, BatIndex, ENTRY_BYTES, Geometry};
use super::log_write::Journal;
use super::pages::{PAGE_BYTES, Page, Pages};
use super::region::{BAT_REGION, RegionTable};
use crate::ImageWriter;
use crate::bytes::{le_u64, length};
use parking_lot::{Condvar, Mutex, RwLock};
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, Result, WritableBlockDevice};

/// The most memory that pages of the block table and of sector bitmaps take before they are
/// written to the file and dropped. 32 MiB map 2 PiB in blocks of 32 MiB, and the bitmaps of
/// 128 GiB of a differencing disk.
pub(super) const METADATA_BYTES: u64 = 32 << 20;

/// A VHDX that is open for writing.
///
/// # Concurrency
/// Any number of threads may read and write at once. A write to a block that is there goes straight
/// to the file. A write that allocates takes the metadata lock for moments; two writes that
/// allocate the same block wait for each other, and in a differencing image those that add sectors
/// to the same block. The data itself is always read and written with no lock but a shared gate
/// that only the reuse of freed space and a change of size close. Nothing else may have the image
/// open.
///
/// # What a crash leaves
/// The block table and the sector bitmaps in the file change only in
/// [`flush`](WritableBlockDevice::flush) (which is also called when changes take more than 32 MiB)
/// and only through the log: the data is made durable, then a log entry, then the tables are
/// written in place. So at every moment the file is a valid image that holds all that was flushed;
/// the worst is space that nothing refers to, which the next writer uses. Space that was freed is
/// used again only after that is durable. Dropping the writer without
/// [`finish`](ImageWriter::finish) is a crash in this sense: the next who opens the image has to
/// replay the log.
pub struct VhdxWriter {
    pub(super) name: String,
    pub(super) file: Arc<dyn WritableBlockDevice>,
    pub(super) parent: Option<Arc<dyn BlockDevice>>,
    /// Sizes and where things stand in the block table. Its size of the disk is that of when the
    /// image was opened; `size_bytes` is the present one.
    pub(super) geometry: Geometry,
    /// The image is fixed: blocks keep their place whatever they hold.
    pub(super) keeps_blocks: bool,
    /// Where the item that says the disk's size is, in the file.
    pub(super) size_item: u64,
    pub(super) size_bytes: AtomicU64,
    pub(super) metadata: RwLock<Metadata>,
    /// What of the file is in use; none until the first change needs it.
    pub(super) space: Mutex<Option<Space>>,
    /// The headers and the log.
    pub(super) journal: Mutex<Journal>,
    /// Blocks of the disk whose entry a thread is changing.
    busy: Mutex<HashSet<u64>>,
    busy_changed: Condvar,
    /// Shared by every read and write of data; closed for the moment in which freed space becomes
    /// free, so that nobody still uses an old mapping when it is given to somebody else, and while
    /// the size changes.
    pub(super) gate: RwLock<()>,
    /// Held by the one flush at a time.
    pub(super) flush_lock: Mutex<()>,
    /// A flush failed: memory and file no longer agree.
    pub(super) poisoned: AtomicBool,
    /// The image's headers say that this writer changed it.
    pub(super) marked: AtomicBool,
    marking: Mutex<()>,
    /// Held by the one change of size at a time.
    pub(super) resizing: Mutex<()>,
}

/// The metadata that is in memory.
pub(super) struct Metadata {
    /// Pages of the block table and of sector bitmaps.
    pub(super) pages: Pages,
    /// Where the region of the block table is.
    pub(super) bat: ByteRange,
    /// The whole region table.
    pub(super) regions: RegionTable,
    /// Parts of the file that nothing will refer to once the changes are durable.
    pub(super) frees: Vec<ByteRange>,
}

/// The parts of a [`VhdxWriter`] that opening and creating find out.
pub(super) struct Parts {
    pub(super) file: Arc<dyn WritableBlockDevice>,
    pub(super) parent: Option<Arc<dyn BlockDevice>>,
    pub(super) geometry: Geometry,
    pub(super) keeps_blocks: bool,
    pub(super) size_item: u64,
    pub(super) regions: RegionTable,
    pub(super) journal: Journal,
}

impl VhdxWriter {
    pub(super) fn assemble(parts: Parts) -> Self {
        Self {
            name: parts.file.name(),
            file: parts.file,
            parent: parts.parent,
            geometry: parts.geometry,
            keeps_blocks: parts.keeps_blocks,
            size_item: parts.size_item,
            size_bytes: AtomicU64::new(parts.geometry.disk_size_bytes),
            metadata: RwLock::new(Metadata {
                pages: Pages::default(),
                bat: parts.regions.find(BAT_REGION).unwrap_or(ByteRange::new(0, 0)),
                regions: parts.regions,
                frees: Vec::new(),
            }),
            space: Mutex::new(None),
            journal: Mutex::new(parts.journal),
            busy: Mutex::new(HashSet::new()),
            busy_changed: Condvar::new(),
            gate: RwLock::new(()),
            flush_lock: Mutex::new(()),
            poisoned: AtomicBool::new(false),
            marked: AtomicBool::new(false),
            marking: Mutex::new(()),
            resizing: Mutex::new(()),
        }
    }

    /// The block size in bytes: the unit of allocation.
    pub fn allocation_unit_bytes(&self) -> u64 {
        self.geometry.block_bytes()
    }

    /// The geometry with the present size of the disk.
    pub(super) fn present_geometry(&self) -> Geometry {
        Geometry { disk_size_bytes: self.size_bytes(), ..self.geometry }
    }

    /// What every change goes through first: refuses after a failed flush, marks the image at the
    /// first change, and keeps the memory of the tables bounded.
    pub(super) fn begin_change(&self) -> Result<()> {
        self.check_sound()?;
        if !self.marked.load(Ordering::Acquire) {
            self.mark_changed()?;
        }
        if self.metadata.read().pages.memory_bytes() > METADATA_BYTES {
            self.metadata.write().pages.drop_clean();
            if self.metadata.read().pages.memory_bytes() > METADATA_BYTES / 2 {
                self.flush()?;
                self.metadata.write().pages.drop_clean();
            }
        }
        Ok(())
    }

    pub(super) fn check_sound(&self) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(BlockError::damaged(
                &self.name,
                "an earlier flush failed, so what is in the file is not known; reopen and check it",
            ));
        }
        Ok(())
    }

    /// Finds out what of the file is in use, and says in the headers that the file and its disk
    /// are no longer what they were (MS-VHDX 2.2.2: FileWriteGuid and DataWriteGuid), which must be
    /// durable before anything else changes.
    fn mark_changed(&self) -> Result<()> {
        let _one_at_a_time = self.marking.lock();
        if self.marked.load(Ordering::Acquire) {
            return Ok(());
        }
        {
            let mut space = self.space.lock();
            if space.is_none() {
                let found = self.find_space()?;
                if self.file.size_bytes() < found.end_bytes() {
                    self.file.resize(found.end_bytes())?;
                }
                *space = Some(found);
            }
        }
        self.journal.lock().renew_guids(&*self.file)?;
        self.marked.store(true, Ordering::Release);
        Ok(())
    }

    /// Keeps other threads from changing the entries of these blocks of the disk.
    pub(super) fn hold(&self, blocks: Range<u64>) -> Hold<'_> {
        let mut busy = self.busy.lock();
        while blocks.clone().any(|block| busy.contains(&block)) {
            self.busy_changed.wait(&mut busy);
        }
        busy.extend(blocks.clone());
        Hold { writer: self, blocks }
    }

    fn check_write(&self, range: ByteRange) -> Result<()> {
        self.check_range(range)?;
        self.begin_change()
    }

    /// The page of metadata at this offset of the file.
    pub(super) fn page(&self, offset: u64) -> Result<Arc<Page>> {
        if let Some(page) = self.metadata.read().pages.cached(offset) {
            return Ok(page);
        }
        let mut metadata = self.metadata.write();
        if metadata.pages.memory_bytes() > METADATA_BYTES {
            metadata.pages.drop_clean();
        }
        metadata.pages.load(&*self.file, offset)
    }

    /// The block table's entry with this index.
    pub(super) fn entry(&self, index: BatIndex) -> Result<BatEntry> {
        let offset = self.metadata.read().bat.offset + index.0 * ENTRY_BYTES;
        let page = self.page(offset - offset % PAGE_BYTES)?;
        Ok(BatEntry(le_u64(&*page, length(offset % PAGE_BYTES))))
    }

    /// Changes the block table's entry with this index, in memory until the next flush.
    pub(super) fn set_entry(
        &self,
        metadata: &mut Metadata,
        index: BatIndex,
        entry: BatEntry,
    ) -> Result<()> {
        let offset = metadata.bat.offset + index.0 * ENTRY_BYTES;
        metadata.pages.change(&*self.file, offset - offset % PAGE_BYTES, |page| {
            crate::bytes::put(page, length(offset % PAGE_BYTES), &entry.0.to_le_bytes());
        })
    }

    /// Takes space for up to `wanted` blocks of `block_bytes` each, for at least one.
    pub(super) fn claim(&self, wanted: u64, block_bytes: u64) -> Result<Claim> {
        let mut space = self.space.lock();
        let Some(space) = space.as_mut() else {
            return Err(BlockError::damaged(&self.name, "space was claimed before any change"));
        };
        let claim = space.claim(wanted, block_bytes.next_multiple_of(UNIT_BYTES))?;
        if claim.fresh {
            self.file.resize(space.end_bytes())?;
        }
        Ok(claim)
    }
}

/// Blocks whose entry one thread may change; given back when dropped.
pub(super) struct Hold<'a> {
    writer: &'a VhdxWriter,
    blocks: Range<u64>,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut busy = self.writer.busy.lock();
        for block in self.blocks.clone() {
            busy.remove(&block);
        }
        self.writer.busy_changed.notify_all();
    }
}

impl BlockDevice for VhdxWriter {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    fn block_size_bytes(&self) -> u32 {
        1 << self.geometry.sector_bits
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let _gate = self.gate.read();
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        self.read_disk(buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let _gate = self.gate.read();
        self.check_range(range)?;
        self.find_extents(range)
    }
}

impl WritableBlockDevice for VhdxWriter {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        self.check_write(range)?;
        let _gate = self.gate.read();
        // Again: the size may have changed.
        self.check_range(range)?;
        self.write_data(data, offset)
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.check_write(range)?;
        let _gate = self.gate.read();
        self.check_range(range)?;
        self.zero_range(range)
    }

    fn expect_bulk_writes(&self) {
        self.file.expect_bulk_writes();
    }

    fn flush(&self) -> Result<()> {
        self.flush_metadata()
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.change_size(size_bytes)
    }
}

impl ImageWriter for VhdxWriter {
    fn next_identity(&self) -> Result<Option<String>> {
        if self.marked.load(Ordering::Acquire) {
            return Ok(None);
        }
        Ok(Some(self.journal.lock().next_data_write_guid()?.to_string()))
    }

    /// Flushes, empties the log, and cuts the free space off the end of the file. A later change
    /// opens the image anew.
    fn finish(&self) -> Result<()> {
        self.flush()?;
        let _one_at_a_time = self.flush_lock.lock();
        let _no_change_begins = self.marking.lock();
        let result = self.close_log();
        match result {
            Ok(()) => self.marked.store(false, Ordering::Release),
            Err(_) => self.poisoned.store(true, Ordering::Release),
        }
        result
    }
}
