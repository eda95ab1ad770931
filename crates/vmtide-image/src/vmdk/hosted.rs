//! The header of a hosted sparse extent (Virtual Disk Format 5.0, "Hosted Sparse Extents" and
//! "Stream-Optimized Compressed Sparse Extents").
//!
//! ```text
//! byte 0 "KDMV" · 4 version · 8 flags · 12 capacity · 20 grain size · 28 descriptor offset · 36 its size
//! 44 entries of a grain table · 48 redundant grain directory · 56 grain directory · 64 overhead
//! 72 unclean shutdown · 73 "\n \r\n" · 77 compression            (little-endian, units are sectors)
//! ```

use super::layout::{Kind, SparseLayout};
use crate::bytes::{le_u16, le_u32, le_u64, put};
use vmtide_block::{BlockDevice, BlockError, Result};

pub(super) const MAGIC: &[u8; 4] = b"KDMV";

/// The size of the header, and of every sector that has a meaning of its own.
pub(super) const SECTOR: u64 = 512;

/// Where the grain directory stands that says "in the footer".
pub(super) const IN_FOOTER: u64 = u64::MAX;

/// What is at byte 73: a copy in text mode changes it.
const NEWLINES: &[u8; 4] = b"\n \r\n";

/// The flags of the header.
pub(super) mod flag {
    /// The newlines at byte 73 are there.
    pub(in super::super) const NEWLINES: u32 = 1;
    /// There is a second set of tables.
    pub(in super::super) const REDUNDANT: u32 = 2;
    /// A table entry of 1 is a grain of zeros.
    pub(in super::super) const ZERO_GRAINS: u32 = 4;
    /// Grains are compressed.
    pub(in super::super) const COMPRESSED: u32 = 0x1_0000;
    /// Grains and tables have markers in front.
    pub(in super::super) const MARKERS: u32 = 0x2_0000;
}

/// What follows a marker without data.
pub(super) mod marker {
    pub(in super::super) const END_OF_STREAM: u32 = 0;
    pub(in super::super) const GRAIN_TABLE: u32 = 1;
    pub(in super::super) const GRAIN_DIRECTORY: u32 = 2;
    pub(in super::super) const FOOTER: u32 = 3;
}

/// The bytes of a grain's marker in front of its data: the sector of the disk and the length.
pub(super) const GRAIN_MARKER_BYTES: usize = 12;

/// Where the unclean shutdown byte is.
pub(super) const UNCLEAN_AT: u64 = 72;

/// A hosted sparse header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HostedHeader {
    pub(super) version: u32,
    pub(super) flags: u32,
    pub(super) capacity: u64,
    pub(super) grain_sectors: u64,
    pub(super) descriptor_offset: u64,
    pub(super) descriptor_sectors: u64,
    pub(super) entries_per_table: u32,
    pub(super) redundant_offset: u64,
    pub(super) directory_offset: u64,
    pub(super) overhead: u64,
    pub(super) unclean: bool,
    pub(super) compression: u16,
    /// What stands in the place of the newlines, where it is not them.
    pub(super) newlines: Option<[u8; 4]>,
}

/// Whether these bytes are what a copy in text mode makes of the newlines: a line end changed to another one, which
/// moves all that follows or changes bytes of the disk as well. Anything else was never newlines, and harms nobody.
fn went_through_text_mode(bytes: [u8; 4]) -> bool {
    matches!(bytes, [b'\n' | b'\r', b' ', ..] | [b'\r', b'\n', b' ', _])
}

