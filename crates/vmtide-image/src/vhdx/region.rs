//! The region tables (MS-VHDX 2.2.3): where the BAT and the metadata are.
//!
//! There are two copies; both should say the same and the first valid one is used. They are changed
//! through the log, so they are read after it has been replayed.

use super::checksum;
use super::guid::Guid;
use super::header::MIB;
use crate::bytes::{le_u32, le_u64, put};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result};

/// Where the two copies are.
pub(crate) const REGION_TABLE_OFFSETS: [u64; 2] = [192 << 10, 256 << 10];
/// The bytes of a copy, all under its checksum.
pub(crate) const REGION_TABLE_BYTES: usize = 64 << 10;
/// The most entries that fit.
pub(crate) const MAX_REGIONS: u32 = 2047;
/// The block allocation table.
pub(crate) const BAT_REGION: Guid =
    Guid::new(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
/// The metadata table and its items.
pub(crate) const METADATA_REGION: Guid =
    Guid::new(0x8b7c_a206, 0x4790, 0x4b9a, [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e]);

/// One region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// What it is.
    pub(crate) id: Guid,
    /// Where it is.
    pub(crate) range: ByteRange,
    /// Whether who does not know it must not open the file.
    pub(crate) is_required: bool,
}

/// A region table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RegionTable {
    /// The regions, in the order of the file.
    pub(crate) regions: Vec<Region>,
}

impl RegionTable {
    /// Decodes a table; `Err` says what is wrong with it, to follow "region table N at OFFSET: ".
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() < REGION_TABLE_BYTES {
            return Err(format!("only {} of {REGION_TABLE_BYTES} bytes", bytes.len()));
        }
        let bytes = &bytes[..REGION_TABLE_BYTES];
        if !bytes.starts_with(b"regi") {
            let found = String::from_utf8_lossy(&bytes[..4]);
            return Err(format!("the signature is {found:?}, must be \"regi\""));
        }
        if !checksum::is_sealed(bytes) {
            return Err(format!(
                "the checksum is {:#010x}, its bytes give {:#010x}",
                checksum::stored(bytes),
                checksum::checksum(bytes)
            ));
        }
        let count = le_u32(bytes, 8);
        if count > MAX_REGIONS {
            return Err(format!("{count} entries, at most {MAX_REGIONS} are allowed"));
        }
        let entries = bytes[16..].chunks_exact(32).take(count as usize);
        let regions = entries.map(|entry| Region {
            id: Guid::at(entry, 0),
            range: ByteRange::new(le_u64(entry, 16), u64::from(le_u32(entry, 24))),
            is_required: le_u32(entry, 28) & 1 != 0,
        });
        Ok(Self { regions: regions.collect() })
    }

    /// The table's 64 KiB with their checksum. Lengths over a `u32` saturate; regions past the
    /// most allowed are left out.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; REGION_TABLE_BYTES];
        put(&mut bytes, 0, b"regi");
        let mut count = 0u32;
        for region in self.regions.iter().take(MAX_REGIONS as usize) {
            let at = 16 + count as usize * 32;
            let region_bytes = u32::try_from(region.range.length).unwrap_or(u32::MAX);
            put(&mut bytes, at, &region.id.to_bytes());
            put(&mut bytes, at + 16, &region.range.offset.to_le_bytes());
            put(&mut bytes, at + 24, &region_bytes.to_le_bytes());
            put(&mut bytes, at + 28, &u32::from(region.is_required).to_le_bytes());
            count += 1;
        }
        put(&mut bytes, 8, &count.to_le_bytes());
        checksum::seal(&mut bytes);
        bytes
    }

    /// The region with this id.
    pub(crate) fn find(&self, id: Guid) -> Option<ByteRange> {
        self.regions.iter().find(|region| region.id == id).map(|region| region.range)
    }
}

/// The regions of a file, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Regions {
    /// The block allocation table.
    pub(crate) bat: ByteRange,
    /// The metadata.
    pub(crate) metadata: ByteRange,
    /// The whole table.
    pub(crate) table: RegionTable,
    /// The copy it was read from, an index in [`REGION_TABLE_OFFSETS`].
    pub(crate) copy: usize,
    /// What is wrong with the first copy, where the second was used.
    pub(crate) first_fault: Option<String>,
}

impl Regions {
    /// Reads the first valid copy. The log must have been replayed; `log` is where it is.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] where no copy is valid, a region is missing, misplaced, or overlaps
    /// another one; [`BlockError::Unsupported`] where an unknown region is required.
    pub(crate) fn read(file: &dyn BlockDevice, log: ByteRange) -> Result<Self> {
        let mut faults = Vec::new();
        for (copy, offset) in REGION_TABLE_OFFSETS.into_iter().enumerate() {
            let mut bytes = vec![0; REGION_TABLE_BYTES];
            file.read_at(&mut bytes, offset)?;
            match RegionTable::decode(&bytes) {
                Ok(table) => return Self::check(file, log, table, copy, faults.pop()),
                Err(fault) => faults.push(fault),
            }
        }
        Err(BlockError::damaged(
            file.name(),
            format!(
                "region table 1 at {:#x}: {}; region table 2 at {:#x}: {}; one must be valid",
                REGION_TABLE_OFFSETS[0],
                faults.first().map_or("", String::as_str),
                REGION_TABLE_OFFSETS[1],
                faults.last().map_or("", String::as_str),
            ),
        ))
    }

