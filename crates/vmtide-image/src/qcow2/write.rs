//! Writing data: in place where the cluster is ours alone, into new clusters otherwise.

use super::header::{COMPRESSED, COPIED, OFFSET_MASK};
use super::refcount::Claim;
use super::table::{L2Table, Mapping, SUBCLUSTERS};
use super::writer::Qcow2Writer;
use crate::bytes::length;
use std::ops::Range;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result};

/// Up to this size the filled-up first and last cluster and the data between are joined in memory
/// for one write; above it three writes cost less than the copy.
const JOIN_BYTES: u64 = 1 << 20;

/// What the entry of a cluster says about writing to it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ownership {
    /// It has a host cluster that nothing else refers to.
    Own(u64),
    /// It has none.
    None,
    /// Its bytes are in a cluster that others refer to, or compressed.
    Foreign,
}

impl Qcow2Writer {
    /// Writes `data`; the caller has checked the range and shares the gate.
    pub(super) fn write_data(&self, data: &[u8], offset: u64) -> Result<()> {
        let (mut rest, mut at) = (data, offset);
        while !rest.is_empty() {
            let span = self.geometry().l2_span();
            let limit = (rest.len() as u64).min(span - at % span);
            let piece = &rest[..length(limit)];
            let written = match self.in_place(at, limit)? {
                Some((host, count)) => {
                    self.write_host(&piece[..length(count)], host)?;
                    count
                }
                None => self.write_allocating(piece, at)?,
            };
            at += written;
            rest = &rest[length(written)..];
        }
        Ok(())
    }

    /// Writes stored bytes; of a damaged image never over its header, L1 or refcount table.
    fn write_host(&self, data: &[u8], host: u64) -> Result<()> {
        if self.data_file.is_none() {
            let range = ByteRange::new(host, data.len() as u64);
            let metadata = self.metadata.read();
            if let Some(what) = metadata.table_at(range) {
                return Err(BlockError::damaged(
                    &self.layers.name,
                    format!("a data cluster at {host:#x} lies in {what}; repair the image"),
                ));
            }
        }
        let file = self.data_file.as_ref().unwrap_or(&self.file);
        // An image another program wrote may end inside its last cluster.
        let end = host + data.len() as u64;
        if end > file.size_bytes() {
            let metadata = self.metadata.write();
            if self.data_file.is_none() {
                self.grow_file(&metadata)?;
            } else if end > file.size_bytes() {
                file.resize(end)?;
            }
        }
        file.write_at(data, host)
    }

    /// Where the bytes from `at` can be overwritten, and how many; `None` where the first cannot.
    fn in_place(&self, at: u64, limit: u64) -> Result<Option<(u64, u64)>> {
        let geometry = self.geometry();
        let (l1_index, _) = geometry.indices(at);
        let Some(table) = self.table(l1_index)? else {
            return Ok(None);
        };
        if self.metadata.read().l1_entry(l1_index) & COPIED == 0 {
            return Ok(None);
        }
        let run = table.run(&self.layers.name, geometry, at, limit)?;
        let Mapping::Data(host) = run.mapping else {
            return Ok(None);
        };
        let first = at >> geometry.cluster_bits;
        let last = (at + run.length - 1) >> geometry.cluster_bits;
        let entries = geometry.l2_entries();
        let foreign =
            (first..=last).find(|cluster| table.entry(geometry, cluster % entries).0 & COPIED == 0);
        let count = match foreign {
            Some(cluster) if cluster == first => return Ok(None),
            Some(cluster) => (cluster << geometry.cluster_bits) - at,
            None => run.length,
        };
        Ok(Some((host, count)))
    }

    fn ownership(&self, table: &L2Table, shared: bool, cluster: u64) -> Ownership {
        let geometry = self.geometry();
        let (entry, _) = table.entry(geometry, cluster % geometry.l2_entries());
        if self.data_file.is_some() {
            return Ownership::Own(cluster << geometry.cluster_bits);
        }
        match entry & OFFSET_MASK {
            _ if entry & COMPRESSED != 0 => Ownership::Foreign,
            0 => Ownership::None,
            host if entry & COPIED != 0 && !shared => Ownership::Own(host),
            _ => Ownership::Foreign,
        }
    }

