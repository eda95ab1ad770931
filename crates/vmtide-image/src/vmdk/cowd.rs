//! The header of ESX's copy-on-write disks up to VMFS 5, "vmfsSparse" (Virtual Disk Format 5.0,
//! "ESX Server Sparse Extents").
//!
//! ```text
//! 0 "COWD" · 4 version 1 · 8 flags 3 · 12 sectors · 16 grain size · 20 grain directory
//! 24 entries of the grain directory · 28 first free sector     (little-endian u32, units are sectors)
//! ```

use super::layout::{Kind, SparseLayout};
use crate::bytes::le_u32;
use vmtide_block::{BlockError, Result};

pub(super) const MAGIC: &[u8; 4] = b"COWD";

/// The entries of a grain table: fixed by the format.
const ENTRIES_PER_TABLE: u64 = 4096;

/// Parses the header at the start of the file `name`.
pub(super) fn parse(bytes: &[u8], name: &str) -> Result<SparseLayout> {
    let version = le_u32(bytes, 4);
    if version != 1 {
        return Err(BlockError::unsupported(
            name,
            format!("COWD header at 0x4: version {version}; only 1 is known"),
        ));
    }
    let layout = SparseLayout {
        kind: Kind::Cowd,
        version,
        capacity_sectors: u64::from(le_u32(bytes, 12)),
        grain_sectors: u64::from(le_u32(bytes, 16)),
        entries_per_table: ENTRIES_PER_TABLE,
        directory_sector: u64::from(le_u32(bytes, 20)),
        redundant_sector: None,
        zero_grains: false,
        compressed: false,
        markers: false,
        unclean: false,
        tables_sector: 0,
        grains_sector: 0,
    };
    layout.validate(name)?;
    let entries = u64::from(le_u32(bytes, 24));
    if entries < layout.tables() {
        return Err(BlockError::damaged(
            name,
            format!(
                "COWD header at 0x18: the grain directory has {entries} entries, a disk of {} \
                 sectors needs {}",
                layout.capacity_sectors,
                layout.tables()
            ),
        ));
    }
    Ok(layout)
}
