//! Reference counts of host clusters and the allocation of new ones (qcow2 specification, "Host
//! cluster management").
//!
//! Everything here changes memory only; [`super::flush`] decides when it reaches the file. New
//! clusters come from the first free place in the file, or else from its end. A refcount block is
//! put where it is needed, at the end, and counts itself. A cluster that loses a reference stays
//! untouched in [`Refcounts::pending_frees`] until no table on disk can lead to it any more.

use super::header::{Header, MAX_REFCOUNT_TABLE_BYTES};
use crate::bytes::{decode_table, length};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result};

/// A refcount block in memory.
pub(super) struct Block {
    pub(super) bytes: Arc<Vec<u8>>,
    pub(super) dirty: bool,
    /// Being written by a flush: must not be dropped and read again.
    pub(super) flushing: bool,
}

/// The clusters an allocation got.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    pub(super) first: u64,
    pub(super) count: u64,
    /// Whether they read as zeros already: beyond the end the file had when it was opened.
    pub(super) fresh: bool,
}

/// The reference counts of an image that is open for writing.
pub(super) struct Refcounts {
    name: String,
    cluster_bits: u32,
    order: u32,
    /// Offsets of the blocks; 0 where there is none.
    pub(super) table: Vec<u64>,
    pub(super) table_offset: u64,
    pub(super) table_clusters: u64,
    /// The table was moved to a larger place and the header does not know yet.
    pub(super) table_moved: bool,
    /// Entries that differ from the file.
    pub(super) table_dirty: BTreeSet<usize>,
    pub(super) blocks: HashMap<usize, Block>,
    /// The first cluster after all that are in use: where the file grows.
    next: u64,
    /// No cluster before this one is free.
    cursor: u64,
    /// Clusters from here on were never written.
    fresh_from: u64,
    /// References to give back once the tables on disk no longer hold them, one entry each.
    pub(super) pending_frees: Vec<u64>,
}

impl Refcounts {
    /// The counts of a file with nothing in it yet but a header in cluster 0.
    pub(super) fn new(name: String, cluster_bits: u32, order: u32) -> Result<Self> {
        let mut counts = Self {
            name,
            cluster_bits,
            order,
            table: Vec::new(),
            table_offset: 0,
            table_clusters: 0,
            table_moved: true,
            table_dirty: BTreeSet::new(),
            blocks: HashMap::new(),
            next: 1,
            cursor: 1,
            fresh_from: 0,
            pending_frees: Vec::new(),
        };
        // Block 0 in cluster 1 counts the header and itself; then the table finds its own place.
        counts.table = vec![0; length(counts.cluster_bytes() / 8)];
        counts.add_block(0)?;
        counts.set_loaded(0, 1)?;
        let table = counts.claim_end(1, true)?;
        counts.table_offset = table.first << cluster_bits;
        counts.table_clusters = 1;
        Ok(counts)
    }

    /// Reads the table of an existing image; blocks follow when they are needed.
    pub(super) fn read(file: &dyn BlockDevice, header: &Header) -> Result<Self> {
        let table_clusters = u64::from(header.refcount_table_clusters);
        let range =
            ByteRange::new(header.refcount_table_offset, table_clusters << header.cluster_bits);
        let file_bytes = file.size_bytes();
        let inside = range.checked_end().is_some_and(|end| end <= file_bytes);
        if range.offset == 0 || range.is_empty() || !inside {
            return Err(BlockError::damaged(
                file.name(),
                format!(
                    "header at 48: the refcount table of {} bytes at {:#x} is not inside the file \
                     of {file_bytes} bytes",
                    range.length, range.offset
                ),
            ));
        }
        let mut bytes = vec![0u8; length(range.length)];
        file.read_at(&mut bytes, range.offset)?;
        let next = file_bytes.div_ceil(header.cluster_bytes());
        Ok(Self {
            name: file.name(),
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            table: decode_table(&bytes),
            table_offset: header.refcount_table_offset,
            table_clusters,
            table_moved: false,
            table_dirty: BTreeSet::new(),
            blocks: HashMap::new(),
            next,
            cursor: 1,
            fresh_from: next,
            pending_frees: Vec::new(),
        })
    }

    const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The clusters one block counts.
    const fn block_entries(&self) -> u64 {
        (self.cluster_bytes() * 8) >> self.order
    }

    const fn block_index(&self, cluster: u64) -> u64 {
        cluster / self.block_entries()
    }

    /// The end of the file in bytes, as far as it is in use.
    pub(super) const fn end_bytes(&self) -> u64 {
        self.next << self.cluster_bits
    }

    fn damaged(&self, detail: impl Into<String>) -> BlockError {
        BlockError::damaged(&self.name, detail)
    }

    /// Whether the table has a block for the clusters of this index.
    fn has_block(&self, index: u64) -> bool {
        self.table.get(length(index)).is_some_and(|entry| *entry != 0)
    }

