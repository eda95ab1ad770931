//! A hosted sparse extent that is open for writing.
//!
//! | operation | grains that are there | grains that are not |
//! |---|---|---|
//! | whole grains | written in place, no lock | appended together, then published; no lock |
//! | part of a grain | written in place, no lock | the grain's lock (one of 64) is held while it is filled from the parent, appended and published |
//!
//! Writers of ranges that do not overlap may meet only in one grain that is not there, which is
//! what the locks are for: the second one finds it there.

use super::hosted::{HostedHeader, SECTOR, UNCLEAN_AT};
use super::layout::SparseLayout;
use super::map::{Map, Mapping, Run, run_in_table};
use super::read::read_parent;
use super::sparse::checked_grain;
use super::tables::GrainTables;
use crate::bytes::length;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result, WritableBlockDevice};

/// How far a file grows ahead of what is written: fewer system calls, and after a crash at most so
/// much hole at its end.
const GROWTH_BYTES: u64 = 64 << 20;

/// The locks for grains that are being allocated in part.
const LOCKS: usize = 64;

/// The largest grain that is written: one that is written in part is put together in memory, by
/// every thread. Real ones have 64 KiB to 1 MiB.
const MAX_GRAIN_BYTES: u64 = 16 << 20;

/// The most bytes of zeros that are written in one piece where zeros must be stored.
const ZERO_BYTES: usize = 1 << 20;

/// A sparse extent that is open for writing.
pub(super) struct SparseWriter {
    name: String,
    file: Arc<dyn WritableBlockDevice>,
    layout: SparseLayout,
    tables: GrainTables,
    parent: Option<Arc<dyn BlockDevice>>,
    /// The bytes of the disk that are here.
    range: ByteRange,
    /// The first sector that nothing uses.
    next: AtomicU64,
    growing: Mutex<()>,
    locks: Vec<Mutex<()>>,
    /// Whether the header says that a writer is at work.
    marked: AtomicBool,
    marking: Mutex<()>,
}

impl SparseWriter {
    /// Opens one of `share` extents, which share the memory for tables.
    pub(super) fn open(
        file: Arc<dyn WritableBlockDevice>,
        header: &HostedHeader,
        parent: Option<Arc<dyn BlockDevice>>,
        range: ByteRange,
        share: u64,
    ) -> Result<Self> {
        let layout = header.layout();
        let name = file.name();
        layout.validate(&name)?;
        let refuse = |detail: &str| Err(BlockError::unsupported(&name, detail));
        if layout.compressed {
            return refuse(
                "is stream-optimized: its grains are compressed and written once; convert it to \
                 monolithicSparse to change it",
            );
        }
        if layout.version > 2 {
            return refuse(
                "is a sparse extent of version 3, whose change tracking would miss what is written \
                 here; convert it to write",
            );
        }
        if layout.grain_bytes() > MAX_GRAIN_BYTES {
            return refuse(
                "has grains of more than 16 MiB, which are only read; convert it to write",
            );
        }
        let end = file.size_bytes().div_ceil(SECTOR);
        Ok(Self {
            tables: GrainTables::open(file.clone(), layout.clone(), share)?,
            name,
            file,
            parent,
            range,
            next: AtomicU64::new(end.next_multiple_of(layout.grain_sectors)),
            layout,
            growing: Mutex::new(()),
            locks: (0..LOCKS).map(|_| Mutex::new(())).collect(),
            marked: AtomicBool::new(false),
            marking: Mutex::new(()),
        })
    }

