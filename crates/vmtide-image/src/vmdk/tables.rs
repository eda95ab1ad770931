//! The grain tables of an extent that is open for writing.
//!
//! A grain that is written for the first time is appended to the file; its table entry is changed
//! in memory and reaches the file at the next flush, in this order:
//!
//! 1. copy the entries of all changed tables (each names a grain whose bytes were written before),
//! 2. flush: the grains are on the medium,
//! 3. write the copies, in the tables and in the redundant tables,
//! 4. flush.
//!
//! Where one of these steps fails, nothing more is written until the image is opened anew: the
//! system says once that data did not reach the medium, so a second flush that succeeds proves
//! nothing, and entries could be published that lead to grains which were lost.
//!
//! A crash at any point leaves entries that name nothing or a whole grain, each old or new, and at
//! worst grains that no entry names. The two sets of tables may differ then; either is right.
//!
//! Tables are loaded when they are needed and dropped after a flush where there are too many, so
//! memory does not grow with the disk. `gate` is held for looking at a table, never during I/O of
//! grains: shared by everybody, alone only by who drops tables.

use super::layout::SparseLayout;
use super::sparse::locate_table;
use crate::bytes::{le_u32, length};
use arc_swap::ArcSwapOption;
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use vmtide_block::{BlockDevice, BlockError, Result, WritableBlockDevice};

/// The memory that loaded tables may take before they are written and dropped: half a terabyte of
/// disk at 64 KiB grains.
const LOADED_BYTES: u64 = 32 << 20;

/// The tables of an extent that may be in memory however many extents there are: with fewer, writing
/// would flush all the time.
const MIN_LOADED_TABLES: u64 = 8;

/// The most tables of a disk that is written, over all extents: the directories are kept in memory,
/// 16 bytes each. At 64 KiB grains this is 64 times what sectors of 32 bits can reach.
pub(super) const MAX_TABLES: u64 = 1 << 22;

/// The most bytes of tables that are written at once.
const WRITE_BYTES: usize = 1 << 20;

/// A table in memory.
pub(super) struct Table {
    entries: Box<[AtomicU32]>,
    /// Changed since it was last copied for writing.
    dirty: AtomicBool,
}

impl Table {
    /// The entry; zero past the end.
    pub(super) fn entry(&self, index: u64) -> u32 {
        self.entries.get(length(index)).map_or(0, |entry| entry.load(Ordering::Acquire))
    }
}

/// Where the tables are: sectors by the number of the table.
struct Directory {
    first: Vec<u32>,
    /// Empty where there is no second set.
    redundant: Vec<u32>,
}

/// All grain tables of one extent.
pub(super) struct GrainTables {
    file: Arc<dyn WritableBlockDevice>,
    layout: SparseLayout,
    directory: RwLock<Directory>,
    slots: Box<[ArcSwapOption<Table>]>,
    gate: RwLock<()>,
    loaded: AtomicUsize,
    dirty: Mutex<Vec<u64>>,
    flushing: Mutex<()>,
    /// Bringing something to the medium failed: what is there is not known.
    poisoned: AtomicBool,
    /// The tables that may be in memory.
    most_loaded: usize,
}

/// A copy of a table for writing.
struct Copied {
    number: u64,
    bytes: Vec<u8>,
}

impl GrainTables {
    /// Opens the tables of one of `share` extents, which share the memory for them.
    pub(super) fn open(
        file: Arc<dyn WritableBlockDevice>,
        layout: SparseLayout,
        share: u64,
    ) -> Result<Self> {
        let tables = layout.tables();
        if tables > MAX_TABLES {
            return Err(BlockError::unsupported(
                file.name(),
                format!(
                    "VMDK sparse header: {tables} grain tables are more than {MAX_TABLES}; convert \
                     it to write"
                ),
            ));
        }
        let first = read_directory(&*file, &layout, layout.directory_sector)?;
        let redundant = match layout.redundant_sector {
            Some(sector) => read_directory(&*file, &layout, sector)?,
            None => Vec::new(),
        };
        let table_bytes = (layout.entries_per_table * 4).max(1);
        let most_loaded =
            length((LOADED_BYTES / share.max(1) / table_bytes).max(MIN_LOADED_TABLES));
        Ok(Self {
            slots: (0..tables).map(|_| ArcSwapOption::empty()).collect(),
            file,
            layout,
            directory: RwLock::new(Directory { first, redundant }),
            gate: RwLock::new(()),
            loaded: AtomicUsize::new(0),
            dirty: Mutex::new(Vec::new()),
            flushing: Mutex::new(()),
            poisoned: AtomicBool::new(false),
            most_loaded,
        })
    }

    /// Succeeds where everything that was to reach the medium did.
    pub(super) fn check_sound(&self) -> Result<()> {
        check_sound(&self.file.name(), &self.poisoned)
    }

