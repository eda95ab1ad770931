//! Persistent dirty bitmaps (qcow2 specification, "Bitmaps"): the change tracking that QEMU keeps
//! in an image while no QEMU runs.
//!
//! A bitmap that misses one change makes an incremental backup wrong without anybody noticing, so
//! everything that puts one in doubt makes it unusable here, with the reason.

use super::header::{Header, OFFSET_MASK, autoclear};
use crate::bytes::{be_u16, be_u32, be_u64, decode_table, length};
use crate::{BitmapInfo, BitmapState};
use vmtide_block::{BlockDevice, BlockError, ByteRange, RangeSet, Result};

/// The most bitmaps, as in QEMU.
const MAX_BITMAPS: u32 = 65_535;
/// The most bytes of the directory: QEMU's limit is that of the largest bitmap names, 64 MiB.
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;
/// The most bytes one bitmap's bits take, as in QEMU (`BME_MAX_PHYS_SIZE`).
const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// The granularities QEMU has; smaller and larger ones are in the specification but in no image.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// The bytes of a directory entry before its variable part.
const FIXED_BYTES: usize = 24;
/// The most ranges of an answer (32 MiB of memory); beyond it they are rounded outward.
const MAX_RANGES: usize = 1 << 21;

/// The flags of a directory entry.
pub(crate) mod flag {
    pub(crate) const IN_USE: u32 = 1;
    pub(crate) const AUTO: u32 = 1 << 1;
    pub(crate) const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
}

/// One entry of the bitmap directory.
pub(crate) struct BitmapEntry {
    pub(crate) info: BitmapInfo,
    /// Where its flags are in the file.
    pub(crate) flags_offset: u64,
    pub(crate) flags: u32,
    table_offset: u64,
    pub(crate) table_entries: u32,
}

/// Reads the bitmap directory; empty where the image has no bitmaps.
pub(crate) fn read_directory(file: &dyn BlockDevice, header: &Header) -> Result<Vec<BitmapEntry>> {
    let Some(extension) = header.bitmaps else {
        return Ok(Vec::new());
    };
    let range = extension.directory;
    let damaged = |detail: String| {
        BlockError::damaged(
            file.name(),
            format!("bitmap directory at {:#x}: {detail}", range.offset),
        )
    };
    let inside = range.checked_end().is_some_and(|end| end <= file.size_bytes());
    if !inside
        || !range.offset.is_multiple_of(header.cluster_bytes())
        || range.length > MAX_DIRECTORY_BYTES
    {
        return Err(damaged(format!(
            "its {} bytes are not cluster-aligned inside the file of {} bytes, or more than \
             {MAX_DIRECTORY_BYTES}",
            range.length,
            file.size_bytes()
        )));
    }
    if extension.count > MAX_BITMAPS {
        return Err(damaged(format!(
            "{} bitmaps, at most {MAX_BITMAPS} are allowed",
            extension.count
        )));
    }
    let mut bytes = vec![0u8; length(range.length)];
    file.read_at(&mut bytes, range.offset)?;
    let mut entries = Vec::new();
    let mut at = 0;
    for index in 0..extension.count {
        let (entry, size) = parse_entry(&bytes, at, range.offset, header)
            .map_err(|detail| damaged(format!("entry {index} at +{at}: {detail}")))?;
        entries.push(entry);
        at += size;
    }
    Ok(entries)
}

fn parse_entry(
    directory: &[u8],
    at: usize,
    directory_offset: u64,
    header: &Header,
) -> Result<(BitmapEntry, usize), String> {
    let fixed = directory.get(at..at + FIXED_BYTES).ok_or("past the end of the directory")?;
    let flags = be_u32(fixed, 12);
    let (kind, granularity_bits) = (fixed[16], fixed[17]);
    let name_bytes = usize::from(be_u16(fixed, 18));
    let extra_bytes = length(u64::from(be_u32(fixed, 20)));
    let name_at = (at + FIXED_BYTES)
        .checked_add(extra_bytes)
        .ok_or("extra data past the end of the directory")?;
    let name = name_at
        .checked_add(name_bytes)
        .and_then(|end| directory.get(name_at..end))
        .ok_or("name past the end of the directory")?;
    if kind != 1 {
        return Err(format!("bitmap type {kind} is unknown"));
    }
    if !GRANULARITY_BITS.contains(&granularity_bits) {
        return Err(format!("granularity_bits is {granularity_bits}, not 9 to 31"));
    }
    let state = if header.autoclear & autoclear::BITMAPS == 0 {
        BitmapState::Inconsistent
    } else if flags & flag::IN_USE != 0 {
        BitmapState::InUse
    } else if flags & !(flag::IN_USE | flag::AUTO | flag::EXTRA_DATA_COMPATIBLE) != 0
        || (extra_bytes > 0 && flags & flag::EXTRA_DATA_COMPATIBLE == 0)
    {
        BitmapState::Unknown
    } else {
        BitmapState::Usable
    };
    let entry = BitmapEntry {
        info: BitmapInfo {
            name: String::from_utf8_lossy(name).into_owned(),
            granularity_bytes: 1 << granularity_bits,
            recording: flags & flag::AUTO != 0,
            state,
        },
        flags_offset: directory_offset + at as u64 + 12,
        flags,
        table_offset: be_u64(fixed, 0),
        table_entries: be_u32(fixed, 8),
    };
    let size = (FIXED_BYTES + extra_bytes + name_bytes).next_multiple_of(8);
    Ok((entry, size))
}

