//! Checking a VHDX without changing it.
//!
//! What opening refuses is an error of the check as a whole. What it lets pass is reported here:
//! a copy of a header or region table that is damaged beside a good one, and above all the BAT,
//! entry by entry, with a map of the file in which every MiB may be used once. Memory: two bits for
//! each MiB of the file, 32 MiB for the largest.

use super::bat::{BITMAP_BLOCK_BYTES, BatEntry, BatIndex, BitmapBlockState, BlockNumber};
use super::bat::{ChunkNumber, ENTRY_BYTES, EntryOf, Geometry, PayloadState};
use super::bits;
use super::header::{HEADER_BYTES, HEADER_OFFSETS, Header, MIB, read_creator};
use super::log::ActiveLog;
use super::region::{REGION_TABLE_BYTES, REGION_TABLE_OFFSETS, RegionTable};
use super::tables::Tables;
use crate::bytes::{le_u64, length};
use crate::{CheckReport, Problem, Severity};
use vmtide_block::{BlockDevice, ByteRange, Result};

/// The bytes of the BAT that are read at once.
const BAT_PIECE_BYTES: u64 = 1 << 20;
/// The most MiB of a file whose use is kept track of: twice the largest disk.
const MAX_UNITS: u64 = (128 << 40) / MIB;

/// Checks the image: headers, log, regions, metadata and every entry of the BAT. The parent is not
/// looked at.
///
/// # Errors
/// Where the image cannot be opened, or not be read.
pub(crate) fn check(file: &dyn BlockDevice) -> Result<CheckReport> {
    read_creator(file)?;
    let (tables, replayed) = Tables::replayed(file)?;
    let mut check = Check {
        file: &replayed,
        tables: &tables,
        report: CheckReport { size_bytes: tables.metadata.disk_size_bytes, ..Default::default() },
        units: Units::new(replayed.size_bytes()),
    };
    check.headers()?;
    check.log(file)?;
    check.regions()?;
    check.bat()?;
    check.unused();
    Ok(check.report)
}

/// What each MiB of the file is used for.
struct Units {
    count: u64,
    /// Holds something.
    used: Vec<u64>,
    /// Kept for a block that holds nothing now.
    reserved: Vec<u64>,
}

impl Units {
    fn new(file_bytes: u64) -> Self {
        let count = file_bytes.div_ceil(MIB).min(MAX_UNITS);
        let words = length(count.div_ceil(64));
        Self { count, used: vec![0; words], reserved: vec![0; words] }
    }

    /// Sets the bits of the MiB that `range` touches; answers with the first that was set before.
    fn mark(bits: &mut [u64], count: u64, range: ByteRange) -> Option<u64> {
        let mut twice = None;
        for unit in range.offset / MIB..range.end().div_ceil(MIB).min(count) {
            let (word, bit) = (length(unit / 64), 1 << (unit % 64));
            if let Some(word) = bits.get_mut(word) {
                if *word & bit != 0 && twice.is_none() {
                    twice = Some(unit * MIB);
                }
                *word |= bit;
            }
        }
        twice
    }

    fn use_range(&mut self, range: ByteRange) -> Option<u64> {
        Self::mark(&mut self.used, self.count, range)
    }

    fn reserve(&mut self, range: ByteRange) {
        Self::mark(&mut self.reserved, self.count, range);
    }
}

struct Check<'a> {
    /// The file with its log laid over it.
    file: &'a dyn BlockDevice,
    tables: &'a Tables,
    report: CheckReport,
    units: Units,
}