    /// Makes the file durable; where that fails nothing more is written.
    pub(super) fn sync(&self) -> Result<()> {
        self.poisoning(self.file.flush())
    }

    /// Remembers that what was to reach the medium did not.
    pub(super) fn poisoning<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.poisoned.store(true, Ordering::Release);
        }
        result
    }

    /// Looks at a table; `None` where there is none.
    pub(super) fn look<T>(
        &self,
        number: u64,
        look: impl FnOnce(Option<&Table>) -> Result<T>,
    ) -> Result<T> {
        let result = {
            let _gate = self.gate.read();
            look(self.load(number)?.as_deref())
        };
        // Reading alone fills the memory, too. A flush, which knows tables that are neither changed
        // nor written yet, drops them itself.
        if self.loaded.load(Ordering::Relaxed) > self.most_loaded * 2
            && let Some(_no_flush) = self.flushing.try_lock()
        {
            self.drop_clean();
        }
        result
    }

    /// Sets the entries of `count` grains from grain `first`, the sectors as `sector` gives them for
    /// the n-th. Returns whether so much is changed now that a flush is due. `allocate` gives sectors
    /// for a table that is not there yet.
    pub(super) fn publish(
        &self,
        first: u64,
        count: u64,
        sector: impl Fn(u64) -> u32,
        allocate: impl Fn(u64) -> Result<u32>,
    ) -> Result<bool> {
        let per_table = self.layout.entries_per_table;
        let mut done = 0;
        while done < count {
            let (number, index) = ((first + done) / per_table, (first + done) % per_table);
            let here = (per_table - index).min(count - done);
            let _gate = self.gate.read();
            let table = match self.load(number)? {
                Some(table) => table,
                None => self.add(number, &allocate)?,
            };
            for step in 0..here {
                if let Some(entry) = table.entries.get(length(index + step)) {
                    entry.store(sector(done + step), Ordering::Release);
                }
            }
            if !table.dirty.swap(true, Ordering::AcqRel) {
                self.dirty.lock().push(number);
            }
            done += here;
        }
        Ok(self.dirty.lock().len() > self.most_loaded / 2)
    }

    fn slot(&self, number: u64) -> Result<&ArcSwapOption<Table>> {
        self.slots.get(length(number)).ok_or_else(|| {
            BlockError::damaged(self.file.name(), format!("VMDK grain table {number}: not there"))
        })
    }

    /// The table, loaded where it is not; the caller holds the gate.
    fn load(&self, number: u64) -> Result<Option<Arc<Table>>> {
        let slot = self.slot(number)?;
        if let Some(table) = slot.load_full() {
            return Ok(Some(table));
        }
        let sector = self.directory.read().first.get(length(number)).copied().unwrap_or(0);
        if sector == 0 {
            return Ok(None);
        }
        let at = locate_table(&*self.file, &self.layout, number, u64::from(sector))?;
        let mut bytes = vec![0; length(self.layout.entries_in(number) * 4)];
        self.file.read_at(&mut bytes, at)?;
        let entries = bytes.chunks_exact(4).map(|entry| AtomicU32::new(le_u32(entry, 0))).collect();
        Ok(Some(self.install(slot, entries)))
    }

    /// Puts a table in its slot, or takes what another thread has put there meanwhile.
    fn install(&self, slot: &ArcSwapOption<Table>, entries: Box<[AtomicU32]>) -> Arc<Table> {
        let table = Arc::new(Table { entries, dirty: AtomicBool::new(false) });
        let before = slot.compare_and_swap(&None::<Arc<Table>>, Some(table.clone()));
        match &*before {
            Some(other) => other.clone(),
            None => {
                self.loaded.fetch_add(1, Ordering::Relaxed);
                table
            }
        }
    }

    /// Makes a table that the extent does not have yet: empty in the file, then in the directories.
    fn add(&self, number: u64, allocate: &impl Fn(u64) -> Result<u32>) -> Result<Arc<Table>> {
        let mut directory = self.directory.write();
        if directory.first.get(length(number)).is_none_or(|sector| *sector == 0) {
            let bytes = vec![0; length(self.layout.entries_per_table * 4)];
            let sectors = self.layout.entries_per_table.div_ceil(128);
            let mut places = vec![(self.layout.directory_sector, allocate(sectors)?)];
            if let Some(spare) =
                self.layout.redundant_sector.filter(|_| !directory.redundant.is_empty())
            {
                places.push((spare, allocate(sectors)?));
            }
            for (_, sector) in &places {
                self.file.write_at(&bytes, u64::from(*sector) * 512)?;
            }
            // A directory must not name a table whose bytes a crash could leave as anything.
            self.sync()?;
            for (start, sector) in &places {
                self.file.write_at(&sector.to_le_bytes(), start * 512 + number * 4)?;
            }
            let Directory { first, redundant } = &mut *directory;
            for (list, (_, sector)) in [first, redundant].into_iter().zip(places) {
                if let Some(entry) = list.get_mut(length(number)) {
                    *entry = sector;
                }
            }
        }
        drop(directory);
        self.load(number)?.ok_or_else(|| {
            BlockError::damaged(self.file.name(), format!("VMDK grain table {number}: not there"))
        })
    }

    /// Writes all changed tables; see the module for the order. Afterwards everything that was
    /// written before the call is on the medium.
    pub(super) fn flush(&self) -> Result<()> {
        let _one = self.flushing.lock();
        self.check_sound()?;
        let mut changed = std::mem::take(&mut *self.dirty.lock());
        changed.sort_unstable();
        let copies = self.copy(&changed);
        self.poisoning(self.file.flush().and_then(|()| match copies.is_empty() {
            true => Ok(()),
            false => self.write(&copies),
        }))?;
        if self.loaded.load(Ordering::Relaxed) > self.most_loaded {
            self.drop_clean();
        }
        Ok(())
    }

    fn copy(&self, numbers: &[u64]) -> Vec<Copied> {
        let mut copies = Vec::with_capacity(numbers.len());
        for number in numbers {
            let Some(table) = self.slot(*number).ok().and_then(ArcSwapOption::load_full) else {
                continue;
            };
            // First the mark, then the entries: who changes one now marks it again.
            table.dirty.swap(false, Ordering::AcqRel);
            let entries = table.entries.iter().map(|entry| entry.load(Ordering::Acquire));
            let bytes = entries.flat_map(u32::to_le_bytes).collect();
            copies.push(Copied { number: *number, bytes });
        }
        copies
    }

    fn write(&self, copies: &[Copied]) -> Result<()> {
        let places = |list: &[u32]| -> Vec<u64> {
            let sector = |copy: &Copied| list.get(length(copy.number)).copied().unwrap_or(0);
            copies.iter().map(|copy| u64::from(sector(copy)) * 512).collect()
        };
        let (first, redundant) = {
            let directory = self.directory.read();
            (places(&directory.first), places(&directory.redundant))
        };
        self.write_at_places(copies, &redundant, true)?;
        self.write_at_places(copies, &first, false)?;
        self.file.flush()
    }

    /// Writes the copies, neighbours in one write. Redundant tables that lead nowhere are left to
    /// a repair.
    fn write_at_places(&self, copies: &[Copied], places: &[u64], is_spare: bool) -> Result<()> {
        let mut pending: Vec<u8> = Vec::new();
        let mut start = 0;
        for (copy, at) in copies.iter().zip(places) {
            let end = at.saturating_add(copy.bytes.len() as u64);
            if is_spare && (*at == 0 || end > self.file.size_bytes()) {
                continue;
            }
            let at = match is_spare {
                true => *at,
                false => locate_table(&*self.file, &self.layout, copy.number, at / 512)?,
            };
            if start + pending.len() as u64 != at || pending.len() >= WRITE_BYTES {
                if !pending.is_empty() {
                    self.file.write_at(&pending, start)?;
                }
                pending.clear();
                start = at;
            }
            pending.extend_from_slice(&copy.bytes);
        }
        if pending.is_empty() {
            return Ok(());
        }
        self.file.write_at(&pending, start)
    }

    fn drop_clean(&self) {
        let _alone = self.gate.write();
        for slot in &self.slots {
            let clean = slot.load().as_ref().is_some_and(|t| !t.dirty.load(Ordering::Acquire));
            if clean {
                slot.store(None);
                self.loaded.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

/// Succeeds where nothing that was to reach the medium failed to.
pub(super) fn check_sound(name: &str, poisoned: &AtomicBool) -> Result<()> {
    if poisoned.load(Ordering::Acquire) {
        return Err(BlockError::damaged(
            name,
            "an earlier flush failed, so what is in the file is not known; reopen and check it",
        ));
    }
    Ok(())
}

/// Reads a grain directory, which must be inside the file.
fn read_directory(
    file: &dyn WritableBlockDevice,
    layout: &SparseLayout,
    sector: u64,
) -> Result<Vec<u32>> {
    let Some((at, size)) = layout.directory_range(sector, file.size_bytes()) else {
        return Err(BlockError::damaged(
            file.name(),
            format!(
                "VMDK grain directory at sector {sector}: its {} entries are not inside the file of \
                 {} bytes; check and repair the image before it is written",
                layout.tables(),
                file.size_bytes()
            ),
        ));
    };
    let mut bytes = vec![0; length(size)];
    file.read_at(&mut bytes, at)?;
    Ok(bytes.chunks_exact(4).map(|entry| le_u32(entry, 0)).collect())
}