    /// Marks the extent as being written, once, before anything else is changed.
    fn begin(&self) -> Result<()> {
        self.tables.check_sound()?;
        if self.marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let _one = self.marking.lock();
        if !self.marked.load(Ordering::Acquire) {
            self.file.write_at(&[1], UNCLEAN_AT)?;
            self.tables.sync()?;
            self.marked.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Writes `data` at byte `offset` of the extent; the caller has checked the range.
    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        self.begin()?;
        let mut rest = data;
        let mut at = offset;
        while !rest.is_empty() {
            let run = self.run(at, rest.len() as u64)?;
            let done = match run.mapping {
                Mapping::Data(place) => {
                    self.file.write_at(&rest[..length(run.length)], place)?;
                    run.length
                }
                _ => self.write_absent(&rest[..length(run.length)], at)?,
            };
            at += done;
            rest = &rest[length(done)..];
        }
        Ok(())
    }

    /// Writes the start of `data`, whose grains are not there: all whole grains, or a part of the
    /// first one. Returns the bytes written.
    fn write_absent(&self, data: &[u8], at: u64) -> Result<u64> {
        let grain_bytes = self.layout.grain_bytes();
        let inside = at % grain_bytes;
        let end = at + data.len() as u64;
        // The last grain of the extent is whole where the extent ends.
        let whole = match end == self.range.length {
            true => data.len(),
            false => data.len() - length(end % grain_bytes).min(data.len()),
        };
        if inside != 0 || whole == 0 {
            let part = data.len().min(length(grain_bytes - inside));
            self.write_part(&data[..part], at)?;
            return Ok(part as u64);
        }
        let count = (whole as u64).div_ceil(grain_bytes);
        let sector = self.allocate(count * self.layout.grain_sectors)?;
        let place = u64::from(sector) * SECTOR;
        self.file.write_at(&data[..whole], place)?;
        // A grain past the end of the disk is stored whole, like all others: the rest is zero,
        // because the file has just grown by it.
        let grain_sectors = self.layout.grain_sectors;
        self.publish(at / grain_bytes, count, |number| {
            u32::try_from(u64::from(sector) + number * grain_sectors).unwrap_or(u32::MAX)
        })?;
        Ok(whole as u64)
    }

    /// Writes a part of one grain, which is not there or has just come.
    fn write_part(&self, data: &[u8], at: u64) -> Result<()> {
        let grain_bytes = self.layout.grain_bytes();
        let (grain, inside) = (at / grain_bytes, at % grain_bytes);
        let Some(lock) = self.locks.get(length(grain % LOCKS as u64)) else {
            return Err(BlockError::damaged(&self.name, "no lock"));
        };
        let _guard = lock.lock();
        let run = self.run(at, data.len() as u64)?;
        if let Mapping::Data(place) = run.mapping {
            return self.file.write_at(data, place);
        }
        let start = at - inside;
        let mut bytes = vec![0; length(grain_bytes)];
        if run.mapping == Mapping::Absent {
            let present = length(grain_bytes.min(self.range.length.saturating_sub(start)));
            let disk_offset = self.range.offset + start;
            read_parent(self.parent.as_deref(), &mut bytes[..present], disk_offset)?;
        }
        let inside = length(inside);
        bytes[inside..inside + data.len()].copy_from_slice(data);
        let sector = self.allocate(self.layout.grain_sectors)?;
        self.file.write_at(&bytes, u64::from(sector) * SECTOR)?;
        self.publish(grain, 1, |_| sector)
    }

    fn publish(&self, first: u64, count: u64, sector: impl Fn(u64) -> u32) -> Result<()> {
        let allocate = |sectors: u64| self.allocate(sectors);
        if self.tables.publish(first, count, sector, allocate)? {
            self.tables.flush()?;
        }
        Ok(())
    }

    /// Makes `range` of the extent read as zeros; the caller has checked it.
    pub(super) fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.begin()?;
        let mut at = range.offset;
        while at < range.end() {
            let run = self.run(at, range.end() - at)?;
            let piece = ByteRange::new(at, run.length);
            match run.mapping {
                Mapping::Data(place) => {
                    self.file.write_zeroes(ByteRange::new(place, run.length))?;
                }
                Mapping::Absent if self.parent_shows(piece) => self.hide_parent(piece)?,
                _ => {}
            }
            at += run.length;
        }
        Ok(())
    }

