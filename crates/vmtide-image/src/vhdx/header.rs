//! The file identifier and the two headers (MS-VHDX 2.2.1, 2.2.2).
//!
//! The headers are the root of everything and the only structures changed without the log. There
//! are two so that one is always whole: a change is written to the one that is not current with a
//! higher sequence number, flushed, and then made to the other one, too ([`Headers::update`]).

use super::checksum;
use super::guid::Guid;
use crate::bytes::{le_u16, le_u32, le_u64, put};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result, WritableBlockDevice};

/// The signature of the file identifier at offset 0.
pub(crate) const FILE_SIGNATURE: &[u8; 8] = b"vhdxfile";
/// Everything but the header section is aligned to this and begins after the first one.
pub(crate) const MIB: u64 = 1 << 20;
/// Where the two headers are.
pub(crate) const HEADER_OFFSETS: [u64; 2] = [64 << 10, 128 << 10];
/// The bytes of a header that its checksum covers.
pub(crate) const HEADER_BYTES: usize = 4096;
/// The only version of the format.
const VERSION: u16 = 1;
/// The bytes of the creator's name in UTF-16LE after the signature.
const CREATOR_BYTES: usize = 512;

/// The creator's name in the file identifier, for people only; `None` where there is none.
///
/// # Errors
/// [`BlockError::Damaged`] where the file does not begin as a VHDX does.
pub(crate) fn read_creator(file: &dyn BlockDevice) -> Result<Option<String>> {
    let mut bytes = [0; 8 + CREATOR_BYTES];
    if file.size_bytes() < MIB {
        return Err(BlockError::damaged(
            file.name(),
            format!(
                "file identifier at 0x0: the file has {} bytes, the header section alone has {MIB}",
                file.size_bytes()
            ),
        ));
    }
    file.read_at(&mut bytes, 0)?;
    if !bytes.starts_with(FILE_SIGNATURE) {
        return Err(BlockError::damaged(
            file.name(),
            format!(
                "file identifier at 0x0: the signature is {:?}, must be \"vhdxfile\"",
                String::from_utf8_lossy(&bytes[..8])
            ),
        ));
    }
    let units = bytes[8..].chunks_exact(2).map(|unit| le_u16(unit, 0));
    let name: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    Ok((!name.is_empty()).then(|| String::from_utf16_lossy(&name)))
}

/// The file identifier's bytes, to be written at offset 0 of a new file. A name longer than 255
/// UTF-16 units is cut.
pub(crate) fn encode_file_identifier(creator: &str) -> Vec<u8> {
    let mut bytes = vec![0; 8 + CREATOR_BYTES];
    put(&mut bytes, 0, FILE_SIGNATURE);
    // The last unit stays zero: readers take it as the end.
    for (index, unit) in creator.encode_utf16().take(CREATOR_BYTES / 2 - 1).enumerate() {
        put(&mut bytes, 8 + index * 2, &unit.to_le_bytes());
    }
    bytes
}

/// One header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The higher of two is current.
    pub(crate) sequence_number: u64,
    /// Changes when a writer opens the file for the first change of any kind.
    pub(crate) file_write_guid: Guid,
    /// Changes before the first change that the guest can see; children name their parent by it.
    pub(crate) data_write_guid: Guid,
    /// The GUID of the log's live entries; nil where the log is empty.
    pub(crate) log_guid: Guid,
    /// The version of the log's format; must be 0 where the log is not empty.
    pub(crate) log_version: u16,
    /// Where the log is: multiples of 1 MiB.
    pub(crate) log: ByteRange,
}

