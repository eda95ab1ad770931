//! Bringing changed tables to the file, in an order that is right at every moment.
//!
//! 1. Reference counts of new clusters; then, with all data, they are made durable. A count that
//!    is too high is a leak, one that is too low would be damage: counts go up before anything
//!    refers to a cluster.
//! 2. The refcount table, where blocks were added: its entries now lead to durable blocks. A
//!    table that moved is written to its new place first and the header changed after it.
//! 3. L2 tables: their entries now lead to durable data. Old clusters still exist.
//! 4. The L1 table and the header: their entries now lead to durable L2 tables.
//! 5. Nothing on disk refers to replaced clusters any more: once no reader is under way they are
//!    punched out of the file, their counts go down, and they may be used again.

use super::header::field;
use super::metadata::Metadata;
use super::table::L2Table;
use super::writer::Qcow2Writer;
use crate::bytes::{encode_table, length, put};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmtide_block::{BlockDevice, ByteRange, Result};

/// The entries of a table in one sector, the unit in which table changes are written.
const SECTOR_ENTRIES: usize = 64;

/// The bytes for one place in the file.
type Patch = (u64, Vec<u8>);

/// The tables as they were at one moment, to be written while work goes on.
#[derive(Default)]
struct Snapshot {
    blocks: Vec<(usize, u64, Arc<Vec<u8>>)>,
    refcount_table: Vec<Patch>,
    /// The header's fields for a refcount table that moved.
    refcount_header: Option<Patch>,
    tables: Vec<(u64, Arc<L2Table>)>,
    l1: Vec<Patch>,
    /// The header's fields for the size and the L1 table.
    header: Option<Patch>,
    frees: Vec<u64>,
}

impl Qcow2Writer {
    /// Makes everything durable that was written before the call.
    pub(super) fn flush_tables(&self) -> Result<()> {
        let _one_at_a_time = self.flush_lock.lock();
        self.check_sound()?;
        let result = self.flush_steps();
        if result.is_err() {
            self.poisoned.store(true, Ordering::Release);
        }
        result
    }

    fn flush_steps(&self) -> Result<()> {
        let snapshot = {
            let mut metadata = self.metadata.write();
            let end = metadata.refcounts.end_bytes();
            let size = self.file.size_bytes();
            if size < end || (size > end && self.grown.load(Ordering::Relaxed)) {
                self.file.resize(end)?;
            }
            Snapshot::take(&mut metadata, self.stored_size_bytes.load(Ordering::Acquire))
        };
        self.write_blocks(&snapshot)?;
        if let Some(data_file) = &self.data_file {
            data_file.flush()?;
        }
        self.file.flush()?;
        self.write_durably(&snapshot.refcount_table)?;
        self.write_durably(snapshot.refcount_header.as_slice())?;
        for (_, table) in &snapshot.tables {
            self.file.write_at(&table.to_bytes(), table.offset)?;
        }
        if !snapshot.tables.is_empty() {
            self.file.flush()?;
        }
        self.write_durably(&snapshot.l1)?;
        self.write_durably(snapshot.header.as_slice())?;
        snapshot.mark_written(&mut self.metadata.write());
        self.give_back(snapshot.frees)
    }

    fn write_blocks(&self, snapshot: &Snapshot) -> Result<()> {
        for (_, offset, bytes) in &snapshot.blocks {
            self.file.write_at(bytes, *offset)?;
        }
        Ok(())
    }

    fn write_durably(&self, patches: &[Patch]) -> Result<()> {
        for (offset, bytes) in patches {
            self.file.write_at(bytes, *offset)?;
        }
        if patches.is_empty() {
            return Ok(());
        }
        self.file.flush()
    }

    /// Frees clusters that nothing in the file refers to any more.
    fn give_back(&self, mut frees: Vec<u64>) -> Result<()> {
        if frees.is_empty() {
            return Ok(());
        }
        frees.sort_unstable();
        // Reads and writes that began with an old mapping end before its clusters are reused.
        drop(self.gate.write());
        self.layers.compressed.forget();
        let cluster_bits = self.geometry().cluster_bits;
        let unused = self.unused_after(&frees)?;
        for run in unused.chunk_by(|a, b| a + 1 == *b) {
            if let (Some(first), Some(last)) = (run.first(), run.last()) {
                let range =
                    ByteRange::from_bounds(first << cluster_bits, (last + 1) << cluster_bits);
                let end = range.end().min(self.file.size_bytes());
                self.file.write_zeroes(ByteRange::from_bounds(range.offset, end))?;
            }
        }
        let mut metadata = self.metadata.write();
        metadata.refcounts.release(&*self.file, &frees)?;
        let mut blocks = Snapshot::default();
        blocks.take_blocks(&mut metadata);
        // Counts that went down may become durable whenever they like: until then they are leaks.
        self.write_blocks(&blocks)?;
        blocks.mark_written(&mut metadata);
        Ok(())
    }

