//! Walking everything that refers to clusters of the file.

use super::super::bitmap::{bitmap_clusters, read_directory};
use super::super::header::{COMPRESSED, COPIED, Header, OFFSET_MASK};
use super::super::image::read_l1;
use super::super::snapshot::{read_snapshots, table_bytes};
use super::super::table::{Geometry, L2Table, Mapping, SUBCLUSTERS};
use super::super::write::clusters_of;
use super::error;
use crate::CheckReport;
use crate::bytes::{be_u64, length};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result};

/// The most clusters of a file: their counts take 128 MiB.
const MAX_CLUSTERS: u64 = 1 << 26;

/// Table entries looked at for each cluster of the file, and in any case. Real images stay below,
/// also with dozens of snapshots; without a bound one L2 table named by every entry of the largest
/// L1 table would be walked for hours.
const ENTRIES_PER_CLUSTER: u64 = 64;
const SPARE_ENTRIES: u64 = 1 << 27;

/// The bits of a standard L2 entry that must be clear; bit 0 is the zero flag.
pub(super) const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// The bits of an L1 entry that must be clear.
pub(super) const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// How often each cluster of the file is referred to.
pub(super) struct References {
    /// By cluster; what is more than a `u16` holds stays at its maximum.
    pub(super) counts: Vec<u16>,
    /// The clusters of the refcount table.
    pub(super) refcount_table: Vec<u64>,
    /// Whether everything that refers to clusters could be followed: what is not counted then is
    /// not used.
    pub(super) complete: bool,
    cluster_bits: u32,
    budget: u64,
}

/// Which L1 table is walked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Disk,
    Snapshot,
}

impl References {
    /// Counts all references but those of the refcount structure to its blocks.
    pub(super) fn collect(
        file: &dyn BlockDevice,
        header: &Header,
        report: &mut CheckReport,
    ) -> Result<Self> {
        let clusters = file.size_bytes().div_ceil(header.cluster_bytes());
        if clusters > MAX_CLUSTERS {
            return Err(BlockError::unsupported(
                file.name(),
                format!(
                    "has {clusters} clusters; the counts of more than {MAX_CLUSTERS} are not kept \
                     in memory: check it with qemu-img check"
                ),
            ));
        }
        let mut references = Self {
            counts: vec![0; length(clusters)],
            refcount_table: Vec::new(),
            complete: false,
            cluster_bits: header.cluster_bits,
            budget: clusters * ENTRIES_PER_CLUSTER + SPARE_ENTRIES,
        };
        references.add_bytes(ByteRange::new(0, 1), "the header", report);
        let l1_bytes = |entries: u32| u64::from(entries) * 8;
        let l1 = ByteRange::new(header.l1_offset, l1_bytes(header.l1_entries));
        references.add_bytes(l1, "the L1 table", report);
        references.walk_l1(file, header, (l1.offset, header.l1_entries), Owner::Disk, report)?;
        references.add_snapshots(file, header, report)?;
        references.add_bitmaps(file, header, report)?;
        let table_bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let table = ByteRange::new(header.refcount_table_offset, table_bytes);
        references.add_bytes(table, "the refcount table", report);
        let first = table.offset >> header.cluster_bits;
        references.refcount_table =
            (first..first + u64::from(header.refcount_table_clusters)).collect();
        references.complete = report.errors == 0;
        Ok(references)
    }

    pub(super) fn count(&self, cluster: u64) -> u16 {
        self.counts.get(length(cluster)).copied().unwrap_or(0)
    }

    /// Counts one reference. Whether the cluster is in the file.
    pub(super) fn add(&mut self, cluster: u64) -> bool {
        match self.counts.get_mut(length(cluster)) {
            Some(count) => {
                *count = count.saturating_add(1);
                true
            }
            None => false,
        }
    }

    /// Takes one reference back.
    pub(super) fn remove(&mut self, cluster: u64) {
        if let Some(count) = self.counts.get_mut(length(cluster)) {
            *count = count.saturating_sub(1);
        }
    }

    fn add_bytes(&mut self, range: ByteRange, what: &str, report: &mut CheckReport) {
        if range.is_empty() {
            return;
        }
        let end = range.offset.saturating_add(range.length).div_ceil(1 << self.cluster_bits);
        for cluster in range.offset >> self.cluster_bits..end {
            if !self.add(cluster) {
                let detail = format!("{what} at {:#x}: is not all in the file", range.offset);
                report.add(error(detail, false));
                return;
            }
        }
    }

    fn spend(&mut self, entries: u64, name: &str) -> Result<()> {
        self.budget = self.budget.checked_sub(entries).ok_or_else(|| {
            BlockError::damaged(name, "tables are named by more entries than fit the file")
        })?;
        Ok(())
    }

    fn add_snapshots(
        &mut self,
        file: &dyn BlockDevice,
        header: &Header,
        report: &mut CheckReport,
    ) -> Result<()> {
        if header.snapshot_count == 0 {
            return Ok(());
        }
        let entries = match read_snapshots(file, header) {
            Ok(entries) => entries,
            Err(damage) => {
                report.add(error(damage.to_string(), false));
                return Ok(());
            }
        };
        let table = ByteRange::new(header.snapshots_offset, table_bytes(&entries));
        self.add_bytes(table, "the snapshot table", report);
        for entry in entries {
            let l1 = ByteRange::new(entry.l1_offset, u64::from(entry.l1_entries) * 8);
            let what = format!("the L1 table of snapshot {:?}", entry.info.name);
            self.add_bytes(l1, &what, report);
            self.walk_l1(file, header, (l1.offset, entry.l1_entries), Owner::Snapshot, report)?;
        }
        Ok(())
    }