/// Reads the bits of one bitmap as ranges of the disk.
pub(crate) fn read_bitmap(
    file: &dyn BlockDevice,
    header: &Header,
    entry: &BitmapEntry,
) -> Result<RangeSet> {
    let info = &entry.info;
    let context = format!("{}: bitmap {:?}", file.name(), info.name);
    if info.state != BitmapState::Usable {
        return Err(BlockError::unsupported(
            context,
            format!("{}; read the whole disk instead", info.state.explanation()),
        ));
    }
    let cluster = header.cluster_bytes();
    let needed_bytes = header.size_bytes.div_ceil(info.granularity_bytes).div_ceil(8);
    let table = ByteRange::new(entry.table_offset, u64::from(entry.table_entries) * 8);
    let inside = table.checked_end().is_some_and(|end| end <= file.size_bytes());
    if needed_bytes > MAX_BITMAP_BYTES
        || u64::from(entry.table_entries) != needed_bytes.div_ceil(cluster)
        || !table.offset.is_multiple_of(cluster)
        || !inside
    {
        return Err(BlockError::damaged(
            context,
            format!(
                "its table of {} entries at {:#x} does not fit a disk of {} bytes or the file",
                entry.table_entries, table.offset, header.size_bytes
            ),
        ));
    }
    let mut bytes = vec![0u8; length(table.length)];
    file.read_at(&mut bytes, table.offset)?;
    let mut dirty = DirtyRanges::new(info.granularity_bytes, header.size_bytes);
    let mut bits = vec![0u8; length(cluster)];
    for (index, value) in decode_table(&bytes).into_iter().enumerate() {
        let first_bit = (index as u64) * cluster * 8;
        let offset = value & OFFSET_MASK;
        if offset == 0 {
            if value & 1 != 0 {
                dirty.push(first_bit, cluster * 8);
            }
            continue;
        }
        let inside = offset.checked_add(cluster).is_some_and(|end| end <= file.size_bytes());
        if !offset.is_multiple_of(cluster) || value & 1 != 0 || !inside {
            return Err(BlockError::damaged(
                context,
                format!("table entry {index}: {value:#018x} is no cluster of the file"),
            ));
        }
        file.read_at(&mut bits, offset)?;
        dirty.push_bits(first_bit, &bits);
    }
    Ok(dirty.set)
}

/// The clusters of the file that a bitmap's table and bits take.
pub(crate) fn bitmap_clusters(
    file: &dyn BlockDevice,
    header: &Header,
    entry: &BitmapEntry,
) -> Result<Vec<u64>> {
    let table = ByteRange::new(entry.table_offset, u64::from(entry.table_entries) * 8);
    let inside = table.checked_end().is_some_and(|end| end <= file.size_bytes());
    if table.length > MAX_BITMAP_BYTES / header.cluster_bytes() * 8
        || !table.offset.is_multiple_of(header.cluster_bytes())
        || !inside
    {
        return Err(BlockError::damaged(
            format!("{}: bitmap {:?}", file.name(), entry.info.name),
            format!(
                "its table of {} entries at {:#x} is not cluster-aligned inside the file",
                entry.table_entries, table.offset
            ),
        ));
    }
    let mut bytes = vec![0u8; length(table.length)];
    file.read_at(&mut bytes, table.offset)?;
    let bits = header.cluster_bits;
    let own = table.offset >> bits..table.end().div_ceil(header.cluster_bytes());
    let stored = decode_table(&bytes).into_iter().map(|value| value & OFFSET_MASK);
    Ok(own.chain(stored.filter(|offset| *offset != 0).map(|offset| offset >> bits)).collect())
}

/// Collects dirty bits, in order, as ranges of bounded number.
struct DirtyRanges {
    set: RangeSet,
    granularity_bytes: u64,
    size_bytes: u64,
}

impl DirtyRanges {
    fn new(granularity_bytes: u64, size_bytes: u64) -> Self {
        Self { set: RangeSet::new(), granularity_bytes, size_bytes }
    }

    fn push(&mut self, first_bit: u64, bits: u64) {
        let start = first_bit.saturating_mul(self.granularity_bytes);
        let end = (first_bit + bits).saturating_mul(self.granularity_bytes);
        self.set.insert(ByteRange::from_bounds(start, end.min(self.size_bytes)));
        if self.set.as_slice().len() > MAX_RANGES {
            // To half, so that the next rounding is as many ranges away.
            self.set = std::mem::take(&mut self.set).bounded(MAX_RANGES / 2, self.size_bytes);
        }
    }

    /// Bit 0 of a byte is the first (specification, "Bitmap data").
    fn push_bits(&mut self, first_bit: u64, bytes: &[u8]) {
        let mut start = None;
        let mut at = first_bit;
        for byte in bytes {
            // Whole bytes of one value are nearly all there is.
            match (*byte, start) {
                (0, None) | (0xff, Some(_)) => {}
                (value, _) => {
                    for bit in 0..8 {
                        match (value >> bit & 1, start) {
                            (1, None) => start = Some(at + bit),
                            (0, Some(first)) => {
                                self.push(first, at + bit - first);
                                start = None;
                            }
                            _ => {}
                        }
                    }
                }
            }
            at += 8;
        }
        if let Some(first) = start {
            self.push(first, at - first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_become_the_ranges_they_stand_for() {
        let mut dirty = DirtyRanges::new(512, 512 * 45);
        dirty.push_bits(0, &[0b1000_0001, 0xff, 0b1, 0, 0b10, 0xff]);
        let expected = [
            ByteRange::new(0, 512),
            ByteRange::new(7 * 512, 10 * 512),
            ByteRange::new(33 * 512, 512),
            ByteRange::new(40 * 512, 5 * 512),
        ];
        assert_eq!(dirty.set.as_slice(), expected);
    }
}