impl Check<'_> {
    fn add(&mut self, severity: Severity, detail: String) {
        self.report.add(Problem { severity, detail, repaired: false });
    }

    fn headers(&mut self) -> Result<()> {
        let headers = &self.tables.headers;
        let other = 1 - headers.slot;
        let other_at = HEADER_OFFSETS[other];
        let mut bytes = vec![0; HEADER_BYTES];
        self.file.read_at(&mut bytes, other_at)?;
        let detail = match Header::decode(&bytes) {
            Err(fault) => Some(format!(
                "header {} at {other_at:#x}: {fault}; the other header is used",
                other + 1
            )),
            Ok(found) if found.sequence_number == headers.current.sequence_number => Some(format!(
                "headers at {:#x} and {:#x}: both have the sequence number {}; they say the same",
                HEADER_OFFSETS[0], HEADER_OFFSETS[1], found.sequence_number
            )),
            Ok(_) => None,
        };
        if let Some(detail) = detail {
            self.add(Severity::Note, detail);
        }
        let log = headers.current.log;
        if !log.offset.is_multiple_of(MIB) || !log.length.is_multiple_of(MIB) || log.is_empty() {
            self.add(
                Severity::Error,
                format!(
                    "header {} at {:#x}: the log of {} bytes at {:#x} must be a multiple of 1 MiB \
                     at a multiple of 1 MiB",
                    headers.slot + 1,
                    HEADER_OFFSETS[headers.slot],
                    log.length,
                    log.offset
                ),
            );
        }
        Ok(())
    }

    fn log(&mut self, stored: &dyn BlockDevice) -> Result<()> {
        if let Some(log) = ActiveLog::find(stored, &self.tables.headers.current)? {
            self.add(
                Severity::Note,
                format!(
                    "log at {:#x}: {} entries were not replayed: the last writer did not close \
                     the image",
                    self.tables.headers.current.log.offset,
                    log.len()
                ),
            );
        }
        Ok(())
    }

    fn regions(&mut self) -> Result<()> {
        let regions = &self.tables.regions;
        if let Some(fault) = &regions.first_fault {
            let detail = format!(
                "region table 1 at {:#x}: {fault}; the second copy is used",
                REGION_TABLE_OFFSETS[0]
            );
            self.add(Severity::Note, detail);
        } else {
            let mut bytes = vec![0; REGION_TABLE_BYTES];
            self.file.read_at(&mut bytes, REGION_TABLE_OFFSETS[1])?;
            let at = REGION_TABLE_OFFSETS[1];
            match RegionTable::decode(&bytes) {
                Ok(table) if table == regions.table => {}
                Ok(_) => self.add(
                    Severity::Error,
                    format!("region table 2 at {at:#x}: says other things than the first copy"),
                ),
                Err(fault) => self.add(
                    Severity::Note,
                    format!("region table 2 at {at:#x}: {fault}; the first copy is used"),
                ),
            }
        }
        let file_bytes = self.file.size_bytes();
        for region in &regions.table.regions {
            let (id, range) = (region.id, region.range);
            let at = REGION_TABLE_OFFSETS[regions.copy];
            if !range.length.is_multiple_of(MIB) || range.end() > file_bytes {
                self.add(
                    Severity::Note,
                    format!(
                        "region table {} at {at:#x}: the region {id} of {} bytes at {:#x} should \
                         be a multiple of 1 MiB inside the file of {file_bytes} bytes",
                        regions.copy + 1,
                        range.length,
                        range.offset
                    ),
                );
            }
            self.units.use_range(range);
        }
        self.units.use_range(ByteRange::new(0, MIB));
        let log = self.tables.headers.current.log;
        if let Some(twice) = self.units.use_range(log) {
            let detail = format!(
                "header: the log of {} bytes at {:#x}: the file's {twice:#x} is in use",
                log.length, log.offset
            );
            self.add(Severity::Error, detail);
        }
        Ok(())
    }

    fn bat(&mut self) -> Result<()> {
        let bat = self.tables.bat();
        let geometry = self.tables.geometry;
        let mut bytes = Vec::new();
        let mut at = 0;
        // The sector bitmap of a chunk comes after its blocks; those that need it wait for it.
        let mut partial = Vec::new();
        while at < bat.length {
            bytes.resize(length(BAT_PIECE_BYTES.min(bat.length - at)), 0);
            self.file.read_at(&mut bytes, bat.offset + at)?;
            for (index, entry) in (at / ENTRY_BYTES..).zip(bytes.chunks_exact(8)) {
                let (index, entry) = (BatIndex(index), BatEntry(le_u64(entry, 0)));
                match geometry.entry_at(index) {
                    EntryOf::Payload(block) => self.payload(index, block, entry, &mut partial),
                    EntryOf::Bitmap(chunk) => {
                        let waiting = std::mem::take(&mut partial);
                        self.bitmap(index, chunk, entry, &waiting)?;
                    }
                }
            }
            at += BAT_PIECE_BYTES;
        }
        Ok(())
    }

    fn bad_entry(&mut self, severity: Severity, index: BatIndex, what: &str) {
        let at = self.tables.bat().offset + index.0 * ENTRY_BYTES;
        self.add(severity, format!("BAT entry {} at {at:#x}: {what}", index.0));
    }

    fn payload(
        &mut self,
        index: BatIndex,
        block: BlockNumber,
        entry: BatEntry,
        partial: &mut Vec<BlockNumber>,
    ) {
        let geometry = self.tables.geometry;
        self.reserved_bits(index, entry);
        let Some(state) = entry.payload_state() else {
            let what = format!("payload block {} has the state {}", block.0, entry.raw_state());
            return self.bad_entry(Severity::Error, index, &what);
        };
        if block.0 >= geometry.block_count() {
            if state != PayloadState::NotPresent {
                let what = format!("payload block {} is past the end of the disk", block.0);
                self.bad_entry(Severity::Note, index, &what);
            }
            return;
        }
        let place = ByteRange::new(entry.offset(), geometry.block_bytes());
        match state {
            PayloadState::FullyPresent => {
                self.report.allocated_bytes += geometry.bytes_of(block);
            }
            PayloadState::PartiallyPresent if geometry.has_parent => partial.push(block),
            PayloadState::PartiallyPresent => {
                let what = format!("payload block {} is partially present: no parent", block.0);
                return self.bad_entry(Severity::Error, index, &what);
            }
            _ if place.offset == 0 => return,
            _ => return self.units.reserve(place),
        }
        let needed = ByteRange::new(place.offset, geometry.bytes_of(block));
        self.placed(index, &format!("payload block {}", block.0), place, needed);
    }

    fn reserved_bits(&mut self, index: BatIndex, entry: BatEntry) {
        if entry.reserved() != 0 {
            let what = format!("{:#018x} has reserved bits set, {:#x}", entry.0, entry.reserved());
            self.bad_entry(Severity::Error, index, &what);
        }
    }

    /// Notes that a block is at `place`, of which the file must hold `needed`.
    fn placed(&mut self, index: BatIndex, what: &str, place: ByteRange, needed: ByteRange) {
        let file_bytes = self.file.size_bytes();
        if place.offset < MIB || needed.checked_end().is_none_or(|end| end > file_bytes) {
            let what = format!(
                "{what} at {:#x} is not behind the first MiB and inside the file of {file_bytes} \
                 bytes",
                place.offset
            );
            return self.bad_entry(Severity::Error, index, &what);
        }
        if let Some(twice) = self.units.use_range(place) {
            let what = format!("{what} at {:#x}: the file's {twice:#x} is in use", place.offset);
            self.bad_entry(Severity::Error, index, &what);
        }
    }

    fn bitmap(
        &mut self,
        index: BatIndex,
        chunk: ChunkNumber,
        entry: BatEntry,
        partial: &[BlockNumber],
    ) -> Result<()> {
        self.reserved_bits(index, entry);
        let what = format!("the sector bitmap of chunk {}", chunk.0);
        match entry.bitmap_state() {
            Some(BitmapBlockState::Present) if self.tables.geometry.has_parent => {
                let place = ByteRange::new(entry.offset(), BITMAP_BLOCK_BYTES);
                self.placed(index, &what, place, place);
                for block in partial {
                    self.report.allocated_bytes += self.stored_bytes(entry, *block)?;
                }
            }
            Some(BitmapBlockState::NotPresent) if partial.is_empty() => {
                if entry.offset() != 0 {
                    let place = ByteRange::new(entry.offset(), BITMAP_BLOCK_BYTES);
                    self.units.reserve(place);
                }
            }
            Some(BitmapBlockState::Present) => {
                let what = format!("{what} is present in an image without a parent");
                self.bad_entry(Severity::Note, index, &what);
            }
            Some(BitmapBlockState::NotPresent) => {
                let what = format!("{what} is not present, but {} blocks need it", partial.len());
                self.bad_entry(Severity::Error, index, &what);
            }
            None => {
                let what = format!("{what} has the state {}", entry.raw_state());
                self.bad_entry(Severity::Error, index, &what);
            }
        }
        Ok(())
    }

    /// The bytes of a partially present block that the sector bitmap at `entry` says are here.
    fn stored_bytes(&self, entry: BatEntry, block: BlockNumber) -> Result<u64> {
        let geometry: Geometry = self.tables.geometry;
        let first = geometry.bitmap_bit(block.0 << geometry.block_bits);
        let sectors = geometry.bytes_of(block).div_ceil(geometry.sector_bytes());
        let bitmap = ByteRange::from_bounds(first / 8, (first + sectors).div_ceil(8));
        let place = ByteRange::new(entry.offset().saturating_add(bitmap.offset), bitmap.length);
        if place.end() > self.file.size_bytes() {
            return Ok(0);
        }
        let mut bytes = vec![0; length(bitmap.length)];
        self.file.read_at(&mut bytes, place.offset)?;
        Ok(bits::count(&bytes, first % 8, first % 8 + sectors) << geometry.sector_bits)
    }

    fn unused(&mut self) {
        let mut unused = 0;
        let mut anchored_twice = 0;
        for (used, reserved) in self.units.used.iter().zip(&self.units.reserved) {
            unused += u64::from((used | reserved).count_zeros());
            anchored_twice += u64::from((used & reserved).count_ones());
        }
        // The last word has bits for MiB that the file does not have.
        unused -= self.units.used.len() as u64 * 64 - self.units.count;
        if unused > 0 {
            let detail = format!("{unused} MiB of the file are not in use: free for new blocks");
            self.add(Severity::Note, detail);
        }
        if anchored_twice > 0 {
            let detail = format!(
                "{anchored_twice} MiB of the file are kept for blocks that hold nothing, and in \
                 use by others"
            );
            self.add(Severity::Note, detail);
        }
    }
}
