//! Where the tables and grains of a sparse extent are, whatever its header looks like.
//!
//! All three kinds of sparse extents map a disk in two steps: a directory of tables, a table of
//! grains. They differ in the width of an entry and in what it says.
//!
//! | kind | written by | entry | grain | says |
//! |---|---|---|---|---|
//! | hosted (`KDMV`) | Workstation, QEMU, exporters | u32 | 64 KiB | sector; 0 absent, 1 zero |
//! | COWD | ESX up to VMFS 5 | u32 | 512 B | sector; 0 absent |
//! | seSparse | ESXi from VMFS 6 | u64 | 4 KiB | type in the top 4 bits, grain number |

use super::hosted::SECTOR;
use vmtide_block::{BlockError, Result};

/// The largest grain, in sectors: 1 GiB, the limit of QEMU. Real ones have 1 to 2048.
const MAX_GRAIN_SECTORS: u64 = 1 << 21;

/// The largest grain that is compressed, in sectors: 16 MiB. It is decompressed as a whole.
const MAX_COMPRESSED_GRAIN_SECTORS: u64 = 1 << 15;

/// The most entries of a grain table. Hosted extents have 512, the others 4096.
const MAX_TABLE_ENTRIES: u64 = 1 << 16;

/// Whose header it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Hosted,
    Cowd,
    SeSparse,
}

/// Where the tables are and what an entry means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SparseLayout {
    pub(super) kind: Kind,
    pub(super) version: u32,
    pub(super) capacity_sectors: u64,
    pub(super) grain_sectors: u64,
    pub(super) entries_per_table: u64,
    pub(super) directory_sector: u64,
    pub(super) redundant_sector: Option<u64>,
    pub(super) zero_grains: bool,
    pub(super) compressed: bool,
    pub(super) markers: bool,
    /// The last writer did not close the extent.
    pub(super) unclean: bool,
    /// seSparse: where the grain tables and the grains begin.
    pub(super) tables_sector: u64,
    pub(super) grains_sector: u64,
}

/// What an entry of a grain table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grain {
    /// The parent's, or zero.
    Absent,
    Zero,
    /// The grain begins at this byte of the file.
    At(u64),
}

impl SparseLayout {
    pub(super) const fn grain_bytes(&self) -> u64 {
        self.grain_sectors.saturating_mul(SECTOR)
    }

    pub(super) const fn entry_bytes(&self) -> u64 {
        match self.kind {
            Kind::Hosted | Kind::Cowd => 4,
            Kind::SeSparse => 8,
        }
    }

    /// The bytes of disk that one grain table maps.
    pub(super) const fn table_span(&self) -> u64 {
        // At most 2^21 sectors × 2^16 entries: no overflow.
        self.grain_bytes() * self.entries_per_table
    }

    pub(super) const fn size_bytes(&self) -> u64 {
        self.capacity_sectors.saturating_mul(SECTOR)
    }

    pub(super) const fn grains(&self) -> u64 {
        self.capacity_sectors.div_ceil(self.grain_sectors)
    }

    pub(super) const fn tables(&self) -> u64 {
        self.grains().div_ceil(self.entries_per_table)
    }

    /// The entries of table `table` that map something: fewer in the last one.
    pub(super) fn entries_in(&self, table: u64) -> u64 {
        let before = table.saturating_mul(self.entries_per_table);
        self.grains().saturating_sub(before).min(self.entries_per_table)
    }

    /// The bytes of the directory from sector `sector`, where they are inside a file of this size.
    pub(super) fn directory_range(&self, sector: u64, file_bytes: u64) -> Option<(u64, u64)> {
        let at = sector.checked_mul(SECTOR).filter(|at| *at > 0)?;
        let size = self.tables().checked_mul(self.entry_bytes())?;
        at.checked_add(size).filter(|end| *end <= file_bytes).map(|_| (at, size))
    }

    /// Succeeds where all numbers are ones that can be calculated with.
    pub(super) fn validate(&self, name: &str) -> Result<()> {
        let damaged = |what: &str, value: u64, rule: String| {
            Err(BlockError::damaged(name, format!("VMDK sparse header: {what} {value}; {rule}")))
        };
        let most = if self.compressed { MAX_COMPRESSED_GRAIN_SECTORS } else { MAX_GRAIN_SECTORS };
        if self.grain_sectors == 0 || self.grain_sectors > most {
            return damaged(
                "grain size in sectors",
                self.grain_sectors,
                format!("1 to {most} are known"),
            );
        }
        if self.entries_per_table == 0 || self.entries_per_table > MAX_TABLE_ENTRIES {
            return damaged(
                "entries of a grain table",
                self.entries_per_table,
                format!("1 to {MAX_TABLE_ENTRIES} are known"),
            );
        }
        if self.capacity_sectors > super::MAX_SECTORS {
            return damaged(
                "capacity in sectors",
                self.capacity_sectors,
                "larger than any disk".into(),
            );
        }
        Ok(())
    }

    /// Where a grain table is by its directory entry; `None` where there is none.
    pub(super) fn table_offset(&self, entry: u64) -> Result<Option<u64>, String> {
        if entry == 0 {
            return Ok(None);
        }
        let sector = match self.kind {
            Kind::Hosted | Kind::Cowd => Some(entry),
            Kind::SeSparse => {
                if entry >> 32 != 0x1000_0000 {
                    return Err("the upper half must be 0x10000000".into());
                }
                let sectors = self.entries_per_table * self.entry_bytes() / SECTOR;
                (entry & 0xffff_ffff)
                    .checked_mul(sectors)
                    .and_then(|sector| sector.checked_add(self.tables_sector))
            }
        };
        sector
            .and_then(|sector| sector.checked_mul(SECTOR))
            .map(Some)
            .ok_or_else(|| "it lies past the largest file".into())
    }

    /// What a grain table entry says, or what is wrong with it.
    pub(super) fn grain(&self, entry: u64) -> Result<Grain, String> {
        let sector = match self.kind {
            Kind::Hosted | Kind::Cowd => match entry {
                0 => return Ok(Grain::Absent),
                1 if self.zero_grains => return Ok(Grain::Zero),
                sector => Some(sector),
            },
            Kind::SeSparse => match entry >> 60 {
                0 if entry == 0 => return Ok(Grain::Absent),
                1 | 2 => return Ok(Grain::Zero),
                3 => {
                    let number = (entry >> 48 & 0xfff) | (entry & 0xffff_ffff_ffff) << 12;
                    number
                        .checked_mul(self.grain_sectors)
                        .and_then(|sector| sector.checked_add(self.grains_sector))
                }
                other => return Err(format!("type {other} is unknown; 0 to 3 are known")),
            },
        };
        sector
            .and_then(|sector| sector.checked_mul(SECTOR))
            .map(Grain::At)
            .ok_or_else(|| "it lies past the largest file".into())
    }
}
