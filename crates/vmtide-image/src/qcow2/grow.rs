//! Growing the disk.

use super::header::MAX_L1_BYTES;
use super::writer::Qcow2Writer;
use crate::bytes::length;
use std::sync::atomic::Ordering;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result, WritableBlockDevice};

impl Qcow2Writer {
    /// Makes the disk `size_bytes` large; the new part reads as zeros.
    pub(super) fn grow(&self, size_bytes: u64) -> Result<()> {
        let refuse = |detail: &str| Err(BlockError::unsupported(&self.layers.name, detail));
        let old_bytes = self.size_bytes();
        if size_bytes == old_bytes {
            return Ok(());
        }
        if size_bytes < old_bytes {
            return refuse("cannot be made smaller; copy it to a new image of the size wanted");
        }
        if self.header.snapshot_count > 0 {
            return refuse("has internal snapshots of its present size; delete them to resize it");
        }
        if self.header.bitmaps.is_some() {
            return refuse("has dirty bitmaps for its present size; remove them to resize it");
        }
        let entries = size_bytes.div_ceil(self.geometry().l2_span());
        if size_bytes > i64::MAX as u64 || entries * 8 > MAX_L1_BYTES {
            return refuse("cannot be made that large with its cluster size");
        }
        self.begin_change()?;
        {
            let _gate = self.gate.read();
            self.grow_l1(entries, size_bytes)?;
        }
        if let Some(data_file) = &self.data_file
            && data_file.size_bytes() < size_bytes
        {
            data_file.resize(size_bytes)?;
        }
        // The rest of the last cluster, and what a longer backing disk would now show.
        let cluster = self.geometry().cluster_bytes();
        let below = self.layers.backing.as_ref().map_or(0, |b| b.size_bytes());
        let end = below.max(old_bytes.next_multiple_of(cluster)).min(size_bytes);
        if end > old_bytes {
            // A flush in between says the old size: a crash must not leave a disk that shows what
            // is not hidden yet.
            let hidden = self.write_zeroes(ByteRange::from_bounds(old_bytes, end));
            if hidden.is_err() {
                self.size_bytes.store(old_bytes, Ordering::Release);
                return hidden;
            }
        }
        self.metadata.write().header_dirty = true;
        self.stored_size_bytes.store(size_bytes, Ordering::Release);
        self.flush()
    }

    fn grow_l1(&self, entries: u64, size_bytes: u64) -> Result<()> {
        let mut metadata = self.metadata.write();
        let (bits, old_entries) = (self.geometry().cluster_bits, metadata.l1.len() as u64);
        if entries > old_entries {
            let clusters = (entries * 8).div_ceil(self.geometry().cluster_bytes());
            let claim = metadata.refcounts.claim_exact(&*self.file, clusters)?;
            self.grow_file(&metadata)?;
            let old_first = metadata.l1_offset >> bits;
            let old_clusters = (old_entries * 8).div_ceil(self.geometry().cluster_bytes());
            metadata.refcounts.pending_frees.extend(old_first..old_first + old_clusters);
            metadata.l1_offset = claim.first << bits;
            metadata.l1.resize(length(entries), 0);
            metadata.l1_dirty = (0..length(entries)).collect();
        }
        metadata.header_dirty = true;
        self.size_bytes.store(size_bytes, Ordering::Release);
        Ok(())
    }
}
