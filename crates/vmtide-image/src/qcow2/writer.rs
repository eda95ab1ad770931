//! A qcow2 image that is open for writing.

use super::compress::Compressor;
use super::header::{Header, autoclear, incompatible};
use super::image::{Companions, check_readable};
use super::metadata::Metadata;
use super::read::{Layers, Tables};
use super::table::{Geometry, L2Table};
use crate::{CompressedWriter, ImageWriter};
use parking_lot::{Condvar, Mutex, RwLock};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, Result, WritableBlockDevice};

/// The most memory that L2 tables and refcount blocks take before they are written to the file
/// and dropped. At 64 KiB clusters 32 MiB map 256 GiB of disk at a time.
const METADATA_BYTES: u64 = 32 << 20;

/// A qcow2 image that is open for writing.
///
/// # Concurrency
/// Any number of threads may read and write at once. A write to clusters that are allocated and
/// not shared goes straight to the file. A write that allocates takes the metadata lock twice for
/// moments (to claim clusters, and to enter them in the L2 table after the data is written); two
/// writes that allocate the same cluster wait for each other. The data itself is always read and
/// written with no lock but a shared gate that only the reuse of freed clusters closes. Nothing
/// else may have the image open.
///
/// # What a crash leaves
/// The tables in the file change only in [`flush`](WritableBlockDevice::flush) (which is also
/// called when they take more than 32 MiB), each step durable before the next: data and reference
/// counts; refcount table; L2 tables; L1 table; and at last the counts of what became free. So at
/// every moment the file is a valid image that holds all that was flushed; the worst is leaked
/// clusters, which `qemu-img check -r leaks` gives back. No dirty flag is needed, so this holds for
/// version 2, too. Dropping the writer without a flush is a crash in this sense.
pub struct Qcow2Writer {
    pub(super) layers: Layers,
    pub(super) file: Arc<dyn WritableBlockDevice>,
    pub(super) data_file: Option<Arc<dyn WritableBlockDevice>>,
    pub(super) header: Header,
    pub(super) size_bytes: AtomicU64,
    /// The size that the next flush writes in the header: while the disk grows, still the old one.
    pub(super) stored_size_bytes: AtomicU64,
    pub(super) metadata: RwLock<Metadata>,
    /// Clusters of the disk whose mapping a thread is changing.
    busy: Mutex<HashSet<u64>>,
    busy_changed: Condvar,
    /// Shared by every read and write of data; closed for the moment in which freed clusters become
    /// free, so that nobody still uses an old mapping when they are given to somebody else.
    pub(super) gate: RwLock<()>,
    /// Held by the one flush at a time.
    pub(super) flush_lock: Mutex<()>,
    /// A flush failed: memory and file no longer agree.
    pub(super) poisoned: AtomicBool,
    /// The image is marked as changed by us (see [`super::marks`]).
    pub(super) marked: AtomicBool,
    pub(super) marking: Mutex<()>,
    /// Compresses, where the image was created for it.
    pub(super) compressor: Option<Compressor>,
    /// The file was made longer here, so what is not in use at its end may be cut off.
    pub(super) grown: AtomicBool,
}

impl Qcow2Writer {
    /// Opens an existing image for writing, over any device.
    ///
    /// # Errors
    /// As [`Qcow2Image::open_device`](super::Qcow2Image::open_device), and
    /// [`BlockError::Unsupported`] where the image is marked dirty or corrupt and must be repaired
    /// first.
    pub fn open_device(
        file: Arc<dyn WritableBlockDevice>,
        backing: Option<Arc<dyn BlockDevice>>,
        data_file: Option<Arc<dyn WritableBlockDevice>>,
    ) -> Result<Self> {
        let header = Header::read(&*file)?;
        let companions = Companions {
            backing,
            data_file: data_file.clone().map(|device| device as Arc<dyn BlockDevice>),
        };
        check_readable(&header, &file.name(), &companions)?;
        for (bit, what) in [
            (incompatible::DIRTY, "dirty (its last writer crashed)"),
            (incompatible::CORRUPT, "corrupt"),
        ] {
            if header.has(bit) {
                return Err(BlockError::unsupported(
                    file.name(),
                    format!("is marked {what}; repair it first: vmtide check --repair"),
                ));
            }
        }
        let metadata = Metadata::read(&*file, &header)?;
        let data_file = data_file.filter(|_| header.has(incompatible::EXTERNAL_DATA));
        Ok(Self::assemble(file, data_file, companions.backing, header, metadata))
    }

    pub(super) fn assemble(
        file: Arc<dyn WritableBlockDevice>,
        data_file: Option<Arc<dyn WritableBlockDevice>>,
        backing: Option<Arc<dyn BlockDevice>>,
        header: Header,
        metadata: Metadata,
    ) -> Self {
        let layers = Layers::new(
            &header,
            file.clone(),
            data_file.clone().map(|device| device as Arc<dyn BlockDevice>),
            backing,
        );
        Self {
            layers,
            file,
            data_file,
            size_bytes: AtomicU64::new(header.size_bytes),
            stored_size_bytes: AtomicU64::new(header.size_bytes),
            header,
            metadata: RwLock::new(metadata),
            busy: Mutex::new(HashSet::new()),
            busy_changed: Condvar::new(),
            gate: RwLock::new(()),
            flush_lock: Mutex::new(()),
            poisoned: AtomicBool::new(false),
            marked: AtomicBool::new(false),
            marking: Mutex::new(()),
            compressor: None,
            grown: AtomicBool::new(false),
        }
    }

