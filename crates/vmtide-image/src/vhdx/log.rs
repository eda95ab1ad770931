//! Finding what is live in the log (MS-VHDX 2.3.2).
//!
//! The log is a ring of entries. When a writer did not close the image, the changes of the last
//! entries may not have reached their places yet and must be made again before anything but the
//! headers is read. Which entries these are is found by looking: entries with the log's GUID and
//! consecutive numbers form sequences, and the one that counts is the one whose last entry (the
//! head) has the highest number and names a tail inside it. What lies before the tail, has another
//! GUID or was torn is left over and means nothing.

use super::checksum;
use super::header::{Header, MIB};
use super::log_entry::{
    DESCRIPTOR_BYTES, Descriptor, EntryHeader, LOG_SECTOR_BYTES, PageEnds, is_data_sector,
};
use super::region::REGION_TABLE_OFFSETS;
use crate::bytes::length;
use std::collections::HashMap;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result};

/// A log sector's bytes as an offset.
const SECTOR: u64 = LOG_SECTOR_BYTES as u64;
/// How much of the log is read at once.
const WINDOW_BYTES: u64 = 256 << 10;
/// The most valid entries of a log, some 20 MiB of memory. Hypervisors' logs of 1 MiB have room for
/// 256.
const MAX_ENTRIES: usize = 1 << 16;
/// No file of a 64 TiB disk with its tables and bitmaps is larger; a log that wants the file to be
/// made larger is damaged.
const MAX_FILE_BYTES: u64 = 128 << 40;

/// The live entries of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ActiveLog {
    /// Where the log is.
    log: ByteRange,
    /// The entries from the tail to the head, by their place in the log.
    entries: Vec<(u64, EntryHeader)>,
}

/// One change that replaying makes to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LoggedChange {
    /// The page at `offset` is replaced.
    Page {
        /// Where the page is.
        offset: u64,
        /// Its ends.
        ends: PageEnds,
        /// Where in the file the data sector with its middle is.
        data_at: u64,
    },
    /// A range becomes zeros.
    Zero(ByteRange),
}

impl ActiveLog {
    /// Finds the live entries of the log that `header`, the current one, names; `None` where the
    /// log is empty. Reads the log once, in constant memory but for some bytes per entry.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] where the log should hold entries and none is live, where it is not
    /// inside the file, and where the file is shorter than when the head was written;
    /// [`BlockError::Unsupported`] for a version of the log that is not known, and for more than
    /// 65,536 valid entries.
    pub(crate) fn find(file: &dyn BlockDevice, header: &Header) -> Result<Option<Self>> {
        if !header.is_log_dirty() {
            return Ok(None);
        }
        let log = check_log(file, header)?;
        let mut ring = Ring::new(file, log);
        let found = scan(&mut ring, header)?;
        let entries = pick(&found, log.length).ok_or_else(|| {
            BlockError::damaged(
                file.name(),
                format!(
                    "log at {:#x}: the header says that it holds entries ({}), but of {} valid \
                     ones no sequence is complete; changes are lost",
                    log.offset,
                    header.log_guid,
                    found.len()
                ),
            )
        })?;
        let active = Self { log, entries };
        active.check_size(file)?;
        Ok(Some(active))
    }

    /// The number of entries.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The size that the file must have before its pages are changed, in bytes: at least the
    /// head's LastFileOffset, in whole MiB where that is more than the file has.
    pub(crate) fn file_size_bytes(&self, file: &dyn BlockDevice) -> u64 {
        let last = self.entries.last().map_or(0, |(_, head)| head.last_file_offset);
        let size_bytes = file.size_bytes();
        if last > size_bytes { last.next_multiple_of(MIB) } else { size_bytes }
    }

    fn check_size(&self, file: &dyn BlockDevice) -> Result<()> {
        let size_bytes = file.size_bytes();
        let Some((position, head)) = self.entries.last() else {
            return Ok(());
        };
        let at = self.log.offset + position;
        if size_bytes < head.flushed_file_offset {
            return Err(BlockError::damaged(
                file.name(),
                format!(
                    "log entry at {at:#x}: FlushedFileOffset is {}, but the file has only \
                     {size_bytes} bytes: it is a truncated copy",
                    head.flushed_file_offset
                ),
            ));
        }
        if head.last_file_offset > MAX_FILE_BYTES.max(size_bytes) {
            return Err(BlockError::damaged(
                file.name(),
                format!(
                    "log entry at {at:#x}: LastFileOffset is {}, more than any VHDX has",
                    head.last_file_offset
                ),
            ));
        }
        Ok(())
    }