    fn load(&mut self, file: &dyn BlockDevice, index: u64) -> Result<&mut Block> {
        let slot = length(index);
        if !self.blocks.contains_key(&slot) {
            let offset = self.table.get(slot).copied().unwrap_or(0);
            let cluster = self.cluster_bytes();
            let inside = offset.checked_add(cluster).is_some_and(|end| end <= file.size_bytes());
            if offset == 0 || !offset.is_multiple_of(cluster) || !inside {
                return Err(self.damaged(format!(
                    "refcount table at {:#x}, entry {index}: {offset:#018x} is no cluster of the \
                     file",
                    self.table_offset
                )));
            }
            let mut bytes = vec![0u8; length(cluster)];
            file.read_at(&mut bytes, offset)?;
            let block = Block { bytes: Arc::new(bytes), dirty: false, flushing: false };
            self.blocks.insert(slot, block);
        }
        self.block(index)
    }

    fn block(&mut self, index: u64) -> Result<&mut Block> {
        let name = &self.name;
        self.blocks
            .get_mut(&length(index))
            .ok_or_else(|| BlockError::damaged(name, format!("refcount block {index} is missing")))
    }

    /// The count of a cluster. Zero where no block counts it.
    pub(super) fn get(&mut self, file: &dyn BlockDevice, cluster: u64) -> Result<u64> {
        let index = self.block_index(cluster);
        if !self.has_block(index) {
            return Ok(0);
        }
        let (order, entry) = (self.order, cluster % self.block_entries());
        Ok(get_count(&self.load(file, index)?.bytes, order, entry))
    }

    /// Sets the count of a cluster whose block is in memory.
    fn set_loaded(&mut self, cluster: u64, count: u64) -> Result<()> {
        let (index, order) = (self.block_index(cluster), self.order);
        let entry = cluster % self.block_entries();
        let block = self.block(index)?;
        let bytes: &mut Vec<u8> = Arc::make_mut(&mut block.bytes);
        set_count(bytes, order, entry, count);
        block.dirty = true;
        Ok(())
    }

    /// Takes one more reference to a cluster that is in use. Returns whether there was room for it
    /// in the count's bits.
    pub(super) fn retain(&mut self, file: &dyn BlockDevice, cluster: u64) -> Result<bool> {
        let count = self.get(file, cluster)?;
        let most = if self.order == 6 { u64::MAX } else { (1 << (1u32 << self.order)) - 1 };
        if count == 0 || count >= most {
            return Ok(false);
        }
        self.set_loaded(cluster, count + 1)?;
        Ok(true)
    }

    /// Claims up to `want` neighbouring clusters, wherever the first free ones are.
    pub(super) fn claim(&mut self, file: &dyn BlockDevice, want: u64) -> Result<Claim> {
        if let Some(claim) = self.claim_hole(file, want)? {
            return Ok(claim);
        }
        self.load_end_block(file)?;
        self.claim_end(want, false)
    }

    /// Claims exactly `count` neighbouring clusters at the end of the file.
    pub(super) fn claim_exact(&mut self, file: &dyn BlockDevice, count: u64) -> Result<Claim> {
        self.load_end_block(file)?;
        self.claim_end(count, true)
    }

    /// Makes sure that the existing block which counts the end of the file is in memory, before
    /// it is changed. Blocks beyond it are new and in memory already.
    fn load_end_block(&mut self, file: &dyn BlockDevice) -> Result<()> {
        for index in self.block_index(self.next)..self.table.len() as u64 {
            if !self.has_block(index) {
                break;
            }
            self.load(file, index)?;
        }
        Ok(())
    }

    fn claim_hole(&mut self, file: &dyn BlockDevice, want: u64) -> Result<Option<Claim>> {
        while self.cursor < self.next {
            let index = self.block_index(self.cursor);
            let block_start = index * self.block_entries();
            let end = (block_start + self.block_entries()).min(self.next);
            if !self.has_block(index) {
                // Never counted: in an image of any known writer that is space past the end.
                self.cursor = end;
                continue;
            }
            let (order, cursor) = (self.order, self.cursor);
            let bytes = self.load(file, index)?.bytes.clone();
            let is_free = |cluster: &u64| get_count(&bytes, order, cluster - block_start) == 0;
            let Some(first) = (cursor..end).find(is_free) else {
                self.cursor = end;
                // A large image has gigabytes of these: the search keeps none it only looked at.
                self.blocks
                    .retain(|slot, block| *slot != length(index) || block.dirty || block.flushing);
                continue;
            };
            let count = (first..end).take(length(want)).take_while(is_free).count() as u64;
            drop(bytes);
            for cluster in first..first + count {
                self.set_loaded(cluster, 1)?;
            }
            self.cursor = first + count;
            return Ok(Some(Claim { first, count, fresh: false }));
        }
        Ok(None)
    }

    fn claim_end(&mut self, want: u64, exact: bool) -> Result<Claim> {
        loop {
            let first = self.next;
            let last = if exact { first + want - 1 } else { first };
            let missing = (self.block_index(first)..=self.block_index(last))
                .find(|index| !self.has_block(*index));
            if let Some(index) = missing {
                self.add_block(index)?;
                continue;
            }
            let block_end = (self.block_index(first) + 1) * self.block_entries();
            let count = if exact { want } else { want.min(block_end - first) };
            for cluster in first..first + count {
                self.set_loaded(cluster, 1)?;
            }
            self.next = first + count;
            return Ok(Claim { first, count, fresh: first >= self.fresh_from });
        }
    }

