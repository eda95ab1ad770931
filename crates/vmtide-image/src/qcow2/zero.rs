//! Making ranges zero: clusters are given back or flagged, and only what cannot be is written.

use super::header::{COPIED, OFFSET_MASK};
use super::table::SUBCLUSTERS;
use super::write::clusters_of;
use super::writer::Qcow2Writer;
use crate::bytes::length;
use std::ops::Range;
use vmtide_block::{BlockDevice, ByteRange, Result};

/// The bytes of zeros written at a time where zeros must be written.
const ZEROS_BYTES: u64 = 1 << 20;

impl Qcow2Writer {
    /// Makes `range` read as zeros; the caller has checked it and shares the gate.
    pub(super) fn zero_range(&self, range: ByteRange) -> Result<()> {
        let span = self.geometry().l2_span();
        let mut at = range.offset;
        while at < range.end() {
            let end = ((at | (span - 1)).saturating_add(1)).min(range.end());
            if !self.reads_as_zero(ByteRange::from_bounds(at, end))? || self.is_raw_external() {
                self.zero_in_table(at..end)?;
            }
            at = end;
        }
        Ok(())
    }

    /// A range inside the span of one L2 table.
    fn zero_in_table(&self, range: Range<u64>) -> Result<()> {
        let cluster = self.geometry().cluster_bytes();
        if self.geometry().version < 3 && self.layers.backing.is_some() {
            return self.write_zeros(range);
        }
        // A last cluster that the disk ends in counts as whole: there is nothing after the end.
        let disk_end = self.size_bytes();
        let whole_end = if range.end == disk_end {
            range.end.next_multiple_of(cluster)
        } else {
            range.end - range.end % cluster
        };
        let whole_start = range.start.next_multiple_of(cluster);
        if whole_start >= whole_end {
            return self.write_zeros(range);
        }
        self.write_zeros(range.start..whole_start)?;
        if self.is_raw_external() {
            self.zero_raw_external(whole_start..whole_end.min(disk_end))?;
        } else {
            self.zero_clusters(whole_start / cluster..whole_end / cluster)?;
        }
        self.write_zeros(whole_end.min(range.end)..range.end)
    }

    /// Writes zeros as data, except where there are zeros already.
    fn write_zeros(&self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        let zeros = vec![0u8; length(ZEROS_BYTES.min(range.end.saturating_sub(range.start)))];
        let unit = self.geometry().unit_bytes();
        while at < range.end {
            // Cluster by cluster where they are large, so that holes in between stay holes.
            let step = ZEROS_BYTES.min(unit.max(64 << 10));
            let end = ((at - at % step) + step).min(range.end);
            let piece = ByteRange::from_bounds(at, end);
            if !self.reads_as_zero(piece)? {
                self.write_data(&zeros[..length(piece.length)], at)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Unmaps or flags whole clusters.
    fn zero_clusters(&self, clusters: Range<u64>) -> Result<()> {
        let geometry = *self.geometry();
        let _hold = self.hold(clusters.clone());
        let (l1_index, _) = geometry.indices(clusters.start << geometry.cluster_bits);
        let zero = match (&self.layers.backing, geometry.extended) {
            // With nothing below, what is not there reads as zeros.
            (None, _) => (0, 0),
            (Some(_), false) => (1, 0),
            (Some(_), true) => (0, ((1 << SUBCLUSTERS) - 1) << SUBCLUSTERS),
        };
        let table = self.table(l1_index)?;
        if table.is_none() && self.layers.backing.is_none() {
            return Ok(());
        }
        let mut metadata = self.metadata.write();
        metadata.own_table(&*self.file, l1_index)?;
        self.grow_file(&metadata)?;
        let mut freed = Vec::new();
        metadata.change(&self.layers.name, l1_index, |geometry, table| {
            for cluster in clusters {
                let index = cluster % geometry.l2_entries();
                let (entry, _) = table.entry(geometry, index);
                freed.extend(clusters_of(geometry.cluster_bits, entry));
                table.set_entry(geometry, index, zero.0, zero.1);
            }
        })?;
        if self.data_file.is_none() {
            metadata.refcounts.pending_frees.extend(freed);
        }
        Ok(())
    }

    /// A raw external data file must hold the zeros itself, and the table must say so.
    fn zero_raw_external(&self, range: Range<u64>) -> Result<()> {
        let Some(file) = &self.data_file else {
            return Ok(());
        };
        let geometry = *self.geometry();
        let clusters =
            range.start >> geometry.cluster_bits..range.end.div_ceil(geometry.cluster_bytes());
        let _hold = self.hold(clusters.clone());
        if range.end > file.size_bytes() {
            let _growing = self.metadata.write();
            if range.end > file.size_bytes() {
                file.resize(range.end)?;
            }
        }
        file.write_zeroes(ByteRange::from_bounds(range.start, range.end))?;
        let (l1_index, _) = geometry.indices(range.start);
        let mut metadata = self.metadata.write();
        metadata.own_table(&*self.file, l1_index)?;
        self.grow_file(&metadata)?;
        metadata.change(&self.layers.name, l1_index, |geometry, table| {
            for cluster in clusters {
                let host = (cluster << geometry.cluster_bits) & OFFSET_MASK;
                let index = cluster % geometry.l2_entries();
                table.set_entry(geometry, index, host | COPIED, (1 << SUBCLUSTERS) - 1);
            }
        })
    }
}