    /// Whether the parent has bytes in `range` of the extent.
    fn parent_shows(&self, range: ByteRange) -> bool {
        let offset = self.range.offset + range.offset;
        self.parent.as_ref().is_some_and(|parent| offset < parent.size_bytes())
    }

    /// Zeros over the parent's bytes: entries where the extent knows them, stored zeros otherwise.
    fn hide_parent(&self, range: ByteRange) -> Result<()> {
        let grain_bytes = self.layout.grain_bytes();
        let first = range.offset.next_multiple_of(grain_bytes);
        let last = match range.end() == self.range.length {
            true => range.end().next_multiple_of(grain_bytes),
            false => range.end() - range.end() % grain_bytes,
        };
        if !self.layout.zero_grains || last <= first {
            return self.store_zeros(range);
        }
        self.store_zeros(ByteRange::from_bounds(range.offset, first))?;
        self.publish(first / grain_bytes, (last - first) / grain_bytes, |_| 1)?;
        self.store_zeros(ByteRange::from_bounds(last, range.end()))
    }

    fn store_zeros(&self, range: ByteRange) -> Result<()> {
        let zeros = vec![0; ZERO_BYTES.min(length(range.length))];
        let mut at = range.offset;
        while at < range.end() {
            let piece = zeros.len().min(length(range.end() - at));
            self.write(&zeros[..piece], at)?;
            at += piece as u64;
        }
        Ok(())
    }

    /// Takes `sectors` at the end of the file, which is made that long.
    fn allocate(&self, sectors: u64) -> Result<u32> {
        let first = self.next.fetch_add(sectors, Ordering::AcqRel);
        let end = first.saturating_add(sectors);
        let (Ok(sector), true) = (u32::try_from(first), end <= u64::from(u32::MAX)) else {
            return Err(BlockError::unsupported(
                &self.name,
                "is full: a sparse extent ends at 2 TiB, because sectors are counted with 32 bits; \
                 use twoGbMaxExtentSparse or a flat image",
            ));
        };
        let needed = end * SECTOR;
        if self.file.size_bytes() < needed {
            let _one = self.growing.lock();
            if self.file.size_bytes() < needed {
                self.file.resize(needed + (needed / 4).min(GROWTH_BYTES))?;
            }
        }
        Ok(sector)
    }

    /// Hands the hint to the file.
    pub(super) fn expect_bulk_writes(&self) {
        self.file.expect_bulk_writes();
    }

    pub(super) fn flush(&self) -> Result<()> {
        self.tables.flush()
    }

    /// Ends the writing: nothing in memory, nothing behind the last grain, not marked.
    pub(super) fn finish(&self) -> Result<()> {
        self.flush()?;
        let _one = self.marking.lock();
        if self.marked.load(Ordering::Acquire) {
            let end = self.next.load(Ordering::Acquire).saturating_mul(SECTOR);
            if self.file.size_bytes() > end {
                self.file.resize(end)?;
            }
            self.file.write_at(&[0], UNCLEAN_AT)?;
            self.tables.sync()?;
            self.marked.store(false, Ordering::Release);
        }
        Ok(())
    }
}

impl Map for SparseWriter {
    fn run(&self, offset: u64, limit: u64) -> Result<Run> {
        let span = self.layout.table_span();
        let number = offset / span;
        let rest = limit.min(span - offset % span);
        let file_bytes = self.file.size_bytes();
        self.tables.look(number, |table| {
            let Some(table) = table else {
                return Ok(Run { mapping: Mapping::Absent, length: rest });
            };
            let grain = |index: u64| {
                let value = u64::from(table.entry(index));
                checked_grain(&self.layout, &self.name, file_bytes, (number, index), value)
            };
            run_in_table(&self.layout, grain, offset, rest)
        })
    }

    fn unit_bytes(&self) -> u64 {
        self.layout.grain_bytes()
    }
}