    fn check(
        file: &dyn BlockDevice,
        log: ByteRange,
        table: RegionTable,
        copy: usize,
        first_fault: Option<String>,
    ) -> Result<Self> {
        let name = file.name();
        let at = REGION_TABLE_OFFSETS[copy];
        let damaged = |detail: String| {
            BlockError::damaged(&name, format!("region table {} at {at:#x}: {detail}", copy + 1))
        };
        let mut placed = vec![("the header section".to_owned(), ByteRange::new(0, MIB))];
        if !log.is_empty() {
            placed.push(("the log".to_owned(), log));
        }
        for (index, region) in table.regions.iter().enumerate() {
            let (id, range) = (region.id, region.range);
            if region.is_required && id != BAT_REGION && id != METADATA_REGION {
                return Err(BlockError::unsupported(
                    &name,
                    format!(
                        "region table {} at {at:#x}: the region {id} is required and unknown; a \
                         newer program wrote this image",
                        copy + 1
                    ),
                ));
            }
            if range.checked_end().is_none()
                || range.is_empty()
                || !range.offset.is_multiple_of(MIB)
            {
                return Err(damaged(format!(
                    "the region {id} of {} bytes at {:#x} must not be empty and must begin at a \
                     multiple of 1 MiB",
                    range.length, range.offset
                )));
            }
            if table.regions[..index].iter().any(|other| other.id == id) {
                return Err(damaged(format!("the region {id} is listed twice")));
            }
            placed.push((format!("the region {id}"), range));
        }
        placed.sort_by_key(|(_, range)| range.offset);
        for pair in placed.windows(2) {
            if let [(what, range), (next_what, next)] = pair
                && range.end() > next.offset
            {
                return Err(damaged(format!(
                    "{what} of {} bytes at {:#x} overlaps {next_what} at {:#x}",
                    range.length, range.offset, next.offset
                )));
            }
        }
        let need = |id: Guid, what: &str| {
            table.find(id).ok_or_else(|| damaged(format!("has no {what} region ({id})")))
        };
        let (bat, metadata) = (need(BAT_REGION, "BAT")?, need(METADATA_REGION, "metadata")?);
        Ok(Self { bat, metadata, table, copy, first_fault })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::{MemoryDevice, WritableBlockDevice};

    const LOG: ByteRange = ByteRange::new(MIB, MIB);

    fn region(id: Guid, offset: u64, is_required: bool) -> Region {
        Region { id, range: ByteRange::new(offset, MIB), is_required }
    }

    fn table() -> RegionTable {
        RegionTable {
            regions: vec![
                region(METADATA_REGION, 2 * MIB, true),
                region(BAT_REGION, 3 * MIB, true),
            ],
        }
    }

    fn read(first: &[u8], second: &[u8]) -> Result<Regions> {
        let file = MemoryDevice::new(1 << 20);
        file.write_at(first, REGION_TABLE_OFFSETS[0]).unwrap();
        file.write_at(second, REGION_TABLE_OFFSETS[1]).unwrap();
        Regions::read(&file, LOG)
    }

    #[test]
    fn tables_come_back_and_either_copy_does() {
        let bytes = table().encode();
        assert_eq!(RegionTable::decode(&bytes), Ok(table()));
        let both = read(&bytes, &bytes).unwrap();
        assert_eq!((both.bat.offset, both.metadata.offset), (3 * MIB, 2 * MIB));
        assert_eq!((both.copy, both.first_fault), (0, None));
        let second = read(&[0; 10], &bytes).unwrap();
        assert_eq!(second.copy, 1);
        assert!(second.first_fault.unwrap().contains("signature"));
        let none = read(&[0; 10], &[0; 10]).unwrap_err().to_string();
        assert!(none.contains("0x30000") && none.contains("0x40000"), "{none}");
        let mut broken = bytes;
        broken[65535] ^= 1;
        assert!(RegionTable::decode(&broken).unwrap_err().contains("checksum"));
        broken[8..12].copy_from_slice(&2048u32.to_le_bytes());
        checksum::seal(&mut broken);
        assert!(RegionTable::decode(&broken).unwrap_err().contains("2048 entries"));
    }

    #[test]
    fn regions_that_cannot_be_are_refused() {
        let unknown = Guid::new(1, 2, 3, [4; 8]);
        let with = |change: &dyn Fn(&mut Vec<Region>)| {
            let mut table = table();
            change(&mut table.regions);
            let bytes = table.encode();
            read(&bytes, &bytes)
        };
        assert!(with(&|regions| regions.push(region(unknown, 9 * MIB, false))).is_ok());
        for (change, text) in [
            (
                &(|regions: &mut Vec<Region>| regions.push(region(unknown, 9 * MIB, true)))
                    as &dyn Fn(&mut Vec<Region>),
                "is required and unknown",
            ),
            (&|regions| regions.push(region(BAT_REGION, 9 * MIB, true)), "listed twice"),
            (&|regions| regions.push(region(unknown, 3 * MIB, false)), "overlaps"),
            (&|regions| regions[0].range.offset = 0, "overlaps"),
            (
                &|regions| regions[0].range.offset = MIB,
                "the log of 1048576 bytes at 0x100000 overlaps",
            ),
            (&|regions| regions[0].range.offset += 512, "multiple of 1 MiB"),
            (&|regions| regions[0].range.length = 0, "must not be empty"),
            (&|regions| regions[0].range.offset = u64::MAX, "multiple of 1 MiB"),
            (&|regions| regions.truncate(1), "no BAT region"),
            (&|regions| regions.retain(|region| region.id == BAT_REGION), "no metadata region"),
        ] {
            let error = with(change).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
            assert!(error.contains("region table 1 at 0x30000"), "{error}");
        }
    }
}