impl Header {
    /// Decodes a header; `Err` says what is wrong with it, to follow "header N at OFFSET: ".
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() < HEADER_BYTES {
            return Err(format!("only {} of {HEADER_BYTES} bytes", bytes.len()));
        }
        let bytes = &bytes[..HEADER_BYTES];
        if !bytes.starts_with(b"head") {
            let found = String::from_utf8_lossy(&bytes[..4]);
            return Err(format!("the signature is {found:?}, must be \"head\""));
        }
        if !checksum::is_sealed(bytes) {
            return Err(format!(
                "the checksum is {:#010x}, its bytes give {:#010x}",
                checksum::stored(bytes),
                checksum::checksum(bytes)
            ));
        }
        let version = le_u16(bytes, 66);
        if version != VERSION {
            return Err(format!("the version is {version}, only {VERSION} is known"));
        }
        Ok(Self {
            sequence_number: le_u64(bytes, 8),
            file_write_guid: Guid::at(bytes, 16),
            data_write_guid: Guid::at(bytes, 32),
            log_guid: Guid::at(bytes, 48),
            log_version: le_u16(bytes, 64),
            log: ByteRange::new(le_u64(bytes, 72), u64::from(le_u32(bytes, 68))),
        })
    }

    /// The header's 4096 bytes with their checksum. A log longer than a `u32` saturates.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        put(&mut bytes, 0, b"head");
        put(&mut bytes, 8, &self.sequence_number.to_le_bytes());
        put(&mut bytes, 16, &self.file_write_guid.to_bytes());
        put(&mut bytes, 32, &self.data_write_guid.to_bytes());
        put(&mut bytes, 48, &self.log_guid.to_bytes());
        put(&mut bytes, 64, &self.log_version.to_le_bytes());
        put(&mut bytes, 66, &VERSION.to_le_bytes());
        let log_bytes = u32::try_from(self.log.length).unwrap_or(u32::MAX);
        put(&mut bytes, 68, &log_bytes.to_le_bytes());
        put(&mut bytes, 72, &self.log.offset.to_le_bytes());
        checksum::seal(&mut bytes);
        bytes
    }

    /// Whether the log holds entries that must be replayed.
    pub(crate) fn is_log_dirty(&self) -> bool {
        !self.log_guid.is_nil()
    }
}

/// The current header and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Headers {
    /// The current header.
    pub(crate) current: Header,
    /// The index of the current one in [`HEADER_OFFSETS`].
    pub(crate) slot: usize,
    /// What is wrong with the other one, where it is not valid.
    pub(crate) other_fault: Option<String>,
}

impl Headers {
    /// Reads both headers and picks the current one: the valid one with the higher sequence number.
    /// Equal numbers are taken where the two say the same (Disk2vhd writes them so).
    ///
    /// # Errors
    /// [`BlockError::Damaged`] where neither is valid, or both are and contradict each other.
    pub(crate) fn read(file: &dyn BlockDevice) -> Result<Self> {
        let mut decoded = Vec::with_capacity(2);
        for offset in HEADER_OFFSETS {
            let mut bytes = vec![0; HEADER_BYTES];
            file.read_at(&mut bytes, offset)?;
            decoded.push(Header::decode(&bytes));
        }
        let second = decoded.pop().unwrap_or_else(|| Err("not read".into()));
        let first = decoded.pop().unwrap_or_else(|| Err("not read".into()));
        match (first, second) {
            (Ok(first), Ok(second)) => Self::newer(file, first, second),
            (Ok(current), Err(fault)) => Ok(Self { current, slot: 0, other_fault: Some(fault) }),
            (Err(fault), Ok(current)) => Ok(Self { current, slot: 1, other_fault: Some(fault) }),
            (Err(first), Err(second)) => Err(BlockError::damaged(
                file.name(),
                format!(
                    "header 1 at {:#x}: {first}; header 2 at {:#x}: {second}; one must be valid",
                    HEADER_OFFSETS[0], HEADER_OFFSETS[1]
                ),
            )),
        }
    }

    fn newer(file: &dyn BlockDevice, first: Header, second: Header) -> Result<Self> {
        if first.sequence_number == second.sequence_number && first != second {
            return Err(BlockError::damaged(
                file.name(),
                format!(
                    "headers at {:#x} and {:#x}: both have the sequence number {} but differ, so \
                     neither can be taken as the current one",
                    HEADER_OFFSETS[0], HEADER_OFFSETS[1], first.sequence_number
                ),
            ));
        }
        let slot = usize::from(second.sequence_number > first.sequence_number);
        let current = if slot == 1 { second } else { first };
        Ok(Self { current, slot, other_fault: None })
    }