impl HostedHeader {
    /// Parses the header that stands at byte `at` of the file `name`.
    pub(super) fn parse(bytes: &[u8], name: &str, at: u64) -> Result<Self> {
        let damaged = |detail: String| {
            Err(BlockError::damaged(name, format!("VMDK sparse header at {at:#x}: {detail}")))
        };
        if !bytes.starts_with(MAGIC) {
            return damaged(format!(
                "begins with {:02x?}, not \"KDMV\"",
                &bytes[..4.min(bytes.len())]
            ));
        }
        let header = Self {
            version: le_u32(bytes, 4),
            flags: le_u32(bytes, 8),
            capacity: le_u64(bytes, 12),
            grain_sectors: le_u64(bytes, 20),
            descriptor_offset: le_u64(bytes, 28),
            descriptor_sectors: le_u64(bytes, 36),
            entries_per_table: le_u32(bytes, 44),
            redundant_offset: le_u64(bytes, 48),
            directory_offset: le_u64(bytes, 56),
            overhead: le_u64(bytes, 64),
            unclean: bytes.get(72).is_some_and(|byte| *byte != 0),
            compression: le_u16(bytes, 77),
            newlines: bytes
                .get(73..77)
                .and_then(|bytes| <[u8; 4]>::try_from(bytes).ok())
                .filter(|bytes| bytes != NEWLINES),
        };
        match header.version {
            1..=3 => {}
            0 => return damaged("version 0; 1, 2 and 3 exist".into()),
            other => {
                return Err(BlockError::unsupported(
                    name,
                    format!("VMDK sparse header at {at:#x}: version {other}; 1, 2 and 3 are known"),
                ));
            }
        }
        if header.has(flag::NEWLINES) && header.newlines.is_some_and(went_through_text_mode) {
            return damaged(format!(
                "the newlines at byte 73 are {:02x?}: the file was copied in text mode, copy it again",
                bytes.get(73..77).unwrap_or_default()
            ));
        }
        Ok(header)
    }

    pub(super) fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Where the tables are, by this header.
    pub(super) fn layout(&self) -> SparseLayout {
        SparseLayout {
            kind: Kind::Hosted,
            version: self.version,
            capacity_sectors: self.capacity,
            grain_sectors: self.grain_sectors,
            entries_per_table: u64::from(self.entries_per_table),
            directory_sector: self.directory_offset,
            // Without the flag the field means nothing.
            redundant_sector: Some(self.redundant_offset)
                .filter(|sector| *sector != 0 && self.has(flag::REDUNDANT)),
            zero_grains: self.has(flag::ZERO_GRAINS),
            compressed: self.has(flag::COMPRESSED),
            markers: self.has(flag::MARKERS),
            unclean: self.unclean,
            tables_sector: 0,
            grains_sector: 0,
        }
    }

    /// The header's sector.
    pub(super) fn encode(&self) -> [u8; 512] {
        let mut bytes = [0; 512];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 4, &self.version.to_le_bytes());
        put(&mut bytes, 8, &self.flags.to_le_bytes());
        put(&mut bytes, 12, &self.capacity.to_le_bytes());
        put(&mut bytes, 20, &self.grain_sectors.to_le_bytes());
        put(&mut bytes, 28, &self.descriptor_offset.to_le_bytes());
        put(&mut bytes, 36, &self.descriptor_sectors.to_le_bytes());
        put(&mut bytes, 44, &self.entries_per_table.to_le_bytes());
        put(&mut bytes, 48, &self.redundant_offset.to_le_bytes());
        put(&mut bytes, 56, &self.directory_offset.to_le_bytes());
        put(&mut bytes, 64, &self.overhead.to_le_bytes());
        put(&mut bytes, 72, &[u8::from(self.unclean)]);
        put(&mut bytes, 73, NEWLINES);
        put(&mut bytes, 77, &self.compression.to_le_bytes());
        bytes
    }

    /// The bytes of the embedded descriptor, where there is one.
    pub(super) fn descriptor_range(&self, file: &dyn BlockDevice) -> Result<Option<(u64, u64)>> {
        if self.descriptor_offset == 0 || self.descriptor_sectors == 0 {
            return Ok(None);
        }
        let most = super::descriptor::MAX_DESCRIPTOR_BYTES;
        let range = self
            .descriptor_offset
            .checked_mul(SECTOR)
            .zip(self.descriptor_sectors.checked_mul(SECTOR))
            .filter(|(at, size)| {
                *size <= most && at.checked_add(*size).is_some_and(|end| end <= file.size_bytes())
            });
        match range {
            Some(range) => Ok(Some(range)),
            None => Err(BlockError::damaged(
                file.name(),
                format!(
                    "VMDK sparse header at 0x0: its descriptor of {} sectors at sector {} is not \
                     inside the file of {} bytes, or larger than {most} bytes",
                    self.descriptor_sectors,
                    self.descriptor_offset,
                    file.size_bytes()
                ),
            )),
        }
    }
}