    fn add_bitmaps(
        &mut self,
        file: &dyn BlockDevice,
        header: &Header,
        report: &mut CheckReport,
    ) -> Result<()> {
        let Some(extension) = header.bitmaps else {
            return Ok(());
        };
        let entries = match read_directory(file, header) {
            Ok(entries) => entries,
            Err(damage) => {
                report.add(error(damage.to_string(), false));
                return Ok(());
            }
        };
        self.add_bytes(extension.directory, "the bitmap directory", report);
        for entry in &entries {
            self.spend(entry.table_entries.into(), &file.name())?;
            let clusters = match bitmap_clusters(file, header, entry) {
                Ok(clusters) => clusters,
                Err(damage) => {
                    report.add(error(damage.to_string(), false));
                    continue;
                }
            };
            if !clusters.into_iter().all(|cluster| self.add(cluster)) {
                let detail = format!("bitmap {:?}: is not all in the file", entry.info.name);
                report.add(error(detail, false));
            }
        }
        Ok(())
    }

    fn walk_l1(
        &mut self,
        file: &dyn BlockDevice,
        header: &Header,
        (offset, entries): (u64, u32),
        owner: Owner,
        report: &mut CheckReport,
    ) -> Result<()> {
        self.spend(u64::from(entries), &file.name())?;
        let l1 = match read_l1(file, offset, entries) {
            Ok(l1) => l1,
            Err(damage) => {
                report.add(error(damage.to_string(), false));
                return Ok(());
            }
        };
        let geometry = Geometry::of(header);
        for (index, entry) in l1.into_iter().enumerate() {
            let l2 = entry & OFFSET_MASK;
            if l2 == 0 {
                continue;
            }
            let inside = l2.checked_add(geometry.cluster_bytes());
            if !l2.is_multiple_of(geometry.cluster_bytes())
                || inside.is_none_or(|end| end > file.size_bytes())
            {
                let detail = format!(
                    "L1 table at {offset:#x}, entry {index}: {entry:#018x} leads to no cluster of \
                     the file"
                );
                report.add(error(detail, false));
                continue;
            }
            self.add(l2 >> geometry.cluster_bits);
            self.spend(geometry.l2_entries(), &file.name())?;
            let table = L2Table::read(file, &geometry, l2)?;
            let disk = (index as u64).saturating_mul(geometry.l2_span());
            self.walk_l2(&file.name(), &geometry, &table, disk, owner, report);
        }
        Ok(())
    }

    fn walk_l2(
        &mut self,
        name: &str,
        geometry: &Geometry,
        table: &L2Table,
        disk: u64,
        owner: Owner,
        report: &mut CheckReport,
    ) {
        for index in 0..geometry.l2_entries() {
            let (entry, bitmap) = table.entry(geometry, index);
            if entry == 0 && bitmap == 0 {
                continue;
            }
            let here = disk.saturating_add(index << geometry.cluster_bits);
            let stored = match stored_bytes(name, geometry, table, index, here) {
                Ok(stored) => stored,
                Err(damage) => {
                    report.add(error(damage.to_string(), false));
                    continue;
                }
            };
            if owner == Owner::Disk && here < report.size_bytes {
                report.allocated_bytes += stored.min(report.size_bytes - here);
            }
            if geometry.external_data {
                continue;
            }
            let mut clusters = clusters_of(geometry.cluster_bits, entry);
            // The last cluster of compressed data may end with the file.
            if !clusters.all(|cluster| self.add(cluster)) {
                let detail = format!(
                    "L2 table at {:#x}, entry {index}: {entry:#018x} leads past the end of the file",
                    table.offset
                );
                report.add(error(detail, false));
            }
        }
    }
}

/// The bytes of disk that an L2 entry stores, or why it is wrong.
fn stored_bytes(
    name: &str,
    geometry: &Geometry,
    table: &L2Table,
    index: u64,
    disk: u64,
) -> Result<u64> {
    let units = if geometry.extended { SUBCLUSTERS } else { 1 };
    let mut stored = 0;
    let (entry, _) = table.entry(geometry, index);
    for sub in 0..units {
        match table.mapping(name, geometry, index, sub, disk)? {
            Mapping::Data(_) => stored += geometry.unit_bytes(),
            Mapping::Compressed { .. } => return Ok(geometry.cluster_bytes()),
            Mapping::Zero | Mapping::Unallocated => {}
        }
        if entry & (COMPRESSED | COPIED | OFFSET_MASK) == 0 && !geometry.extended {
            break;
        }
    }
    Ok(stored)
}

/// The entries of the refcount table of this header; none where it is not in the file.
pub(super) fn refcount_table(file: &dyn BlockDevice, header: &Header) -> Result<Option<Vec<u64>>> {
    let bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
    let range = ByteRange::new(header.refcount_table_offset, bytes);
    let inside = range.checked_end().is_some_and(|end| end <= file.size_bytes());
    if range.offset == 0 || range.is_empty() || !inside {
        return Ok(None);
    }
    let mut table = vec![0u8; length(bytes)];
    file.read_at(&mut table, range.offset)?;
    Ok(Some(table.chunks_exact(8).map(|entry| be_u64(entry, 0)).collect()))
}
