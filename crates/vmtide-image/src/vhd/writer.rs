//! A VHD that is open for writing.

use super::bitmap::Bitmap;
use super::footer::{FOOTER_BYTES, Footer, Kind, Located};
use super::header::{ABSENT, BlockShape, Header, read_entries};
use super::image::{Opened, read_bitmap};
use super::parent::refuse_without_parent;
use super::read::{Layers, Tables};
use crate::ImageWriter;
use crate::bytes::length;
use parking_lot::{Condvar, Mutex, RwLock};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, Result, WritableBlockDevice};

/// The most block table entries of an image that is written: its table is in memory as a whole,
/// 32 MiB. Disks of 2040 GiB with blocks of 256 KiB or more have fewer.
pub(super) const MAX_ENTRIES: u64 = 8 << 20;

/// The most memory that sector bitmaps take before they are written to the file and dropped.
pub(super) const BITMAP_BYTES: u64 = 16 << 20;

/// A VHD that is open for writing.
///
/// # Concurrency
/// Any number of threads may read and write at once. A write to a block that is there goes straight
/// to the file. A write that allocates a block takes a lock for the moment in which the block gets
/// its place; two that need the same block wait for each other. No lock but a shared gate that only
/// [`resize`](WritableBlockDevice::resize) closes is held while data is read or written. Nothing
/// else may have the image open.
///
/// # What a crash leaves
/// The block table and the sector bitmaps in the file change only in
/// [`flush`](WritableBlockDevice::flush) (which is also called when changed bitmaps take more than
/// 16 MiB), after the data they lead to is durable. New blocks take the place of the footer at the
/// end, which moves; whenever it is not where it should be the copy at the start of the file is
/// right, and no writer leaves bytes of the guest at the end of the file. So at every moment the
/// file is a valid image that holds all that was flushed; the worst is space that nothing refers
/// to, which `check --repair` gives back. Dropping the writer without a flush is a crash in this
/// sense.
pub struct VhdWriter {
    pub(super) layers: Layers,
    pub(super) file: Arc<dyn WritableBlockDevice>,
    pub(super) size_bytes: AtomicU64,
    /// Shared by everything; closed by what changes the header or the size.
    pub(super) state: RwLock<State>,
    pub(super) space: Mutex<Space>,
    /// Blocks in which a thread allocates, or completes sectors.
    busy: Mutex<HashSet<u64>>,
    busy_changed: Condvar,
    bitmaps: RwLock<HashMap<u64, Arc<Bitmap>>>,
    /// How often bitmaps were dropped from memory; changes only under the lock of `bitmaps`.
    dropped: AtomicU64,
    pub(super) changed: Mutex<Changed>,
    /// Held by the one flush at a time.
    pub(super) flush_lock: Mutex<()>,
    /// A flush failed: memory and file no longer agree.
    pub(super) poisoned: AtomicBool,
    /// Both footers are right, so that a crash can be survived.
    ready: AtomicBool,
    pub(super) making_ready: Mutex<()>,
}

/// What the footer, the header and the block table say.
pub(super) struct State {
    pub(super) footer: Footer,
    /// None for fixed disks.
    pub(super) header: Option<Header>,
    /// The block table.
    pub(super) entries: Vec<AtomicU32>,
}

/// How the file is used.
pub(super) struct Space {
    /// Everything before is in use (or was, before a crash); from here on blocks are allocated.
    pub(super) end: u64,
    /// The length of the file.
    pub(super) file_bytes: u64,
    /// Footers in the part that is not in use.
    pub(super) footers: Vec<u64>,
    /// Footers that were cut off with the end of the file, which is not durable yet: a crash could
    /// bring them back when the file has grown over them.
    pub(super) cut_footers: Vec<u64>,
    /// Whether the file has a right footer at its end, and one at its start where it needs one.
    pub(super) trailer_right: bool,
    pub(super) copy_right: bool,
}

/// What the next flush brings to the file.
#[derive(Default)]
pub(super) struct Changed {
    /// Entries of the block table.
    pub(super) entries: BTreeSet<u64>,
    /// Bitmaps of blocks.
    pub(super) bitmaps: BTreeMap<u64, Arc<Bitmap>>,
}

