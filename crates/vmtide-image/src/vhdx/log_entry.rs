//! One entry of the log (MS-VHDX 2.3.1): some pages of the file that change together.
//!
//! An entry is a header and descriptors, 32 bytes each, packed into sectors of 4 KiB, and then one
//! data sector for each page descriptor. The first 8 and last 4 bytes of a page are kept in its
//! descriptor, because the data sector needs their place for its signature and sequence number, by
//! which a torn write is seen.

use super::checksum;
use super::guid::Guid;
use crate::bytes::{le_u32, le_u64, put};
use vmtide_block::ByteRange;

/// The unit of the log and of the pages it changes.
pub(crate) const LOG_SECTOR_BYTES: usize = 4096;
/// The bytes of a header, as many as two descriptors.
const HEADER_BYTES: usize = 64;
/// The bytes of a descriptor.
pub(crate) const DESCRIPTOR_BYTES: usize = 32;
/// The bytes of a page that are in its descriptor, before and after those in the data sector.
const LEADING: usize = 8;
const TRAILING: usize = 4;

/// The header of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EntryHeader {
    /// The bytes of the entry, all its sectors.
    pub(crate) entry_bytes: u32,
    /// Where in the log the oldest entry begins that was still needed when this one was written.
    pub(crate) tail: u32,
    /// One more than the previous entry's.
    pub(crate) sequence_number: u64,
    /// The number of descriptors.
    pub(crate) descriptor_count: u32,
    /// The log's GUID when it was written.
    pub(crate) log_guid: Guid,
    /// The file had at least this many bytes, all on stable storage: a shorter one is truncated.
    pub(crate) flushed_file_offset: u64,
    /// All structures of the file lie before this byte; the file is made as long before replay.
    pub(crate) last_file_offset: u64,
}

impl EntryHeader {
    /// Decodes the head of an entry; `None` where none begins here. Only the signature is checked.
    pub(crate) fn decode(sector: &[u8]) -> Option<Self> {
        if sector.len() < HEADER_BYTES || !sector.starts_with(b"loge") {
            return None;
        }
        Some(Self {
            entry_bytes: le_u32(sector, 8),
            tail: le_u32(sector, 12),
            sequence_number: le_u64(sector, 16),
            descriptor_count: le_u32(sector, 24),
            log_guid: Guid::at(sector, 32),
            flushed_file_offset: le_u64(sector, 48),
            last_file_offset: le_u64(sector, 56),
        })
    }

    /// The sectors that the header and the descriptors take.
    pub(crate) fn descriptor_sectors(&self) -> u64 {
        descriptor_sectors(u64::from(self.descriptor_count))
    }
}

fn descriptor_sectors(descriptors: u64) -> u64 {
    (HEADER_BYTES as u64 + descriptors * DESCRIPTOR_BYTES as u64).div_ceil(LOG_SECTOR_BYTES as u64)
}

/// A descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Descriptor {
    /// A page is replaced; its middle is in the next data sector.
    Page {
        /// Where the page is in the file.
        offset: u64,
        /// Its ends.
        ends: PageEnds,
    },
    /// A range of the file becomes zeros.
    Zero(ByteRange),
}

/// The bytes of a page that are in its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageEnds {
    leading: [u8; LEADING],
    trailing: [u8; TRAILING],
}

impl Descriptor {
    /// Decodes the descriptor at the head of `bytes`, which must belong to the entry with this
    /// sequence number; `None` where it is none or does not.
    pub(crate) fn decode(bytes: &[u8], sequence_number: u64) -> Option<Self> {
        let bytes = bytes.get(..DESCRIPTOR_BYTES)?;
        if le_u64(bytes, 24) != sequence_number {
            return None;
        }
        let offset = le_u64(bytes, 16);
        match bytes.get(..4)? {
            b"desc" => {
                let ends = PageEnds {
                    trailing: bytes.get(4..8)?.try_into().ok()?,
                    leading: bytes.get(8..16)?.try_into().ok()?,
                };
                Some(Self::Page { offset, ends })
            }
            b"zero" => Some(Self::Zero(ByteRange::new(offset, le_u64(bytes, 8)))),
            _ => None,
        }
    }
}