    /// Calls `visit` with every change, in the order in which they must be made.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] for a change that is not of whole pages inside the file, or that
    /// would overwrite the headers or the log; those of `visit`.
    pub(crate) fn for_each_change(
        &self,
        file: &dyn BlockDevice,
        mut visit: impl FnMut(LoggedChange) -> Result<()>,
    ) -> Result<()> {
        let mut ring = Ring::new(file, self.log);
        let end = self.file_size_bytes(file).next_multiple_of(SECTOR);
        for (position, header) in &self.entries {
            let mut data_sector = header.descriptor_sectors();
            for index in 0..u64::from(header.descriptor_count) {
                // Two descriptors' room is the header's.
                let byte = (index + 2) * DESCRIPTOR_BYTES as u64;
                let sector = ring.sector(position + byte / SECTOR * SECTOR)?;
                let bytes = &sector[length(byte % SECTOR)..];
                let bad = |what: &str| {
                    BlockError::damaged(
                        file.name(),
                        format!(
                            "log entry at {:#x}: descriptor {index} {what}",
                            self.log.offset + position
                        ),
                    )
                };
                let descriptor = Descriptor::decode(bytes, header.sequence_number)
                    .ok_or_else(|| bad("is none any more: something writes to the file"))?;
                let (change, range) = match descriptor {
                    Descriptor::Zero(range) => (LoggedChange::Zero(range), range),
                    Descriptor::Page { offset, ends } => {
                        let data_at = ring.file_offset(position + data_sector * SECTOR);
                        data_sector += 1;
                        let change = LoggedChange::Page { offset, ends, data_at };
                        (change, ByteRange::new(offset, SECTOR))
                    }
                };
                self.check_target(range, end).map_err(|fault| bad(&fault))?;
                visit(change)?;
            }
        }
        Ok(())
    }

    fn check_target(&self, range: ByteRange, end: u64) -> Result<(), String> {
        let aligned = range.offset.is_multiple_of(SECTOR) && range.length.is_multiple_of(SECTOR);
        let inside = range.checked_end().is_some_and(|range_end| range_end <= end);
        // The headers are never logged; the region tables behind them are.
        let on_headers = range.offset < REGION_TABLE_OFFSETS[0];
        if !aligned || !inside || on_headers || !range.intersect(&self.log).is_empty() {
            return Err(format!(
                "changes {} bytes at {:#x}, must be whole pages of 4 KiB behind the headers, not \
                 in the log, in a file of {end} bytes",
                range.length, range.offset
            ));
        }
        Ok(())
    }
}

/// Where the log is, once it is known to be a place where a log can be.
fn check_log(file: &dyn BlockDevice, header: &Header) -> Result<ByteRange> {
    if header.log_version != 0 {
        return Err(BlockError::unsupported(
            file.name(),
            format!(
                "header: the log has the version {}, only 0 is known; a newer program wrote this \
                 image and must replay its log",
                header.log_version
            ),
        ));
    }
    let log = header.log;
    let inside = log.checked_end().is_some_and(|end| end <= file.size_bytes());
    if !inside || log.offset < MIB || log.is_empty() || !log.length.is_multiple_of(SECTOR) {
        return Err(BlockError::damaged(
            file.name(),
            format!(
                "header: the log of {} bytes at {:#x} must be a multiple of 4 KiB behind the first \
                 MiB and inside the file of {} bytes",
                log.length,
                log.offset,
                file.size_bytes()
            ),
        ));
    }
    Ok(log)
}

/// The log as the ring it is: positions past its end continue at its start.
struct Ring<'a> {
    file: &'a dyn BlockDevice,
    log: ByteRange,
    window: Vec<u8>,
    /// The position of the window's first byte; meaningless while the window is empty.
    window_at: u64,
}

impl<'a> Ring<'a> {
    const fn new(file: &'a dyn BlockDevice, log: ByteRange) -> Self {
        Self { file, log, window: Vec::new(), window_at: 0 }
    }

    /// Where in the file a position of the log is.
    const fn file_offset(&self, position: u64) -> u64 {
        self.log.offset + position % self.log.length
    }

    /// The sector at a position, a multiple of 4 KiB.
    fn sector(&mut self, position: u64) -> Result<&[u8]> {
        let position = position % self.log.length;
        let ahead = position.wrapping_sub(self.window_at);
        if ahead >= self.window.len() as u64 {
            self.window.resize(length(WINDOW_BYTES.min(self.log.length - position)), 0);
            self.window_at = position;
            let read = self.file.read_at(&mut self.window, self.log.offset + position);
            if read.is_err() {
                self.window.clear();
            }
            read?;
        }
        let start = length(position - self.window_at);
        Ok(&self.window[start..start + LOG_SECTOR_BYTES])
    }
}

