//! The counts in the file against the references that were found.

use super::super::header::Header;
use super::super::refcount::{get_count, set_count};
use super::references::{References, refcount_table};
use super::{Checker, error};
use crate::bytes::length;
use crate::{CheckReport, Problem, Severity};
use vmtide_block::{Result, WritableBlockDevice};

/// For each cluster whether its count is exactly one.
pub(super) struct Ones(Vec<u64>);

impl Ones {
    pub(super) fn new(clusters: usize) -> Self {
        Self(vec![0; clusters.div_ceil(64)])
    }

    pub(super) fn set(&mut self, cluster: u64, is_one: bool) {
        if let Some(word) = self.0.get_mut(length(cluster / 64)) {
            *word = *word & !(1 << (cluster % 64)) | u64::from(is_one) << (cluster % 64);
        }
    }

    pub(super) fn has(&self, cluster: u64) -> bool {
        self.0.get(length(cluster / 64)).is_some_and(|word| word >> (cluster % 64) & 1 == 1)
    }
}

impl Checker<'_> {
    /// Compares and repairs the counts. Returns which are one afterwards.
    pub(super) fn check_counts(
        &self,
        header: &Header,
        references: &mut References,
        report: &mut CheckReport,
    ) -> Result<Ones> {
        let (blocks, mut broken) = self.blocks(header, references, report)?;
        let entries = (header.cluster_bytes() * 8) >> header.refcount_order;
        // A used cluster that no block counts, or a block that others refer to as well, too.
        broken |= blocks.iter().any(|block| references.count(*block >> header.cluster_bits) > 1);
        let uncounted = |(index, counts): (usize, &[u16])| {
            blocks.get(index).is_none_or(|block| *block == 0) && counts.iter().any(|c| *c > 0)
        };
        broken |= references.counts.chunks(length(entries)).enumerate().any(uncounted);
        let rebuild = self.repairs_all().filter(|_| broken);
        let mut ones = Ones::new(references.counts.len());
        let mut bytes = vec![0u8; length(header.cluster_bytes())];
        let complete = references.complete;
        for (index, counts) in references.counts.chunks_mut(length(entries)).enumerate() {
            let offset = blocks.get(index).copied().unwrap_or(0);
            if offset == 0 {
                bytes.fill(0);
            } else {
                self.file.read_at(&mut bytes, offset)?;
            }
            let block = Block {
                first: index as u64 * entries,
                is_replaced: rebuild.is_some(),
                exists: offset != 0,
                complete,
            };
            let changed = self.compare(header, counts, &block, &mut bytes, report);
            if changed
                && rebuild.is_none()
                && let Some(file) = self.repairs_leaks()
            {
                file.write_at(&bytes, offset)?;
            }
            for (entry, cluster) in (0..counts.len() as u64).zip(index as u64 * entries..) {
                ones.set(cluster, get_count(&bytes, header.refcount_order, entry) == 1);
            }
        }
        if let Some(file) = rebuild {
            self.rebuild(file, header, references, &blocks)?;
            for (cluster, count) in (0u64..).zip(&references.counts) {
                ones.set(cluster, *count == 1);
            }
        }
        Ok(ones)
    }

    /// The offsets of the refcount blocks (0 where there is none that can be used), counted as
    /// references; and whether the structure is broken.
    fn blocks(
        &self,
        header: &Header,
        references: &mut References,
        report: &mut CheckReport,
    ) -> Result<(Vec<u64>, bool)> {
        let fixable = self.repairs_all().is_some();
        let Some(mut table) = refcount_table(self.file, header)? else {
            let detail = format!(
                "header at 48: the refcount table of {} clusters at {:#x} is not in the file",
                header.refcount_table_clusters, header.refcount_table_offset
            );
            report.add(error(detail, fixable));
            return Ok((Vec::new(), true));
        };
        let mut broken = false;
        for (index, entry) in table.iter_mut().enumerate().filter(|(_, entry)| **entry != 0) {
            let whole = entry.checked_add(header.cluster_bytes());
            let inside = whole.is_some_and(|end| end <= self.file.size_bytes());
            if inside && entry.is_multiple_of(header.cluster_bytes()) {
                references.add(*entry >> header.cluster_bits);
                continue;
            }
            let detail = format!(
                "refcount table at {:#x}, entry {index}: {entry:#018x} is no cluster of the file",
                header.refcount_table_offset
            );
            report.add(error(detail, fixable));
            *entry = 0;
            broken = true;
        }
        Ok((table, broken))
    }

    /// Compares the counts of one block, whose bytes are put right as far as allowed. Returns
    /// whether they changed.
    fn compare(
        &self,
        header: &Header,
        counts: &mut [u16],
        block: &Block,
        bytes: &mut [u8],
        report: &mut CheckReport,
    ) -> bool {
        let order = header.refcount_order;
        let most = if order >= 4 { u64::from(u16::MAX) } else { (1 << (1u32 << order)) - 1 };
        let mut changed = false;
        for (entry, count) in (0u64..).zip(counts) {
            let expected = u64::from(*count);
            let found = get_count(bytes, order, entry);
            // A count that did not fit was not counted to its end.
            if found == expected || (expected == u64::from(u16::MAX) && found > expected) {
                continue;
            }
            let is_leak = found > expected;
            let allowed = if is_leak { self.repairs_leaks() } else { self.repairs_all() };
            // Where a reference may have been missed a cluster is not given away.
            let repaired = allowed.is_some()
                && expected <= most
                && (block.exists || block.is_replaced)
                && (block.complete || !is_leak);
            let severity = if is_leak { Severity::Leak } else { Severity::Error };
            let at = (block.first + entry) << header.cluster_bits;
            let detail = format!(
                "cluster at {at:#x}: its reference count is {found}, {expected} refer to it"
            );
            report.add(Problem { severity, detail, repaired });
            if repaired {
                set_count(bytes, order, entry, expected);
                changed = true;
            } else if is_leak {
                *count = u16::try_from(found).unwrap_or(u16::MAX);
            }
        }
        changed
    }

    /// Gives the image a new refcount structure behind its end.
    fn rebuild(
        &self,
        file: &dyn WritableBlockDevice,
        header: &Header,
        references: &mut References,
        blocks: &[u64],
    ) -> Result<()> {
        for cluster in std::mem::take(&mut references.refcount_table) {
            references.remove(cluster);
        }
        for block in blocks.iter().filter(|block| **block != 0) {
            references.remove(*block >> header.cluster_bits);
        }
        super::rebuild::write(file, header, &mut references.counts)
    }
}

/// One refcount block.
struct Block {
    /// The first cluster it counts.
    first: u64,
    /// Whether a new structure is written after the comparison.
    is_replaced: bool,
    exists: bool,
    /// Whether all references are known.
    complete: bool,
}