    /// Writes the beginning of `data` where no cluster can be overwritten, and returns how much.
    fn write_allocating(&self, data: &[u8], at: u64) -> Result<u64> {
        let geometry = self.geometry();
        let first = at >> geometry.cluster_bits;
        let past = (at + data.len() as u64).div_ceil(geometry.cluster_bytes());
        let _hold = self.hold(first..past);
        // Somebody else may have allocated it while this thread waited.
        if let Some((host, count)) = self.in_place(at, data.len() as u64)? {
            self.write_host(&data[..length(count)], host)?;
            return Ok(count);
        }
        let (target, fresh) = self.claim_for(first..past)?;
        let end = (target.end << geometry.cluster_bits).min(at + data.len() as u64);
        let result = self.fill_and_enter(&data[..length(end - at)], at, &target, fresh);
        if result.is_err() && !target.own {
            let mut metadata = self.metadata.write();
            let host = target.host >> geometry.cluster_bits;
            let claimed = host..host + (target.end - target.first);
            metadata.refcounts.pending_frees.extend(claimed);
        }
        result
    }

    /// Finds or claims host clusters for the first of `clusters`, and for as many after it as
    /// fit next to it.
    fn claim_for(&self, clusters: Range<u64>) -> Result<(Target, bool)> {
        let geometry = self.geometry();
        let (l1_index, _) = geometry.indices(clusters.start << geometry.cluster_bits);
        let mut metadata = self.metadata.write();
        metadata.own_table(&*self.file, l1_index)?;
        let table = metadata
            .load(&*self.file, l1_index)?
            .unwrap_or_else(|| L2Table::empty(geometry, 0).into());
        let first = clusters.start;
        // The table is our own now, but entries of a copied one are still shared: not COPIED.
        if let Ownership::Own(host) = self.ownership(&table, false, first) {
            let target = Target {
                first,
                end: first + self.own_count(&table, clusters, host)?,
                host,
                own: true,
            };
            return Ok((target, false));
        }
        let wanted = clusters
            .take_while(|cluster| {
                !matches!(self.ownership(&table, false, *cluster), Ownership::Own(_))
            })
            .count() as u64;
        let Claim { first: host, count, fresh } = metadata.refcounts.claim(&*self.file, wanted)?;
        self.grow_file(&metadata)?;
        let target =
            Target { first, end: first + count, host: host << geometry.cluster_bits, own: false };
        Ok((target, fresh))
    }

