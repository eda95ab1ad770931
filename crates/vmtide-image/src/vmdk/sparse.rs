//! A sparse extent that is open for reading: its directory and tables, a page at a time.

use super::hosted::SECTOR;
use super::layout::{Grain, SparseLayout};
use super::map::{Map, Mapping, Run, run_in_table};
use super::scan::Scanned;
use crate::bytes::{le_u32, le_u64, length};
use crate::table_cache::TableCache;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, Result};

/// The most memory that the grain tables of one image take, all its extents together. At 64 KiB
/// grains this maps 384 GiB at a time; a table that is needed again is read again.
pub(super) const TABLE_CACHE_BYTES: u64 = 24 << 20;

/// The most memory that the directories take. A page maps 32 GiB at 64 KiB grains.
const DIRECTORY_CACHE_BYTES: u64 = 4 << 20;

/// The bytes of directory that are read together.
const DIRECTORY_PAGE_BYTES: u64 = 4096;

/// A sparse extent's tables.
pub(super) struct SparseMap {
    name: String,
    file: Arc<dyn BlockDevice>,
    pub(super) layout: SparseLayout,
    directory_at: u64,
    directory: TableCache<Box<[u8]>>,
    tables: TableCache<Box<[u8]>>,
}

impl SparseMap {
    /// The map of an extent whose layout is valid. Its tables may take a `share`th of the memory.
    pub(super) fn open(
        file: Arc<dyn BlockDevice>,
        layout: SparseLayout,
        share: u64,
    ) -> Result<Self> {
        let (directory_at, directory_bytes) = usable_directory(&*file, &layout)?;
        let budget = |bytes: u64, unit: u64| length((bytes / share.max(1) / unit).max(4));
        let table_bytes = layout.entries_per_table * layout.entry_bytes();
        let pages = directory_bytes.div_ceil(DIRECTORY_PAGE_BYTES);
        Ok(Self {
            name: file.name(),
            file,
            directory_at,
            directory: TableCache::new(pages, budget(DIRECTORY_CACHE_BYTES, DIRECTORY_PAGE_BYTES)),
            tables: TableCache::new(layout.tables(), budget(TABLE_CACHE_BYTES, table_bytes)),
            layout,
        })
    }

    /// The directory entry of a table, read through the cache.
    fn directory_entry(&self, table: u64) -> Result<u64> {
        let at = table * self.layout.entry_bytes();
        let page = self.directory.get_or_read(at / DIRECTORY_PAGE_BYTES, || {
            let start = at - at % DIRECTORY_PAGE_BYTES;
            let size = self.layout.tables() * self.layout.entry_bytes();
            let mut bytes = vec![0; length((size - start).min(DIRECTORY_PAGE_BYTES))];
            self.file.read_at(&mut bytes, self.directory_at + start)?;
            Ok::<_, BlockError>(bytes.into_boxed_slice())
        })?;
        Ok(entry(&page.entries, at % DIRECTORY_PAGE_BYTES, self.layout.entry_bytes()))
    }

    fn read_table(&self, table: u64, directory_entry: u64) -> Result<Box<[u8]>> {
        let at = locate_table(&*self.file, &self.layout, table, directory_entry)?;
        let mut bytes = vec![0; length(self.layout.entries_in(table) * self.layout.entry_bytes())];
        self.file.read_at(&mut bytes, at)?;
        Ok(bytes.into_boxed_slice())
    }
}

/// The directory to use: the first one, or the redundant one where that is not inside the file.
fn usable_directory(file: &dyn BlockDevice, layout: &SparseLayout) -> Result<(u64, u64)> {
    let size = file.size_bytes();
    layout
        .directory_range(layout.directory_sector, size)
        .or_else(|| layout.directory_range(layout.redundant_sector?, size))
        .ok_or_else(|| {
            BlockError::damaged(
                file.name(),
                format!(
                    "VMDK grain directory at sector {}: its {} entries are not inside the file of \
                     {size} bytes",
                    layout.directory_sector,
                    layout.tables()
                ),
            )
        })
}

