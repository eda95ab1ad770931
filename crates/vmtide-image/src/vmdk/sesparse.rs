//! The headers of ESXi's snapshots on VMFS 6, "seSparse". VMware does not describe the format; the
//! facts are those that QEMU's block/vmdk.c reads by.
//!
//! ```text
//! constant header, sector 0: 0 magic 0xCAFEBABE · 8 version 0x2_0000_0001 · 16 capacity · 24 grain size 8
//!   32 grain table size 64 · 40 flags · 48 reserved ×4 · then (offset, size) of: 80 volatile header
//!   96 journal header · 112 journal · 128 grain directory · 144 grain tables · 160 free bitmap
//!   176 back map · 192 grains                                (little-endian u64, units are sectors)
//! volatile header: 0 magic 0xCAFECAFE · 8 free table number · 16 next sequence number · 24 replay journal
//! ```

use super::hosted::SECTOR;
use super::layout::{Kind, SparseLayout};
use crate::bytes::le_u64;
use vmtide_block::{BlockDevice, BlockError, Result};

pub(super) const MAGIC: u64 = 0xcafe_babe;
pub(super) const VERSION: u64 = 0x2_0000_0001;
const VOLATILE_MAGIC: u64 = 0xcafe_cafe;

/// Parses the header at the start of `file`, whose first sector is in `bytes`.
pub(super) fn parse(bytes: &[u8], file: &dyn BlockDevice) -> Result<SparseLayout> {
    let name = file.name();
    let expect = |at: usize, what: &str, value: u64| match le_u64(bytes, at) {
        found if found == value => Ok(()),
        found => Err(BlockError::unsupported(
            &name,
            format!("seSparse header at {at:#x}: {what} {found:#x}; only {value:#x} is known"),
        )),
    };
    expect(8, "version", VERSION)?;
    expect(24, "grain size", 8)?;
    expect(32, "grain table size", 64)?;
    expect(40, "flags", 0)?;
    let layout = SparseLayout {
        kind: Kind::SeSparse,
        version: 2,
        capacity_sectors: le_u64(bytes, 16),
        grain_sectors: 8,
        entries_per_table: 64 * SECTOR / 8,
        directory_sector: le_u64(bytes, 128),
        redundant_sector: None,
        zero_grains: true,
        compressed: false,
        markers: false,
        unclean: false,
        tables_sector: le_u64(bytes, 144),
        grains_sector: le_u64(bytes, 192),
    };
    layout.validate(&name)?;
    let directory = le_u64(bytes, 136).saturating_mul(SECTOR / 8);
    if directory < layout.tables() {
        return Err(BlockError::damaged(
            &name,
            format!(
                "seSparse header at 0x88: the grain directory has room for {directory} entries, a \
                 disk of {} sectors needs {}",
                layout.capacity_sectors,
                layout.tables()
            ),
        ));
    }
    check_volatile(&name, file, le_u64(bytes, 80))?;
    Ok(layout)
}

/// Succeeds where the journal needs no replay: nobody has described how that is done.
fn check_volatile(name: &str, file: &dyn BlockDevice, sector: u64) -> Result<()> {
    let at = sector
        .checked_mul(SECTOR)
        .filter(|at| at.checked_add(SECTOR).is_some_and(|end| end <= file.size_bytes()));
    let Some(at) = at else {
        return Err(BlockError::damaged(
            name,
            format!(
                "seSparse header at 0x50: the volatile header at sector {sector} is outside the \
                 file of {} bytes",
                file.size_bytes()
            ),
        ));
    };
    let mut bytes = [0; 32];
    file.read_at(&mut bytes, at)?;
    let magic = le_u64(&bytes, 0);
    if magic != VOLATILE_MAGIC {
        return Err(BlockError::damaged(
            name,
            format!(
                "seSparse volatile header at {at:#x}: begins with {magic:#x}, not {VOLATILE_MAGIC:#x}"
            ),
        ));
    }
    match le_u64(&bytes, 24) {
        0 => Ok(()),
        replay => Err(BlockError::unsupported(
            name,
            format!(
                "seSparse volatile header at {at:#x}: the journal must be replayed ({replay:#x}), \
                 which only ESXi can; open and close the disk there, or delete the snapshot"
            ),
        )),
    }
}