    /// How many of `clusters` can be filled as one, the first of which owns `host`: those that own
    /// the next host clusters and hold no data yet. With subclusters always one.
    fn own_count(&self, table: &L2Table, clusters: Range<u64>, host: u64) -> Result<u64> {
        let geometry = self.geometry();
        let mut count = 1;
        for cluster in clusters.skip(1) {
            let disk = cluster << geometry.cluster_bits;
            let next = Ownership::Own(host + count * geometry.cluster_bytes());
            let name = &self.layers.name;
            if geometry.extended
                || self.ownership(table, false, cluster) != next
                || matches!(
                    table.run(name, geometry, disk, geometry.cluster_bytes())?.mapping,
                    Mapping::Data(_)
                )
            {
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    /// Writes `data` and what is around it into the target's clusters, then enters them.
    fn fill_and_enter(&self, data: &[u8], at: u64, target: &Target, fresh: bool) -> Result<u64> {
        let end = at + data.len() as u64;
        let filled = self.filled_range(at..end, target)?;
        let data_end = end.min(filled.end);
        let data = &data[..length(data_end - at)];
        let head = self.around(filled.start..at, fresh)?;
        let tail = self.around(data_end..filled.end, fresh)?;
        let host =
            |disk: u64| target.host + (disk - (target.first << self.geometry().cluster_bits));
        let total = filled.end - filled.start;
        if (!head.is_empty() || !tail.is_empty()) && total <= JOIN_BYTES {
            let joined = [&head, data, &tail].concat();
            self.write_host(&joined, host(at - head.len() as u64))?;
        } else {
            for (bytes, offset) in [(&head[..], filled.start), (data, at), (&tail[..], data_end)] {
                if !bytes.is_empty() {
                    self.write_host(bytes, host(offset))?;
                }
            }
        }
        self.enter(target, &filled)?;
        Ok(data_end - at)
    }

    /// The range of the disk that must be written for `data` to be: grown to whole units where
    /// nothing was before, to whole clusters where old bytes move, and cut before units of our
    /// own that hold data already (those are overwritten in place, not here).
    fn filled_range(&self, data: Range<u64>, target: &Target) -> Result<Range<u64>> {
        let geometry = self.geometry();
        let cluster = geometry.cluster_bytes();
        let (l1_index, _) = geometry.indices(data.start);
        let Some(table) = self.table(l1_index)? else {
            let start = data.start - data.start % geometry.unit_bytes();
            return Ok(start..data.end.next_multiple_of(geometry.unit_bytes()));
        };
        let grain = |disk: u64| {
            let foreign = !target.own
                && self.ownership(&table, false, disk >> geometry.cluster_bits)
                    == Ownership::Foreign;
            if foreign { cluster } else { geometry.unit_bytes() }
        };
        let start = data.start - data.start % grain(data.start);
        let mut end = data.end.next_multiple_of(grain(data.end - 1));
        if target.own && geometry.extended {
            let (_, bitmap) = table.entry(geometry, target.first % geometry.l2_entries());
            let unit = geometry.unit_bytes();
            let in_cluster = |disk: u64| disk % cluster / unit;
            let units = (end - start) / unit;
            let first = in_cluster(start);
            let free =
                (first..first + units).take_while(|sub| bitmap >> sub & 1 == 0).count() as u64;
            end = start + free.max(1) * unit;
        }
        if self.data_file.is_some() {
            // A raw disk for others: it does not get longer than the disk is.
            end = end.min(self.size_bytes()).max(data.end);
        }
        Ok(start..end)
    }

    /// The present bytes of `range`, or nothing where they are zero and the target is, too. Past
    /// the end of the disk they are zero.
    fn around(&self, range: Range<u64>, fresh: bool) -> Result<Vec<u8>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let present = range.end.min(self.size_bytes()).max(range.start) - range.start;
        let inside = ByteRange::new(range.start, present);
        if fresh && self.reads_as_zero(inside)? {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0u8; length(range.end - range.start)];
        self.layers.read(self, &mut bytes[..length(present)], range.start)?;
        Ok(bytes)
    }

    /// Whether the whole range is known to read as zeros.
    pub(super) fn reads_as_zero(&self, range: ByteRange) -> Result<bool> {
        if range.is_empty() {
            return Ok(true);
        }
        let extents = self.layers.extents(self, range)?;
        let covered = extents.last().map_or(range.offset, |last| last.range.end());
        Ok(covered == range.end() && extents.iter().all(|extent| extent.kind.reads_as_zero()))
    }

    /// Points the L2 entries of the target's clusters, as far as `filled` reaches, to it.
    fn enter(&self, target: &Target, filled: &Range<u64>) -> Result<()> {
        let geometry = *self.geometry();
        let (l1_index, _) = geometry.indices(filled.start);
        let mut metadata = self.metadata.write();
        metadata.own_table(&*self.file, l1_index)?;
        let external = self.data_file.is_some();
        let mut freed = Vec::new();
        metadata.change(&self.layers.name, l1_index, |geometry, table| {
            for cluster in target.first..target.end {
                let disk = cluster << geometry.cluster_bits;
                let index = cluster % geometry.l2_entries();
                let (entry, bitmap) = table.entry(geometry, index);
                if !target.own {
                    freed.extend(clusters_of(geometry.cluster_bits, entry));
                }
                let host = target.host + (disk - (target.first << geometry.cluster_bits));
                let old = if entry & COMPRESSED != 0 { 0 } else { bitmap };
                let bitmap = filled_bitmap(geometry.unit_bytes(), old, disk, filled);
                table.set_entry(geometry, index, host | COPIED, bitmap);
            }
        })?;
        if !external {
            metadata.refcounts.pending_frees.extend(freed);
        }
        Ok(())
    }
}

/// Host clusters for clusters of the disk.
struct Target {
    /// The first cluster of the disk.
    first: u64,
    /// The cluster of the disk after the last.
    end: u64,
    /// The offset of the first host cluster; the others follow it.
    host: u64,
    /// Whether the host cluster was the disk's before, so that nothing was claimed.
    own: bool,
}

/// The host clusters an L2 entry holds a reference to.
pub(super) fn clusters_of(cluster_bits: u32, entry: u64) -> Range<u64> {
    if entry & COMPRESSED == 0 {
        let host = (entry & OFFSET_MASK) >> cluster_bits;
        return if host == 0 { 0..0 } else { host..host + 1 };
    }
    let shift = 62 - (cluster_bits - 8);
    let offset = entry & ((1 << shift) - 1) & !511;
    let sectors = ((entry & !COPIED & !COMPRESSED) >> shift) + 1;
    let end = offset.saturating_add(sectors * 512).saturating_sub(1);
    offset >> cluster_bits..(end >> cluster_bits) + 1
}

/// The subcluster bitmap after the units of `filled` in the cluster at `disk` were written.
fn filled_bitmap(unit: u64, old: u64, disk: u64, filled: &Range<u64>) -> u64 {
    (0..SUBCLUSTERS).fold(old, |bitmap, sub| {
        if filled.contains(&(disk + sub * unit)) {
            (bitmap | 1 << sub) & !(1 << (sub + SUBCLUSTERS))
        } else {
            bitmap
        }
    })
}