/// All valid entries, by their position.
///
/// An entry's sectors never begin as another entry does, so looking at each position costs the log
/// once however it was forged.
fn scan(ring: &mut Ring<'_>, header: &Header) -> Result<Vec<(u64, EntryHeader)>> {
    let mut found = Vec::new();
    let mut position = 0;
    while position < ring.log.length {
        let sector = ring.sector(position)?;
        let entry = EntryHeader::decode(sector)
            .filter(|entry| entry.log_guid == header.log_guid && is_possible(entry, ring.log));
        position += match entry {
            Some(entry) if is_valid(ring, position, &entry)? => {
                let bytes = u64::from(entry.entry_bytes);
                found.push((position, entry));
                if found.len() > MAX_ENTRIES {
                    return Err(BlockError::unsupported(
                        ring.file.name(),
                        format!(
                            "log at {:#x}: more than {MAX_ENTRIES} valid entries",
                            ring.log.offset
                        ),
                    ));
                }
                bytes
            }
            _ => SECTOR,
        };
    }
    Ok(found)
}

fn is_possible(entry: &EntryHeader, log: ByteRange) -> bool {
    let (bytes, tail) = (u64::from(entry.entry_bytes), u64::from(entry.tail));
    bytes > 0
        && bytes.is_multiple_of(SECTOR)
        && bytes <= log.length
        && tail.is_multiple_of(SECTOR)
        && tail < log.length
        && entry.sequence_number > 0
        && entry.descriptor_sectors() * SECTOR <= bytes
}

/// Whether all sectors of an entry belong to it and its checksum is right.
fn is_valid(ring: &mut Ring<'_>, position: u64, entry: &EntryHeader) -> Result<bool> {
    let number = entry.sequence_number;
    let sectors = u64::from(entry.entry_bytes) / SECTOR;
    let descriptor_sectors = entry.descriptor_sectors();
    let mut descriptors = u64::from(entry.descriptor_count);
    let mut pages = 0;
    let mut checksum = 0;
    let mut stored = 0;
    for index in 0..sectors {
        let sector = ring.sector(position + index * SECTOR)?;
        if index < descriptor_sectors {
            let head = if index == 0 { 2 * DESCRIPTOR_BYTES } else { 0 };
            for bytes in sector[head..].chunks_exact(DESCRIPTOR_BYTES) {
                if descriptors == 0 {
                    break;
                }
                descriptors -= 1;
                match Descriptor::decode(bytes, number) {
                    Some(Descriptor::Page { .. }) => pages += 1,
                    Some(Descriptor::Zero(_)) => {}
                    None => return Ok(false),
                }
            }
        } else if index < descriptor_sectors + pages {
            if !is_data_sector(sector, number) {
                return Ok(false);
            }
        } else if sector.starts_with(b"loge") {
            return Ok(false);
        }
        if index == 0 {
            stored = checksum::stored(sector);
            checksum = checksum::checksum(sector);
        } else {
            checksum = crc32c::crc32c_append(checksum, sector);
        }
    }
    Ok(checksum == stored && descriptor_sectors + pages <= sectors)
}

/// The sequence that counts, from its head's tail on.
fn pick(found: &[(u64, EntryHeader)], log_bytes: u64) -> Option<Vec<(u64, EntryHeader)>> {
    let by_position: HashMap<u64, usize> =
        found.iter().enumerate().map(|(index, (position, _))| (*position, index)).collect();
    let next_of = |(position, entry): &(u64, EntryHeader)| {
        let next = (position + u64::from(entry.entry_bytes)) % log_bytes;
        let index = *by_position.get(&next)?;
        let number = found.get(index)?.1.sequence_number;
        (entry.sequence_number.checked_add(1) == Some(number)).then_some(index)
    };
    let mut is_first = vec![true; found.len()];
    for index in found.iter().filter_map(next_of) {
        is_first[index] = false;
    }
    let mut best: Option<Vec<(u64, EntryHeader)>> = None;
    let firsts = found.iter().zip(&is_first).filter(|(_, is_first)| **is_first);
    for (first, _) in firsts {
        // The numbers only grow, so no sequence comes back to itself.
        let mut sequence = vec![first.clone()];
        while let Some(next) = sequence.last().and_then(next_of).and_then(|index| found.get(index))
        {
            sequence.push(next.clone());
        }
        let Some((_, head)) = sequence.last() else { continue };
        let (head_number, tail) = (head.sequence_number, u64::from(head.tail));
        let Some(start) = sequence.iter().position(|(position, _)| *position == tail) else {
            continue;
        };
        let best_number =
            best.as_ref().and_then(|best| best.last()).map(|(_, head)| head.sequence_number);
        if best_number.is_none_or(|number| head_number > number) {
            best = Some(sequence.split_off(start));
        }
    }
    best
}