    /// Changes the header: the other slot is written with the next sequence number and flushed,
    /// twice, so that both agree at the end and a crash at any point leaves a valid one
    /// (MS-VHDX 2.2.2.1). All writes to the rest of the file that the change relies on must have
    /// been flushed before.
    ///
    /// # Errors
    /// What the medium says; the headers are then as a crash would have left them, and `self` says
    /// what was written last.
    pub(crate) fn update(
        &mut self,
        file: &dyn WritableBlockDevice,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let mut next = self.current.clone();
        change(&mut next);
        for _ in 0..HEADER_OFFSETS.len() {
            next.sequence_number =
                self.current.sequence_number.checked_add(1).ok_or_else(|| {
                    BlockError::damaged(
                        file.name(),
                        format!(
                            "header at {:#x}: the sequence number is {}, which has no next one",
                            HEADER_OFFSETS[self.slot], self.current.sequence_number
                        ),
                    )
                })?;
            let slot = 1 - self.slot;
            file.write_at(&next.encode(), HEADER_OFFSETS[slot])?;
            file.flush()?;
            *self = Self { current: next.clone(), slot, other_fault: None };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::MemoryDevice;

    fn header(sequence_number: u64) -> Header {
        Header {
            sequence_number,
            file_write_guid: Guid::random().unwrap(),
            data_write_guid: Guid::random().unwrap(),
            log_guid: Guid::NIL,
            log_version: 0,
            log: ByteRange::new(MIB, MIB),
        }
    }

    fn file(first: &[u8], second: &[u8]) -> MemoryDevice {
        let file = MemoryDevice::new(1 << 20);
        file.write_at(&encode_file_identifier("a tool"), 0).unwrap();
        file.write_at(first, HEADER_OFFSETS[0]).unwrap();
        file.write_at(second, HEADER_OFFSETS[1]).unwrap();
        file
    }

    #[test]
    fn headers_come_back() {
        let header = header(7);
        let bytes = header.encode();
        assert_eq!(bytes.len(), HEADER_BYTES);
        assert_eq!(Header::decode(&bytes), Ok(header));
    }

    #[test]
    fn every_flipped_byte_is_found() {
        let bytes = header(7).encode();
        for at in [0, 4, 8, 16, 32, 48, 64, 66, 68, 72, 80, HEADER_BYTES - 1] {
            let mut broken = bytes.clone();
            broken[at] ^= 1;
            assert!(Header::decode(&broken).is_err(), "byte {at}");
        }
        let mut newer = bytes;
        newer[66] = 2;
        checksum::seal(&mut newer);
        assert!(Header::decode(&newer).unwrap_err().contains("version is 2"));
    }

    #[test]
    fn the_higher_valid_one_is_current() {
        let (old, new) = (header(7), header(8));
        let broken = vec![0xee; HEADER_BYTES];
        for (first, second, slot, current) in [
            (old.encode(), new.encode(), 1, &new),
            (new.encode(), old.encode(), 0, &new),
            (old.encode(), broken.clone(), 0, &old),
            (broken.clone(), old.encode(), 1, &old),
            (old.encode(), old.encode(), 0, &old),
        ] {
            let headers = Headers::read(&file(&first, &second)).unwrap();
            assert_eq!((headers.slot, &headers.current), (slot, current));
        }
        let equal = Headers::read(&file(&header(7).encode(), &header(7).encode())).unwrap_err();
        assert!(equal.to_string().contains("sequence number 7"), "{equal}");
        let none = Headers::read(&file(&broken, &broken)).unwrap_err().to_string();
        assert!(none.contains("0x10000") && none.contains("0x20000"), "{none}");
    }

    #[test]
    fn an_update_leaves_both_in_agreement() {
        let file = file(&header(7).encode(), &header(8).encode());
        let mut headers = Headers::read(&file).unwrap();
        let log_guid = Guid::random().unwrap();
        headers.update(&file, |header| header.log_guid = log_guid).unwrap();
        assert_eq!(headers, Headers::read(&file).unwrap());
        assert_eq!((headers.slot, headers.current.sequence_number), (1, 10));
        let mut bytes = vec![0; HEADER_BYTES];
        file.read_at(&mut bytes, HEADER_OFFSETS[0]).unwrap();
        let other = Header::decode(&bytes).unwrap();
        assert_eq!((other.sequence_number, other.log_guid), (9, log_guid));
        let mut last = Headers { current: header(u64::MAX), slot: 0, other_fault: None };
        assert!(last.update(&file, |_| ()).is_err());
    }

    #[test]
    fn the_creator_is_read() {
        let file = file(&[], &[]);
        assert_eq!(read_creator(&file).unwrap().as_deref(), Some("a tool"));
        file.write_at(&encode_file_identifier(&"x".repeat(400)), 0).unwrap();
        assert_eq!(read_creator(&file).unwrap().unwrap().len(), 255);
        file.write_at(&[0; 600], 8).unwrap();
        assert_eq!(read_creator(&file).unwrap(), None);
        file.write_at(b"vhdxfilf", 0).unwrap();
        assert!(read_creator(&file).is_err());
        assert!(read_creator(&MemoryDevice::new(8)).is_err());
    }
}