impl PageEnds {
    /// The page whose middle is in this data sector.
    pub(crate) fn page(&self, data_sector: &[u8; LOG_SECTOR_BYTES]) -> [u8; LOG_SECTOR_BYTES] {
        let mut page = *data_sector;
        put(&mut page, 0, &self.leading);
        put(&mut page, LOG_SECTOR_BYTES - TRAILING, &self.trailing);
        page
    }
}

/// Whether `sector` is a data sector of the entry with this sequence number.
pub(crate) fn is_data_sector(sector: &[u8], sequence_number: u64) -> bool {
    let number =
        u64::from(le_u32(sector, 4)) << 32 | u64::from(le_u32(sector, LOG_SECTOR_BYTES - TRAILING));
    sector.len() == LOG_SECTOR_BYTES && sector.starts_with(b"data") && number == sequence_number
}

/// One change that an entry makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// The page at `offset`, a multiple of 4 KiB, becomes `bytes`.
    Page {
        /// Where it is in the file.
        offset: u64,
        /// Its content.
        bytes: Box<[u8; LOG_SECTOR_BYTES]>,
    },
    /// This range of the file, whole pages, becomes zeros.
    #[cfg_attr(not(test), allow(dead_code, reason = "our writer logs pages alone"))]
    Zero(ByteRange),
}