    /// The cluster size in bytes: the unit of allocation.
    pub fn cluster_size_bytes(&self) -> u64 {
        self.header.cluster_bytes()
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.layers.geometry
    }

    /// Whether the external data file must stay readable as a raw disk.
    pub(super) fn is_raw_external(&self) -> bool {
        self.data_file.is_some() && self.header.autoclear & autoclear::RAW_EXTERNAL_DATA != 0
    }

    /// What every change goes through first: refuses after a failed flush, marks the image at the
    /// first change, and keeps the memory of the tables bounded.
    pub(super) fn begin_change(&self) -> Result<()> {
        self.check_sound()?;
        if !self.marked.load(Ordering::Acquire) {
            self.mark_changed()?;
        }
        if self.metadata.read().memory_bytes() > METADATA_BYTES {
            self.metadata.write().drop_clean();
            if self.metadata.read().memory_bytes() > METADATA_BYTES / 2 {
                self.flush()?;
                self.metadata.write().drop_clean();
            }
        }
        Ok(())
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

    /// Makes the file large enough for all clusters claimed so far. In steps, because each step
    /// is a system call under the metadata lock; a flush cuts off what was not needed.
    pub(super) fn grow_file(&self, metadata: &Metadata) -> Result<()> {
        /// Each step is a system call; more of it than some thousand clusters gains nothing.
        const STEP_MAX_BYTES: u64 = 64 << 20;
        let needed = metadata.refcounts.end_bytes();
        if needed <= self.file.size_bytes() {
            return Ok(());
        }
        // By a quarter, so that small files (and devices in memory) stay small.
        self.file.resize(needed + (needed / 4).min(STEP_MAX_BYTES))?;
        self.grown.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The L2 table for an L1 index; none where there is none.
    pub(super) fn table(&self, l1_index: u64) -> Result<Option<Arc<L2Table>>> {
        if let Some(table) = self.metadata.read().cached(l1_index) {
            return Ok(table);
        }
        let mut metadata = self.metadata.write();
        if metadata.memory_bytes() > METADATA_BYTES {
            metadata.drop_clean();
        }
        metadata.load(&*self.file, l1_index)
    }

    /// Keeps other threads from changing the mapping of these clusters of the disk.
    pub(super) fn hold(&self, clusters: std::ops::Range<u64>) -> Hold<'_> {
        let mut busy = self.busy.lock();
        while clusters.clone().any(|cluster| busy.contains(&cluster)) {
            self.busy_changed.wait(&mut busy);
        }
        busy.extend(clusters.clone());
        Hold { writer: self, clusters }
    }

    pub(super) fn check_write(&self, range: ByteRange) -> Result<()> {
        self.check_range(range)?;
        self.begin_change()
    }
}

/// Clusters whose mapping one thread may change; given back when dropped.
pub(super) struct Hold<'a> {
    writer: &'a Qcow2Writer,
    clusters: std::ops::Range<u64>,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut busy = self.writer.busy.lock();
        for cluster in self.clusters.clone() {
            busy.remove(&cluster);
        }
        self.writer.busy_changed.notify_all();
    }
}

impl Tables for Qcow2Writer {
    type Table = Arc<L2Table>;

    fn table_at(&self, offset: u64) -> Result<Option<Arc<L2Table>>> {
        self.table(self.geometry().indices(offset).0)
    }
}

impl BlockDevice for Qcow2Writer {
    fn name(&self) -> String {
        self.layers.name.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        let _gate = self.gate.read();
        self.layers.read(self, buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.check_range(range)?;
        let _gate = self.gate.read();
        self.layers.extents(self, range)
    }
}

impl WritableBlockDevice for Qcow2Writer {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.check_write(ByteRange::new(offset, data.len() as u64))?;
        let _gate = self.gate.read();
        self.write_data(data, offset)
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.check_write(range)?;
        let _gate = self.gate.read();
        self.zero_range(range)
    }

    fn expect_bulk_writes(&self) {
        self.data_file.as_ref().unwrap_or(&self.file).expect_bulk_writes();
    }

    fn flush(&self) -> Result<()> {
        self.flush_tables()
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.check_sound()?;
        self.grow(size_bytes)
    }
}

impl ImageWriter for Qcow2Writer {
    fn compressed(&self) -> Option<&dyn CompressedWriter> {
        self.compressor.as_ref().map(|_| self as &dyn CompressedWriter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::Qcow2CreateOptions;

    #[test]
    fn the_tables_of_a_huge_disk_take_bounded_memory() {
        // With 2 MiB clusters an L2 table takes 2 MiB and maps 512 GiB.
        let directory = tempfile::tempdir().unwrap();
        let options =
            Qcow2CreateOptions { cluster_size_bytes: 2 << 20, ..Qcow2CreateOptions::new(40 << 39) };
        let path = directory.path().join("huge.qcow2");
        let writer = Qcow2Writer::create(path, &options).unwrap();
        for round in 1..3u8 {
            for table in 0..40u64 {
                writer.write_at(&[round; 100], (table << 39) + 5000).unwrap();
                let held = writer.metadata.read().memory_bytes();
                assert!(held <= METADATA_BYTES + (6 << 20), "{held} bytes held");
            }
        }
        let mut bytes = [0u8; 100];
        for table in 0..40u64 {
            writer.read_at(&mut bytes, (table << 39) + 5000).unwrap();
            assert_eq!(bytes, [2; 100], "table {table}");
            let held = writer.metadata.read().memory_bytes();
            assert!(held <= METADATA_BYTES + (6 << 20), "{held} bytes held");
        }
    }
}
