//! Changing metadata through the log (MS-VHDX 2.3), and the headers that say the log is in use.
//!
//! Each entry is written when all earlier ones are in place and durable, so an entry is its own
//! tail and only the last one ever counts. An entry takes at most half of the log: the one before
//! it stays whole until the next is durable.
//!
//! The log is live from the moment the header carries its GUID, and a live log without a valid
//! entry is damage. So the first entry is written under a new GUID that the header does not have
//! yet, and the header takes it over when the entry is durable.

use super::guid::Guid;
use super::header::{HEADER_OFFSETS, Headers, MIB};
use super::log_entry::{Change, DESCRIPTOR_BYTES, EntryHeader, LOG_SECTOR_BYTES, encode_entry};
use super::pages::Page;
use super::region::RegionTable;
use crate::bytes::length;
use std::sync::Arc;
use vmtide_block::{BlockError, ByteRange, Result, WritableBlockDevice};

/// The most pages in one entry, however long the log is: more would only take memory.
const MAX_ENTRY_PAGES: u64 = 1024;

/// The headers and the log of a file that is open for writing.
pub(super) struct Journal {
    headers: Headers,
    /// Where in the log the next entry goes, in bytes.
    next: u64,
    /// The next entry's number.
    sequence_number: u64,
    /// The DataWriteGuid of the next change of the disk, where somebody asked for it.
    next_data_write_guid: Option<Guid>,
}

impl Journal {
    /// The journal of a file that was just made, whose log is empty.
    pub(super) const fn new(headers: Headers) -> Self {
        Self { headers, next: 0, sequence_number: 1, next_data_write_guid: None }
    }

    /// The journal of an image that somebody else wrote, whose log is empty. Readers do not care
    /// where an empty log is; who writes entries would write over whatever is there.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] where the log is not a multiple of 1 MiB at a multiple of 1 MiB
    /// (MS-VHDX 2.2.2), is not inside the file, or lies on the header section or a region. The
    /// blocks are the caller's to look at.
    pub(super) fn open(
        file: &dyn WritableBlockDevice,
        headers: Headers,
        regions: &RegionTable,
    ) -> Result<Self> {
        let log = headers.current.log;
        let damaged = |rule: &str| {
            Err(BlockError::damaged(
                file.name(),
                format!(
                    "header {} at {:#x}: the log of {} bytes at {:#x} {rule}; it must not be \
                     written: read what is there into a new image",
                    headers.slot + 1,
                    HEADER_OFFSETS.get(headers.slot).copied().unwrap_or_default(),
                    log.length,
                    log.offset
                ),
            ))
        };
        if log.is_empty() || !log.offset.is_multiple_of(MIB) || !log.length.is_multiple_of(MIB) {
            return damaged("must be a multiple of 1 MiB, at least one, at a multiple of 1 MiB");
        }
        if log.checked_end().is_none_or(|end| end > file.size_bytes()) {
            return damaged("must be inside the file");
        }
        let header_section = std::iter::once(ByteRange::new(0, MIB));
        let regions = regions.regions.iter().map(|region| region.range);
        for part in header_section.chain(regions) {
            if !part.intersect(&log).is_empty() {
                return damaged(&format!(
                    "must not lie on the {} bytes at {:#x}, which are something else",
                    part.length, part.offset
                ));
            }
        }
        Ok(Self::new(headers))
    }

    /// Where the log is.
    pub(super) const fn log(&self) -> ByteRange {
        self.headers.current.log
    }

    /// The DataWriteGuid that the next call of [`renew_guids`](Self::renew_guids) gives the image.
    ///
    /// # Errors
    /// Where the system has no random bytes.
    pub(super) fn next_data_write_guid(&mut self) -> Result<Guid> {
        let guid = self.next_data_write_guid.map_or_else(Guid::random, Ok)?;
        self.next_data_write_guid = Some(guid);
        Ok(guid)
    }

    /// Says that only this file changed, and not the disk in it.
    ///
    /// # Errors
    /// What the file says.
    pub(super) fn renew_file_guid(&mut self, file: &dyn WritableBlockDevice) -> Result<()> {
        let file_write_guid = Guid::random()?;
        self.headers.update(file, |header| header.file_write_guid = file_write_guid)
    }