impl VhdWriter {
    /// Opens an existing image for writing, over any device. A differencing one needs its parent.
    ///
    /// # Errors
    /// As [`VhdImage::open_device`](super::VhdImage::open_device), and [`BlockError::Damaged`]
    /// where writing would destroy data: blocks that share bytes of the file with each other or
    /// with the header.
    pub fn open_device(
        file: Arc<dyn WritableBlockDevice>,
        parent: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        let located = Located::find(&*file)?;
        let opened = Opened::new(&*file, &located)?;
        if opened.kind() == Kind::Differencing && parent.is_none() {
            return Err(refuse_without_parent(&*file, &opened));
        }
        let entries = read_table(&*file, &opened)?;
        let used = super::check::place_blocks(&*file, &opened, &entries)?;
        let body = located.body_bytes(&*file).next_multiple_of(FOOTER_BYTES);
        let footer_now = opened.footer.encode();
        let file_bytes = file.size_bytes();
        // One of 511 bytes, or at an odd place, is replaced by a new one behind it.
        let trailer = located.trailer.filter(|trailer| {
            trailer.is_multiple_of(FOOTER_BYTES) && trailer + FOOTER_BYTES == file_bytes
        });
        let space = Space {
            end: body.max(used),
            file_bytes,
            trailer_right: trailer.is_some() || opened.kind() == Kind::Fixed,
            footers: trailer.into_iter().collect(),
            cut_footers: Vec::new(),
            copy_right: located
                .copy
                .is_none_or(|copy| copy.is_ok_and(|copy| copy.encode() == footer_now)),
        };
        let parent = parent.filter(|_| opened.kind() == Kind::Differencing);
        Ok(Self::assemble(file, parent, opened, entries, space))
    }

    fn assemble(
        file: Arc<dyn WritableBlockDevice>,
        parent: Option<Arc<dyn BlockDevice>>,
        opened: Opened,
        entries: Vec<u32>,
        space: Space,
    ) -> Self {
        let layers = Layers {
            name: file.name(),
            file: file.clone(),
            parent,
            kind: opened.kind(),
            shape: opened.shape(),
        };
        Self {
            layers,
            size_bytes: AtomicU64::new(opened.size_bytes),
            state: RwLock::new(State {
                footer: opened.footer,
                header: opened.header,
                entries: entries.into_iter().map(AtomicU32::new).collect(),
            }),
            file,
            ready: AtomicBool::new(space.trailer_right && space.copy_right),
            space: Mutex::new(space),
            busy: Mutex::new(HashSet::new()),
            busy_changed: Condvar::new(),
            bitmaps: RwLock::new(HashMap::new()),
            dropped: AtomicU64::new(0),
            changed: Mutex::new(Changed::default()),
            flush_lock: Mutex::new(()),
            poisoned: AtomicBool::new(false),
            making_ready: Mutex::new(()),
        }
    }

    /// The block size in bytes: the unit of allocation; none for fixed disks.
    pub fn allocation_unit_bytes(&self) -> Option<u64> {
        (self.layers.kind != Kind::Fixed).then_some(self.layers.shape.block_bytes)
    }

    /// The memory that sector bitmaps take now, in bytes.
    pub fn held_bitmap_bytes(&self) -> u64 {
        self.bitmaps.read().len() as u64 * self.shape().bitmap_bytes
    }

    pub(super) fn shape(&self) -> BlockShape {
        self.layers.shape
    }

    /// What every change goes through first, without any lock held: refuses after a failed flush,
    /// puts the footers right, and keeps the memory of the bitmaps bounded.
    fn begin_change(&self) -> Result<()> {
        self.check_sound()?;
        if !self.ready.load(Ordering::Acquire) {
            self.make_ready()?;
            self.ready.store(true, Ordering::Release);
        }
        let most = length(BITMAP_BYTES / self.shape().bitmap_bytes).max(2);
        if self.changed.lock().bitmaps.len() > most / 2 {
            self.flush()?;
        }
        if self.bitmaps.read().len() > most {
            self.drop_bitmaps();
        }
        Ok(())
    }

    /// Drops the bitmaps from memory that nobody uses and that the file has as they are.
    pub(super) fn drop_bitmaps(&self) {
        let mut bitmaps = self.bitmaps.write();
        let changed = self.changed.lock();
        self.dropped.fetch_add(1, Ordering::AcqRel);
        // One that a thread uses or a flush is writing has another owner.
        bitmaps.retain(|block, bitmap| {
            Arc::strong_count(bitmap) > 1 || changed.bitmaps.contains_key(block)
        });
    }