    /// Which of the sorted `frees` lose their last reference.
    fn unused_after(&self, frees: &[u64]) -> Result<Vec<u64>> {
        let mut metadata = self.metadata.write();
        // Nothing is packed behind compressed data in a cluster that is about to go.
        metadata.packed_end = 0;
        let mut unused = Vec::new();
        for same in frees.chunk_by(|a, b| a == b) {
            let Some(cluster) = same.first() else {
                continue;
            };
            if metadata.refcounts.get(&*self.file, *cluster)? == same.len() as u64 {
                unused.push(*cluster);
            }
        }
        Ok(unused)
    }
}

impl Snapshot {
    fn take(metadata: &mut Metadata, size_bytes: u64) -> Self {
        let mut snapshot = Self::default();
        snapshot.take_blocks(metadata);
        let cluster_bits = metadata.geometry.cluster_bits;
        let counts = &mut metadata.refcounts;
        let table_dirty = std::mem::take(&mut counts.table_dirty);
        if std::mem::take(&mut counts.table_moved) {
            let mut bytes = encode_table(&counts.table);
            bytes.resize(length(counts.table_clusters << cluster_bits), 0);
            snapshot.refcount_table.push((counts.table_offset, bytes));
            let mut fields = [0u8; 12];
            put(&mut fields, 0, &counts.table_offset.to_be_bytes());
            let clusters = u32::try_from(counts.table_clusters).unwrap_or(u32::MAX);
            put(&mut fields, 8, &clusters.to_be_bytes());
            snapshot.refcount_header = Some((field::REFCOUNT_TABLE_OFFSET as u64, fields.to_vec()));
        } else {
            snapshot.refcount_table =
                sector_patches(&counts.table, counts.table_offset, &table_dirty);
        }
        for (l1_index, cached) in &mut metadata.tables {
            if std::mem::take(&mut cached.dirty) {
                cached.flushing = true;
                snapshot.tables.push((*l1_index, cached.table.clone()));
            }
        }
        snapshot.tables.sort_unstable_by_key(|(_, table)| table.offset);
        let l1_dirty = std::mem::take(&mut metadata.l1_dirty);
        snapshot.l1 = sector_patches(&metadata.l1, metadata.l1_offset, &l1_dirty);
        if std::mem::take(&mut metadata.header_dirty) {
            let mut fields = vec![0u8; field::REFCOUNT_TABLE_OFFSET - field::SIZE];
            put(&mut fields, 0, &size_bytes.to_be_bytes());
            let entries = u32::try_from(metadata.l1.len()).unwrap_or(u32::MAX);
            put(&mut fields, field::L1_SIZE - field::SIZE, &entries.to_be_bytes());
            let offset = metadata.l1_offset.to_be_bytes();
            put(&mut fields, field::L1_OFFSET - field::SIZE, &offset);
            snapshot.header = Some((field::SIZE as u64, fields));
        }
        snapshot.frees = std::mem::take(&mut metadata.refcounts.pending_frees);
        snapshot
    }

    fn take_blocks(&mut self, metadata: &mut Metadata) {
        let counts = &mut metadata.refcounts;
        for (index, block) in &mut counts.blocks {
            if std::mem::take(&mut block.dirty) {
                block.flushing = true;
                let offset = counts.table.get(*index).copied().unwrap_or(0);
                self.blocks.push((*index, offset, block.bytes.clone()));
            }
        }
        self.blocks.sort_unstable_by_key(|(_, offset, _)| *offset);
    }

    /// From here on the file has what the snapshot had, so it may be read from there again.
    fn mark_written(&self, metadata: &mut Metadata) {
        for (index, _, _) in &self.blocks {
            if let Some(block) = metadata.refcounts.blocks.get_mut(index) {
                block.flushing = false;
            }
        }
        for (l1_index, _) in &self.tables {
            if let Some(cached) = metadata.tables.get_mut(l1_index) {
                cached.flushing = false;
            }
        }
    }
}

/// The sectors of a table at `offset` that hold the `dirty` entries.
fn sector_patches(table: &[u64], offset: u64, dirty: &BTreeSet<usize>) -> Vec<Patch> {
    let sectors: BTreeSet<usize> = dirty.iter().map(|index| index / SECTOR_ENTRIES).collect();
    sectors
        .into_iter()
        .filter_map(|sector| {
            let first = sector * SECTOR_ENTRIES;
            let entries = table.get(first..table.len().min(first + SECTOR_ENTRIES))?;
            Some((offset + first as u64 * 8, encode_table(entries)))
        })
        .collect()
}