/// Where grain table `table` is. Where its directory entry leads out of the file, the redundant
/// directory is asked.
pub(super) fn locate_table(
    file: &dyn BlockDevice,
    layout: &SparseLayout,
    table: u64,
    directory_entry: u64,
) -> Result<u64> {
    let first = table_in_file(file, layout, table, directory_entry);
    if let Err(detail) = first {
        let spare = layout
            .redundant_sector
            .filter(|sector| *sector != layout.directory_sector)
            .and_then(|sector| layout.directory_range(sector, file.size_bytes()));
        if let Some((at, _)) = spare {
            let mut bytes = [0; 4];
            file.read_at(&mut bytes, at + table * 4)?;
            if let Ok(at) = table_in_file(file, layout, table, u64::from(le_u32(&bytes, 0))) {
                return Ok(at);
            }
        }
        return Err(BlockError::damaged(
            file.name(),
            format!("VMDK grain directory entry {table}: {directory_entry:#x}: {detail}"),
        ));
    }
    first.map_err(|detail| BlockError::damaged(file.name(), detail))
}

/// Where a grain table is by its directory entry, held against the size of the file.
pub(super) fn table_in_file(
    file: &dyn BlockDevice,
    layout: &SparseLayout,
    table: u64,
    entry: u64,
) -> Result<u64, String> {
    let at = layout.table_offset(entry)?.ok_or("there is no table")?;
    let bytes = layout.entries_in(table) * layout.entry_bytes();
    match at.checked_add(bytes) {
        Some(end) if end <= file.size_bytes() => Ok(at),
        _ => Err(format!(
            "the table at {at:#x} is not inside the file of {} bytes",
            file.size_bytes()
        )),
    }
}

/// The entry at byte `at` of a table; zero where the table ends before.
pub(super) fn entry(bytes: &[u8], at: u64, entry_bytes: u64) -> u64 {
    let at = length(at);
    if entry_bytes == 8 { le_u64(bytes, at) } else { u64::from(le_u32(bytes, at)) }
}

/// What entry `index` of grain table `table` says, held against the size of the file.
pub(super) fn checked_grain(
    layout: &SparseLayout,
    name: &str,
    file_bytes: u64,
    (table, index): (u64, u64),
    value: u64,
) -> Result<Grain> {
    let damaged = |detail: String| {
        BlockError::damaged(
            name,
            format!(
                "VMDK grain table {table}, entry {index} (byte {} of the extent): {value:#x}: {detail}",
                (table * layout.entries_per_table + index) * layout.grain_bytes()
            ),
        )
    };
    match layout.grain(value).map_err(damaged)? {
        Grain::At(at) if at >= file_bytes => Err(damaged(format!(
            "the grain at {at:#x} is past the end of the file of {file_bytes} bytes"
        ))),
        grain => Ok(grain),
    }
}

impl Map for SparseMap {
    fn run(&self, offset: u64, limit: u64) -> Result<Run> {
        let span = self.layout.table_span();
        let table = offset / span;
        let rest = limit.min(span - offset % span);
        // An extent's line may promise more than its capacity; nothing is stored there.
        let directory_entry = match table < self.layout.tables() {
            true => self.directory_entry(table)?,
            false => 0,
        };
        if directory_entry == 0 {
            return Ok(Run { mapping: Mapping::Absent, length: rest });
        }
        let page = self.tables.get_or_read(table, || self.read_table(table, directory_entry))?;
        let file_bytes = self.file.size_bytes();
        let width = self.layout.entry_bytes();
        let grain = |index: u64| {
            let value = entry(&page.entries, index * width, width);
            checked_grain(&self.layout, &self.name, file_bytes, (table, index), value)
        };
        run_in_table(&self.layout, grain, offset, rest)
    }

    fn unit_bytes(&self) -> u64 {
        self.layout.grain_bytes()
    }
}

/// A compressed extent whose tables were lost: the grains that its markers gave.
pub(super) struct ScannedMap {
    pub(super) layout: SparseLayout,
    pub(super) grains: Scanned,
}

impl Map for ScannedMap {
    fn run(&self, offset: u64, limit: u64) -> Result<Run> {
        let grain_bytes = self.layout.grain_bytes();
        let (grain, inside) = (offset / grain_bytes, offset % grain_bytes);
        match self.grains.find(grain) {
            Ok(sector) => Ok(Run {
                mapping: Mapping::Compressed { at: sector * SECTOR, span: None },
                length: (grain_bytes - inside).min(limit),
            }),
            Err(next) => {
                let end = next.map_or(u64::MAX, |next| next.saturating_mul(grain_bytes));
                Ok(Run { mapping: Mapping::Absent, length: limit.min(end - offset) })
            }
        }
    }

    fn unit_bytes(&self) -> u64 {
        self.layout.grain_bytes()
    }
}