    /// Says that this file and the disk in it are no longer what they were.
    ///
    /// # Errors
    /// What the file says.
    pub(super) fn renew_guids(&mut self, file: &dyn WritableBlockDevice) -> Result<()> {
        let (file_write_guid, data_write_guid) = (Guid::random()?, self.next_data_write_guid()?);
        self.next_data_write_guid = None;
        self.headers.update(file, |header| {
            header.file_write_guid = file_write_guid;
            header.data_write_guid = data_write_guid;
        })
    }

    /// Changes pages of the file so that a crash leaves all or none of them changed, as far as
    /// they fit in one entry, and the first ones changed where they need several. Everything
    /// written before the call becomes durable first. On return the changes are durable in the
    /// log, and are in place. The file has, and will always have, at least `file_bytes` bytes.
    ///
    /// # Errors
    /// What the file says; how far the changes came is not known then.
    pub(super) fn commit(
        &mut self,
        file: &dyn WritableBlockDevice,
        pages: &[(u64, Arc<Page>)],
        file_bytes: u64,
    ) -> Result<()> {
        for pages in pages.chunks(length(self.entry_pages())) {
            // The data that the pages lead to, and what the last entry changed in place, before it
            // is no longer needed.
            file.flush()?;
            let changes: Vec<Change> = pages
                .iter()
                .map(|(offset, page)| Change::Page { offset: *offset, bytes: Box::new(**page) })
                .collect();
            self.append(file, &changes, file_bytes)?;
            for (offset, page) in pages {
                file.write_at(&**page, *offset)?;
            }
        }
        Ok(())
    }

    /// How many pages one call of [`commit`](Self::commit) changes all or none of: as many as fill half of the log.
    pub(super) fn entry_pages(&self) -> u64 {
        let sectors = self.headers.current.log.length / LOG_SECTOR_BYTES as u64 / 2;
        let descriptors = (LOG_SECTOR_BYTES / DESCRIPTOR_BYTES) as u64;
        // Each sector of descriptors serves as many pages; the header takes the place of two.
        (sectors.saturating_sub(2) * descriptors / (descriptors + 1)).clamp(1, MAX_ENTRY_PAGES)
    }

    /// Writes an entry and makes it durable and live.
    fn append(
        &mut self,
        file: &dyn WritableBlockDevice,
        changes: &[Change],
        file_bytes: u64,
    ) -> Result<()> {
        let log = self.headers.current.log;
        let is_live = self.headers.current.is_log_dirty();
        let log_guid = if is_live { self.headers.current.log_guid } else { Guid::random()? };
        let header = EntryHeader {
            entry_bytes: 0,
            tail: u32::try_from(self.next).unwrap_or(u32::MAX),
            sequence_number: self.sequence_number,
            descriptor_count: 0,
            log_guid,
            flushed_file_offset: file_bytes,
            last_file_offset: file_bytes,
        };
        let Some(entry) = encode_entry(&header, changes) else {
            return Err(BlockError::unsupported(file.name(), "a log entry would be too long"));
        };
        let first = length(log.length.saturating_sub(self.next)).min(entry.len());
        let (before_end, wrapped) = entry.split_at(first);
        file.write_at(before_end, log.offset + self.next)?;
        if !wrapped.is_empty() {
            file.write_at(wrapped, log.offset)?;
        }
        file.flush()?;
        if !is_live {
            // The entries are of the only version there is, whatever the empty log claimed to be of.
            self.headers.update(file, |header| {
                header.log_guid = log_guid;
                header.log_version = 0;
            })?;
        }
        self.next = (self.next + entry.len() as u64) % log.length.max(1);
        self.sequence_number += 1;
        Ok(())
    }

    /// Makes everything durable and declares the log empty; false where it is already.
    ///
    /// # Errors
    /// What the file says.
    pub(super) fn empty(&mut self, file: &dyn WritableBlockDevice) -> Result<bool> {
        if !self.headers.current.is_log_dirty() {
            return Ok(false);
        }
        file.flush()?;
        self.headers.update(file, |header| header.log_guid = Guid::NIL)?;
        Ok(true)
    }
}