    pub(super) fn check_sound(&self) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(BlockError::damaged(
                &self.layers.name,
                "an earlier flush failed, so what is in the file is not known; reopen and check it",
            ));
        }
        Ok(())
    }

    /// Keeps other threads from allocating this block or completing its sectors.
    pub(super) fn hold(&self, block: u64) -> Hold<'_> {
        let mut busy = self.busy.lock();
        while !busy.insert(block) {
            self.busy_changed.wait(&mut busy);
        }
        Hold { writer: self, block }
    }

    /// The bitmap of a block that begins at `start`.
    pub(super) fn bitmap(&self, block: u64, start: u64) -> Result<Arc<Bitmap>> {
        loop {
            let dropped = {
                let bitmaps = self.bitmaps.read();
                if let Some(bitmap) = bitmaps.get(&block) {
                    return Ok(bitmap.clone());
                }
                self.dropped.load(Ordering::Acquire)
            };
            let read = Arc::new(read_bitmap(&*self.file, self.shape(), block, start)?);
            let mut bitmaps = self.bitmaps.write();
            // Another thread may have read it as well, and changed its own by now: the first counts.
            if let Some(bitmap) = bitmaps.get(&block) {
                return Ok(bitmap.clone());
            }
            // It may even have changed, written and dropped it: what was read here is then old.
            if self.dropped.load(Ordering::Acquire) == dropped {
                bitmaps.insert(block, read.clone());
                return Ok(read);
            }
        }
    }

    /// Enters the bitmap of a block that is not in the table yet.
    pub(super) fn new_bitmap(&self, block: u64, bitmap: Arc<Bitmap>) {
        self.bitmaps.write().insert(block, bitmap);
    }

    /// Marks sectors of a block as this disk's own; their data is written.
    pub(super) fn set_sectors(&self, block: u64, bitmap: &Arc<Bitmap>, first: u64, end: u64) {
        if bitmap.run(first, end) == (true, end.saturating_sub(first).max(1)) {
            return;
        }
        // Bits and note at once: who finds a bit set writes no note of its own, and the flush that
        // it does then must find this one.
        let mut changed = self.changed.lock();
        if bitmap.set(first, end) {
            changed.bitmaps.insert(block, bitmap.clone());
        }
    }

    fn check_write(&self, range: ByteRange) -> Result<()> {
        self.check_range(range)?;
        self.begin_change()
    }
}

/// Reads the whole block table.
pub(super) fn read_table(file: &dyn BlockDevice, opened: &Opened) -> Result<Vec<u32>> {
    let Some(header) = &opened.header else {
        return Ok(Vec::new());
    };
    if opened.entries > MAX_ENTRIES {
        return Err(BlockError::unsupported(
            file.name(),
            format!(
                "has {} blocks of {} bytes; images of at most {MAX_ENTRIES} blocks are written: \
                 convert it to one with larger blocks",
                opened.entries, header.block_bytes
            ),
        ));
    }
    if !header.table_offset.is_multiple_of(FOOTER_BYTES) {
        return Err(BlockError::unsupported(
            file.name(),
            format!(
                "has its block table at {:#x}, not at a multiple of 512, so it cannot be written \
                 safely: convert it",
                header.table_offset
            ),
        ));
    }
    read_entries(file, header, 0, opened.entries)
}

impl State {
    /// Where the block begins in the file.
    pub(super) fn block(&self, shape: BlockShape, block: u64) -> Option<u64> {
        let entry = self.entries.get(length(block))?;
        shape.start(entry.load(Ordering::Acquire))
    }
}

/// A block in which one thread may allocate; given back when dropped.
pub(super) struct Hold<'a> {
    writer: &'a VhdWriter,
    block: u64,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.writer.busy.lock().remove(&self.block);
        self.writer.busy_changed.notify_all();
    }
}

/// The tables of an open writer at one moment of the gate.
pub(super) struct View<'a> {
    pub(super) writer: &'a VhdWriter,
    pub(super) state: &'a State,
}

