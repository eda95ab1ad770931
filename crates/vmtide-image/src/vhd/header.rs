//! The dynamic header (specification, "Dynamic Disk Header Format"): where the block table is, how
//! large blocks are, and for a differencing disk who its parent is.

use super::footer::{FOOTER_BYTES, Footer, array, checksum, read_at};
use crate::bytes::{be_u32, be_u64, length, put};
use vmtide_block::{BlockDevice, BlockError, Result};

/// The size of the header.
pub(crate) const HEADER_BYTES: u64 = HEADER_LEN as u64;

/// The same, for arrays.
const HEADER_LEN: usize = 1024;

/// The block size that every tool writes.
pub(crate) const DEFAULT_BLOCK_BYTES: u64 = 2 << 20;

/// The smallest and largest block that is read. Smaller ones make a table larger than the data;
/// QEMU's limit upwards is the same as that of the 32-bit field.
const BLOCK_BYTES: std::ops::RangeInclusive<u64> = 512..=1 << 31;

/// The block table's entry of a block that is not there.
pub(crate) const ABSENT: u32 = u32::MAX;

/// The parent locators that a header has room for.
pub(crate) const LOCATORS: usize = 8;

/// Offsets of the fields.
mod field {
    pub(super) const DATA_OFFSET: usize = 8;
    pub(super) const TABLE_OFFSET: usize = 16;
    pub(super) const VERSION: usize = 24;
    pub(super) const TABLE_ENTRIES: usize = 28;
    pub(super) const BLOCK_BYTES: usize = 32;
    pub(super) const CHECKSUM: usize = 36;
    pub(super) const PARENT_ID: usize = 40;
    pub(super) const PARENT_TIME_STAMP: usize = 56;
    pub(super) const PARENT_NAME: usize = 64;
    pub(super) const LOCATORS: usize = 576;
}

/// The bytes of the parent's name in the header.
const PARENT_NAME_BYTES: usize = field::LOCATORS - field::PARENT_NAME;

/// The bytes of one locator.
const LOCATOR_BYTES: usize = 24;

/// One parent locator: a name of the parent in some system's spelling, and where its text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Locator {
    /// The spelling: `W2ru`, `W2ku`, `MacX`, ...
    pub(crate) code: [u8; 4],
    /// The space for the text; the specification says sectors, Windows writes bytes.
    pub(crate) space: u32,
    /// The bytes of text.
    pub(crate) text_bytes: u32,
    /// Where the text is in the file.
    pub(crate) offset: u64,
}

/// A dynamic header. Fields that we do not know are kept as they are.
#[derive(Clone)]
pub(crate) struct Header {
    bytes: [u8; HEADER_LEN],
    /// Where it is in the file.
    pub(crate) offset: u64,
    pub(crate) table_offset: u64,
    /// The entries that the table has room for.
    pub(crate) table_entries: u32,
    pub(crate) block_bytes: u64,
}

impl Header {
    /// A new header at `offset` without a parent.
    pub(crate) fn new(
        offset: u64,
        table_offset: u64,
        table_entries: u32,
        block_bytes: u64,
    ) -> Self {
        let mut bytes = [0; HEADER_LEN];
        put(&mut bytes, 0, b"cxsparse");
        put(&mut bytes, field::DATA_OFFSET, &u64::MAX.to_be_bytes());
        put(&mut bytes, field::VERSION, &0x0001_0000u32.to_be_bytes());
        Self { bytes, offset, table_offset, table_entries, block_bytes }
    }