    /// Puts a new block at the end of the file. It counts its own cluster, or a block before it
    /// does: missing blocks are added in ascending order.
    fn add_block(&mut self, index: u64) -> Result<()> {
        if length(index) >= self.table.len() {
            return self.grow_table(index);
        }
        let cluster = self.next;
        let block = Block {
            bytes: Arc::new(vec![0; length(self.cluster_bytes())]),
            dirty: true,
            flushing: false,
        };
        self.blocks.insert(length(index), block);
        if let Some(entry) = self.table.get_mut(length(index)) {
            *entry = cluster << self.cluster_bits;
        }
        self.table_dirty.insert(length(index));
        self.next += 1;
        self.set_loaded(cluster, 1)
    }

    /// Moves the table to a place of half as much again, at least enough for block `index` and
    /// for counting the new table itself.
    fn grow_table(&mut self, index: u64) -> Result<()> {
        let per_cluster = self.cluster_bytes() / 8;
        let needed = (index + 2).div_ceil(per_cluster) + 1;
        let clusters = needed.max(self.table_clusters + self.table_clusters.div_ceil(2));
        if clusters << self.cluster_bits > MAX_REFCOUNT_TABLE_BYTES.max(2 * self.cluster_bytes()) {
            return Err(BlockError::unsupported(
                &self.name,
                format!(
                    "the file cannot grow past {} bytes with clusters of {} bytes; use larger ones",
                    self.end_bytes(),
                    self.cluster_bytes()
                ),
            ));
        }
        let (old_offset, old_clusters) = (self.table_offset, self.table_clusters);
        self.table.resize(length(clusters * per_cluster), 0);
        let claim = self.claim_end(clusters, true)?;
        self.table_offset = claim.first << self.cluster_bits;
        self.table_clusters = clusters;
        self.table_moved = true;
        let first_old = old_offset >> self.cluster_bits;
        self.pending_frees.extend(first_old..first_old + old_clusters);
        Ok(())
    }

    /// Takes one reference from each of `clusters`. Called when no table on disk leads to them
    /// through the reference that is given back.
    pub(super) fn release(&mut self, file: &dyn BlockDevice, clusters: &[u64]) -> Result<()> {
        for cluster in clusters {
            let count = self.get(file, *cluster)?;
            if count == 0 {
                return Err(self.damaged(format!(
                    "the cluster at {:#x} was in use with a reference count of 0; check and \
                     repair the image",
                    cluster << self.cluster_bits
                )));
            }
            self.set_loaded(*cluster, count - 1)?;
            if count == 1 {
                self.cursor = self.cursor.min(*cluster);
            }
        }
        Ok(())
    }

    /// Drops the blocks that are the same in the file.
    pub(super) fn drop_clean(&mut self) {
        self.blocks.retain(|_, block| block.dirty || block.flushing);
    }
}

/// Reads one count; below 8 bits the first count is in the lowest bits of a byte.
pub(super) fn get_count(block: &[u8], order: u32, entry: u64) -> u64 {
    let at = |entry: u64| block.get(length(entry)).copied().unwrap_or(0);
    if order < 3 {
        let bits = 1u64 << order;
        let shift = entry * bits % 8;
        return u64::from(at(entry * bits / 8)) >> shift & ((1 << bits) - 1);
    }
    let bytes = 1u64 << (order - 3);
    (0..bytes).fold(0, |count, index| count << 8 | u64::from(at(entry * bytes + index)))
}

/// Sets one count; higher bits than it has are lost.
pub(super) fn set_count(block: &mut [u8], order: u32, entry: u64, count: u64) {
    if order < 3 {
        let bits = 1u64 << order;
        let shift = entry * bits % 8;
        let mask = ((1u64 << bits) - 1) << shift;
        if let Some(byte) = block.get_mut(length(entry * bits / 8)) {
            let value = u64::from(*byte) & !mask | (count << shift & mask);
            *byte = value.to_le_bytes()[0];
        }
        return;
    }
    let bytes = 1usize << (order - 3);
    crate::bytes::put(block, length(entry) * bytes, &count.to_be_bytes()[8 - bytes..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_are_kept_apart() {
        for order in 0..=6u32 {
            let mut block = vec![0u8; 512];
            let entries = (512 * 8) >> order;
            let value = |entry: u64| match order {
                0 => entry % 2,
                1 => entry % 4,
                _ => entry % 13,
            };
            for entry in 0..entries {
                set_count(&mut block, order, entry, value(entry));
            }
            for entry in 0..entries {
                assert_eq!(get_count(&block, order, entry), value(entry), "order {order}");
            }
        }
        // 16 bits are big-endian; bits below a byte start at the lowest (specification).
        let mut block = vec![0u8; 8];
        set_count(&mut block, 4, 1, 0x1234);
        set_count(&mut block, 0, 1, 1);
        assert_eq!(block, [2, 0, 0x12, 0x34, 0, 0, 0, 0]);
    }
}