impl Tables for View<'_> {
    fn block(&self, block: u64) -> Result<Option<u64>> {
        Ok(self.state.block(self.writer.shape(), block))
    }

    fn sectors(&self, block: u64, start: u64, first: u64, end: u64) -> Result<(bool, u64)> {
        Ok(self.writer.bitmap(block, start)?.run(first, end))
    }
}

impl BlockDevice for VhdWriter {
    fn name(&self) -> String {
        self.layers.name.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        let state = self.state.read();
        self.layers.read(&View { writer: self, state: &state }, buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.check_range(range)?;
        let state = self.state.read();
        self.layers.extents(&View { writer: self, state: &state }, range)
    }
}

impl WritableBlockDevice for VhdWriter {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.check_write(ByteRange::new(offset, data.len() as u64))?;
        let state = self.state.read();
        self.write_data(&state, data, offset)
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.check_write(range)?;
        let state = self.state.read();
        self.zero_range(&state, range)
    }

    fn expect_bulk_writes(&self) {
        self.file.expect_bulk_writes();
    }

    fn flush(&self) -> Result<()> {
        self.flush_tables()
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.begin_change()?;
        self.grow(size_bytes)
    }
}

impl ImageWriter for VhdWriter {}

/// A new table entry for a block at `start`.
pub(super) fn entry_of(name: &str, start: u64) -> Result<u32> {
    match u32::try_from(start / 512) {
        Ok(entry) if entry != ABSENT => Ok(entry),
        _ => Err(BlockError::unsupported(
            name,
            format!("its file would grow past {start} bytes; a VHD's ends at 2 TiB"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhd::{VhdCreateOptions, VhdKind, VhdParent};
    use std::sync::Weak;
    use vmtide_block::MemoryDevice;

    /// A medium that does something else between one read and what its caller does with it.
    struct Slow {
        memory: Arc<MemoryDevice>,
        meanwhile: Mutex<Option<Weak<VhdWriter>>>,
    }

    impl BlockDevice for Slow {
        fn name(&self) -> String {
            self.memory.name()
        }

        fn size_bytes(&self) -> u64 {
            self.memory.size_bytes()
        }

        fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
            self.memory.read_at(buffer, offset)?;
            let meanwhile = self.meanwhile.lock().take();
            if let Some(writer) = meanwhile.and_then(|writer| writer.upgrade()) {
                // What another thread may do: change the same bitmap, write it, drop it.
                writer.write_at(&[7; 512], 5 * 512)?;
                writer.flush()?;
                writer.drop_bitmaps();
            }
            Ok(())
        }
    }

    impl WritableBlockDevice for Slow {
        fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
            self.memory.write_at(data, offset)
        }

        fn write_zeroes(&self, range: ByteRange) -> Result<()> {
            self.memory.write_zeroes(range)
        }

        fn flush(&self) -> Result<()> {
            Ok(())
        }

        fn resize(&self, size_bytes: u64) -> Result<()> {
            self.memory.resize(size_bytes)
        }
    }

    #[test]
    fn a_bitmap_that_was_read_before_it_changed_is_read_again() {
        let parent: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::from_bytes(vec![1; 64 << 10]));
        let memory = Arc::new(MemoryDevice::new(0));
        let options = VhdCreateOptions {
            kind: VhdKind::Differencing(VhdParent {
                name: "parent.vhd".into(),
                absolute_path: None,
                identity: "5fa21a55-f394-aa4d-9958-1951a67d5540".into(),
                device: parent.clone(),
            }),
            ..VhdCreateOptions::new(64 << 10)
        };
        let writer = VhdWriter::create_device(memory.clone(), &options).unwrap();
        writer.write_at(&[6; 512], 0).unwrap();
        writer.finish().unwrap();
        let slow = Arc::new(Slow { memory, meanwhile: Mutex::new(None) });
        let writer = Arc::new(VhdWriter::open_device(slow.clone(), Some(parent)).unwrap());
        *slow.meanwhile.lock() = Some(Arc::downgrade(&writer));
        let mut first = [0; 512];
        writer.read_at(&mut first, 0).unwrap();
        let mut fifth = [0; 512];
        writer.read_at(&mut fifth, 5 * 512).unwrap();
        assert!((first, fifth) == ([6; 512], [7; 512]), "the parent shows through");
    }
}