/// The bytes of an entry that makes `changes`, ready to be written to the log (where it wraps at
/// the end). Of `header`, the length and the number of descriptors are found here. `None` where
/// the entry would be longer than a `u32` says.
pub(crate) fn encode_entry(header: &EntryHeader, changes: &[Change]) -> Option<Vec<u8>> {
    let pages = changes.iter().filter(|change| matches!(change, Change::Page { .. })).count();
    let sectors = descriptor_sectors(changes.len() as u64) + pages as u64;
    let entry_bytes = u32::try_from(sectors.checked_mul(LOG_SECTOR_BYTES as u64)?).ok()?;
    let mut entry = vec![0; entry_bytes as usize];
    put(&mut entry, 0, b"loge");
    put(&mut entry, 8, &entry_bytes.to_le_bytes());
    put(&mut entry, 12, &header.tail.to_le_bytes());
    put(&mut entry, 16, &header.sequence_number.to_le_bytes());
    put(&mut entry, 24, &u32::try_from(changes.len()).ok()?.to_le_bytes());
    put(&mut entry, 32, &header.log_guid.to_bytes());
    put(&mut entry, 48, &header.flushed_file_offset.to_le_bytes());
    put(&mut entry, 56, &header.last_file_offset.to_le_bytes());
    let number = header.sequence_number.to_le_bytes();
    let mut sector_at = entry.len() - pages * LOG_SECTOR_BYTES;
    for (index, change) in changes.iter().enumerate() {
        let at = HEADER_BYTES + index * DESCRIPTOR_BYTES;
        put(&mut entry, at + 24, &number);
        match change {
            Change::Zero(range) => {
                put(&mut entry, at, b"zero");
                put(&mut entry, at + 8, &range.length.to_le_bytes());
                put(&mut entry, at + 16, &range.offset.to_le_bytes());
            }
            Change::Page { offset, bytes } => {
                let trailing = &bytes[LOG_SECTOR_BYTES - TRAILING..];
                put(&mut entry, at, b"desc");
                put(&mut entry, at + 4, trailing);
                put(&mut entry, at + 8, &bytes[..LEADING]);
                put(&mut entry, at + 16, &offset.to_le_bytes());
                put(&mut entry, sector_at, &bytes[..]);
                put(&mut entry, sector_at, b"data");
                put(&mut entry, sector_at + 4, &number[4..]);
                put(&mut entry, sector_at + LOG_SECTOR_BYTES - TRAILING, &number[..4]);
                sector_at += LOG_SECTOR_BYTES;
            }
        }
    }
    checksum::seal(&mut entry);
    Some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> EntryHeader {
        EntryHeader {
            entry_bytes: 0,
            tail: 8192,
            sequence_number: 0x0123_4567_89ab_cdef,
            descriptor_count: 0,
            log_guid: Guid::new(1, 2, 3, [4; 8]),
            flushed_file_offset: 5 << 20,
            last_file_offset: 7 << 20,
        }
    }

    fn page(offset: u64) -> Change {
        let mut bytes = Box::new([0; LOG_SECTOR_BYTES]);
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::try_from((index as u64 * 7 + offset / 4096) % 251).unwrap();
        }
        Change::Page { offset, bytes }
    }

    /// The changes of an entry, by decoding.
    fn decode(entry: &[u8]) -> (EntryHeader, Vec<Change>) {
        assert!(checksum::is_sealed(entry));
        let header = EntryHeader::decode(entry).unwrap();
        let number = header.sequence_number;
        let head = usize::try_from(header.descriptor_sectors()).unwrap() * LOG_SECTOR_BYTES;
        let mut sectors = entry[head..].chunks_exact(LOG_SECTOR_BYTES);
        let descriptors = entry[HEADER_BYTES..].chunks_exact(DESCRIPTOR_BYTES);
        let changes =
            descriptors.take(header.descriptor_count as usize).map(
                |bytes| match Descriptor::decode(bytes, number).unwrap() {
                    Descriptor::Zero(range) => Change::Zero(range),
                    Descriptor::Page { offset, ends } => {
                        let sector = sectors.next().unwrap();
                        assert!(is_data_sector(sector, number));
                        assert!(!is_data_sector(sector, number ^ 1));
                        assert!(!is_data_sector(sector, number ^ 1 << 63));
                        let bytes = Box::new(ends.page(sector.try_into().unwrap()));
                        Change::Page { offset, bytes }
                    }
                },
            );
        let changes = changes.collect();
        assert_eq!(sectors.len(), 0);
        (header, changes)
    }

    #[test]
    fn entries_come_back() {
        // 126 descriptors fill the first sector; the 127th starts another one.
        for (pages, sectors) in [(0, 1), (1, 2), (125, 126), (126, 128), (253, 255), (254, 257)] {
            let mut changes: Vec<Change> = (0..pages).map(|page_at| page(page_at << 20)).collect();
            if pages > 0 {
                changes.insert(1, Change::Zero(ByteRange::new(3 << 20, 1 << 20)));
            }
            let entry = encode_entry(&header(), &changes).unwrap();
            assert_eq!(entry.len(), sectors * LOG_SECTOR_BYTES, "{pages} pages");
            let (found, decoded) = decode(&entry);
            assert_eq!(decoded, changes);
            let expected = EntryHeader {
                entry_bytes: u32::try_from(entry.len()).unwrap(),
                descriptor_count: u32::try_from(changes.len()).unwrap(),
                ..header()
            };
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn what_is_no_entry_is_seen() {
        let entry = encode_entry(&header(), &[page(0)]).unwrap();
        assert_eq!(EntryHeader::decode(&entry[1..]), None);
        assert_eq!(EntryHeader::decode(&entry[..63]), None);
        let number = header().sequence_number;
        assert!(Descriptor::decode(&entry[64..], number).is_some());
        assert_eq!(Descriptor::decode(&entry[64..], number + 1), None);
        assert_eq!(Descriptor::decode(&entry[..32], le_u64(&entry, 24)), None);
        assert_eq!(Descriptor::decode(&entry[64..80], number), None);
        assert!(!is_data_sector(&entry[4096..8191], number));
    }
}