    /// Reads the header that `footer` leads to.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] where it is not there or breaks the specification.
    pub(crate) fn read(file: &dyn BlockDevice, footer: &Footer) -> Result<Self> {
        let offset = footer.data_offset();
        let damaged = |detail: String| {
            BlockError::damaged(file.name(), format!("dynamic header at {offset:#x}: {detail}"))
        };
        let bytes: [u8; HEADER_LEN] = read_at(file, offset, HEADER_BYTES)?
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| {
                damaged(format!("is not inside the file of {} bytes", file.size_bytes()))
            })?;
        if !bytes.starts_with(b"cxsparse") {
            let found = bytes.get(..8).unwrap_or_default();
            return Err(damaged(format!("signature {found:02x?} instead of \"cxsparse\"")));
        }
        let (found, right) = (be_u32(&bytes, field::CHECKSUM), checksum(&bytes, field::CHECKSUM));
        if found != right {
            return Err(damaged(format!("checksum {found:#010x} instead of {right:#010x}")));
        }
        let version = be_u32(&bytes, field::VERSION);
        if version >> 16 != 1 {
            return Err(damaged(format!("version {version:#010x}; only 1.x is known")));
        }
        let block_bytes = u64::from(be_u32(&bytes, field::BLOCK_BYTES));
        if !block_bytes.is_power_of_two() || !BLOCK_BYTES.contains(&block_bytes) {
            return Err(damaged(format!(
                "block size of {block_bytes} bytes; it must be a power of two of at least 512"
            )));
        }
        Ok(Self {
            offset,
            table_offset: be_u64(&bytes, field::TABLE_OFFSET),
            table_entries: be_u32(&bytes, field::TABLE_ENTRIES),
            block_bytes,
            bytes,
        })
    }

    /// The bytes, with a right checksum.
    pub(crate) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = self.bytes;
        put(&mut bytes, field::TABLE_OFFSET, &self.table_offset.to_be_bytes());
        put(&mut bytes, field::TABLE_ENTRIES, &self.table_entries.to_be_bytes());
        let block_bytes = u32::try_from(self.block_bytes).unwrap_or(u32::MAX);
        put(&mut bytes, field::BLOCK_BYTES, &block_bytes.to_be_bytes());
        let sum = checksum(&bytes, field::CHECKSUM);
        put(&mut bytes, field::CHECKSUM, &sum.to_be_bytes());
        bytes
    }

    /// The bytes of disk that the table has entries for.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        u64::from(self.table_entries).saturating_mul(self.block_bytes)
    }

    /// Succeeds where the table has entries for a disk of this size and is inside the file;
    /// answers with the entries that the disk needs.
    pub(crate) fn check_table(&self, file: &dyn BlockDevice, size_bytes: u64) -> Result<u64> {
        let needed = size_bytes.div_ceil(self.block_bytes);
        let damaged = |detail: String| {
            Err(BlockError::damaged(
                file.name(),
                format!("dynamic header at {:#x}: {detail}", self.offset),
            ))
        };
        if needed > u64::from(self.table_entries) {
            return damaged(format!(
                "its block table has {} entries, a disk of {size_bytes} bytes needs {needed}",
                self.table_entries
            ));
        }
        let end = needed.checked_mul(4).and_then(|bytes| bytes.checked_add(self.table_offset));
        if end.is_none_or(|end| end > file.size_bytes()) || self.table_offset < FOOTER_BYTES {
            return damaged(format!(
                "its block table of {needed} entries at {:#x} is not inside the file of {} bytes",
                self.table_offset,
                file.size_bytes()
            ));
        }
        Ok(needed)
    }

    /// What the parent must call itself.
    pub(crate) fn parent_id(&self) -> [u8; 16] {
        array(&self.bytes, field::PARENT_ID)
    }

    /// The parent's name in the header itself; empty where there is none.
    pub(crate) fn parent_name(&self) -> String {
        let name = self.bytes.get(field::PARENT_NAME..field::LOCATORS).unwrap_or_default();
        decode_utf16(name, u16::from_be_bytes)
    }

    /// The locators in use, with their number.
    pub(crate) fn locators(&self) -> Vec<(usize, Locator)> {
        let entry = |number: usize| {
            let at = field::LOCATORS + number * LOCATOR_BYTES;
            let code = self.bytes.get(at..at + 4)?.try_into().ok()?;
            let locator = Locator {
                code,
                space: be_u32(&self.bytes, at + 4),
                text_bytes: be_u32(&self.bytes, at + 8),
                offset: be_u64(&self.bytes, at + 16),
            };
            (code != [0; 4] && locator.offset != 0).then_some((number, locator))
        };
        (0..LOCATORS).filter_map(entry).collect()
    }

    /// Enters a parent, without locators.
    pub(crate) fn set_parent(&mut self, id: [u8; 16], name: &str) {
        put(&mut self.bytes, field::PARENT_ID, &id);
        // Zero: the parent's time of change is not compared (Windows writes zero, too).
        put(&mut self.bytes, field::PARENT_TIME_STAMP, &[0; 4]);
        let mut text = [0u8; PARENT_NAME_BYTES];
        // One unit stays zero: it ends the name.
        let units = name.encode_utf16().flat_map(u16::to_be_bytes).take(PARENT_NAME_BYTES - 2);
        for (target, byte) in text.iter_mut().zip(units) {
            *target = byte;
        }
        put(&mut self.bytes, field::PARENT_NAME, &text);
        put(&mut self.bytes, field::LOCATORS, &[0; LOCATORS * LOCATOR_BYTES]);
    }

    /// Enters a locator.
    pub(crate) fn set_locator(&mut self, number: usize, locator: &Locator) {
        let at = field::LOCATORS + number.min(LOCATORS - 1) * LOCATOR_BYTES;
        put(&mut self.bytes, at, &locator.code);
        put(&mut self.bytes, at + 4, &locator.space.to_be_bytes());
        put(&mut self.bytes, at + 8, &locator.text_bytes.to_be_bytes());
        put(&mut self.bytes, at + 12, &[0; 4]);
        put(&mut self.bytes, at + 16, &locator.offset.to_be_bytes());
    }

    /// How blocks are laid out.
    pub(crate) fn blocks(&self) -> BlockShape {
        BlockShape::new(self.block_bytes)
    }
}

/// How a block is laid out in the file: its sector bitmap, then its data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockShape {
    /// The bytes of disk in a block; a power of two.
    pub(crate) block_bytes: u64,
    /// The bytes of the bitmap, whole sectors.
    pub(crate) bitmap_bytes: u64,
}

impl BlockShape {
    pub(crate) const fn new(block_bytes: u64) -> Self {
        let bitmap_bytes = (block_bytes / 512).div_ceil(8).next_multiple_of(512);
        Self { block_bytes, bitmap_bytes }
    }

    /// Where the block of this table entry begins in the file; `None` where it is not there.
    pub(crate) fn start(self, entry: u32) -> Option<u64> {
        (entry != ABSENT).then(|| u64::from(entry) * 512)
    }

    /// The bytes of file that a block takes.
    pub(crate) const fn stored_bytes(self) -> u64 {
        self.bitmap_bytes + self.block_bytes
    }
}

/// The text of UTF-16 units up to the first zero.
pub(crate) fn decode_utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> String {
    let units: Vec<u16> = bytes
        .chunks_exact(2)
        .map(|pair| pair.try_into().map_or(0, unit))
        .take_while(|unit| *unit != 0)
        .collect();
    String::from_utf16_lossy(&units)
}

/// The table entries in `bytes`.
pub(crate) fn decode_entries(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|entry| be_u32(entry, 0)).collect()
}

/// Reads so many entries from entry `first` on; the caller has checked the table.
pub(crate) fn read_entries(
    file: &dyn BlockDevice,
    header: &Header,
    first: u64,
    count: u64,
) -> Result<Vec<u32>> {
    let mut bytes = vec![0u8; length(count * 4)];
    file.read_at(&mut bytes, header.table_offset + first * 4)?;
    Ok(decode_entries(&bytes))
}

#[cfg(test)]
mod tests {
    use super::super::footer::Kind;
    use super::*;
    use vmtide_block::MemoryDevice;

    fn file_with(header: &[u8]) -> (MemoryDevice, Footer) {
        let footer = Footer::new(Kind::Differencing, 4 << 20, [1; 16]);
        let bytes = [&footer.encode()[..], header, &[0xff; 512]].concat();
        (MemoryDevice::from_bytes(bytes), footer)
    }

    #[test]
    fn a_header_survives_encoding() {
        let mut header = Header::new(512, 1536, 2, DEFAULT_BLOCK_BYTES);
        header.set_parent([9; 16], "C:\\disks\\väter.vhd");
        let locator = Locator { code: *b"W2ru", space: 512, text_bytes: 22, offset: 0x3000 };
        header.set_locator(1, &locator);
        let (file, footer) = file_with(&header.encode());
        let again = Header::read(&file, &footer).unwrap();
        assert_eq!(again.parent_name(), "C:\\disks\\väter.vhd");
        assert_eq!((again.parent_id(), again.table_entries), ([9; 16], 2));
        assert_eq!(again.locators(), [(1, locator)]);
        assert_eq!(again.check_table(&file, 4 << 20).unwrap(), 2);
        assert!(again.check_table(&file, (4 << 20) + 1).is_err());
        assert_eq!(again.blocks().bitmap_bytes, 512);
    }

    #[test]
    fn long_names_end_inside_the_field() {
        let mut header = Header::new(512, 1536, 2, DEFAULT_BLOCK_BYTES);
        header.set_parent([9; 16], &"x".repeat(1000));
        assert_eq!(header.parent_name().len(), 255);
        assert!(header.locators().is_empty());
    }

    #[test]
    fn broken_headers_are_named() {
        let good = Header::new(512, 1536, 2, DEFAULT_BLOCK_BYTES);
        let reread = |bytes: &[u8]| {
            let (file, footer) = file_with(bytes);
            Header::read(&file, &footer).err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(reread(&good.encode()), "");
        let mut bytes = good.encode();
        bytes[20] ^= 1;
        assert!(reread(&bytes).contains("checksum"));
        assert!(reread(&[0; 1024]).contains("cxsparse"));
        for block_bytes in [0, 256, 3 << 20, 1000] {
            let header = Header { block_bytes, ..good.clone() };
            assert!(reread(&header.encode()).contains("block size"), "{block_bytes}");
        }
        let (file, mut footer) = file_with(&good.encode());
        for offset in [u64::MAX, u64::MAX - 100, 2048, 1 << 40] {
            footer.set_data_offset(offset);
            assert!(matches!(Header::read(&file, &footer), Err(BlockError::Damaged { .. })));
        }
        for (table_offset, size) in [(u64::MAX, 512), (2044, 4 << 20), (0, 512)] {
            let header = Header { table_offset, ..good.clone() };
            let error = header.check_table(&file, size).unwrap_err().to_string();
            assert!(error.contains("block table"), "{error}");
        }
    }

    #[test]
    fn bitmaps_are_whole_sectors() {
        for (block, bitmap) in [(512, 512), (512 << 10, 512), (2 << 20, 512), (4 << 20, 1024)] {
            assert_eq!(BlockShape::new(block).bitmap_bytes, bitmap);
        }
    }
}
