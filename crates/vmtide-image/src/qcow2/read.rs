//! Reading through the mapping: what the read-only image, its snapshots and the writer share.

use super::compressed::Compressed;
use super::header::Header;
use super::table::{Geometry, L2Table, Mapping, Run};
use crate::bytes::length;
use crate::image::{Placement, push_placement};
use std::ops::Deref;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, ExtentKind, Result, push_extent};

/// The most extents in one answer.
const MAX_EXTENTS: usize = 1 << 16;

/// The most clusters one call of `extents` looks at. A hostile image can map the largest disk with
/// one L2 table; the caller gets its turn (and its chance to cancel) within milliseconds.
const MAX_CLUSTERS_PER_CALL: u64 = 1 << 20;

/// Gives L2 tables, whole or in slices.
pub(crate) trait Tables {
    type Table: Deref<Target = L2Table>;

    /// The table, or the slice of it, that maps the disk at `offset`; none where the L1 entry
    /// leads to no table.
    fn table_at(&self, offset: u64) -> Result<Option<Self::Table>>;
}

/// The files under an image and what is needed to read them.
pub(crate) struct Layers {
    pub(crate) name: String,
    pub(crate) file: Arc<dyn BlockDevice>,
    /// The external data file.
    pub(crate) data_file: Option<Arc<dyn BlockDevice>>,
    pub(crate) backing: Option<Arc<dyn BlockDevice>>,
    pub(crate) geometry: Geometry,
    pub(super) compressed: Compressed,
}

impl Layers {
    pub(crate) fn new(
        header: &Header,
        file: Arc<dyn BlockDevice>,
        data_file: Option<Arc<dyn BlockDevice>>,
        backing: Option<Arc<dyn BlockDevice>>,
    ) -> Self {
        Self {
            name: file.name(),
            file,
            data_file,
            backing,
            geometry: Geometry::of(header),
            compressed: Compressed::new(header),
        }
    }

    /// The run at `offset`, at most `limit` bytes.
    pub(crate) fn run(&self, tables: &impl Tables, offset: u64, limit: u64) -> Result<Run> {
        match tables.table_at(offset)? {
            Some(table) => table.run(&self.name, &self.geometry, offset, limit),
            None => {
                let span = self.geometry.l2_span();
                Ok(Run { mapping: Mapping::Unallocated, length: limit.min(span - offset % span) })
            }
        }
    }

    /// Fills `buffer` from `offset`; the caller has checked the range. Stored bytes that follow
    /// each other in the file are read as one, whatever tables map them.
    pub(crate) fn read(&self, tables: &impl Tables, buffer: &mut [u8], offset: u64) -> Result<()> {
        let mut rest = buffer;
        let mut at = offset;
        let mut next = None;
        while !rest.is_empty() {
            let wanted = rest.len() as u64;
            let run = match next.take() {
                Some(run) => run,
                None => self.run(tables, at, wanted)?,
            };
            let mut bytes = run.length;
            match run.mapping {
                Mapping::Data(host) => {
                    while bytes < wanted {
                        let after = self.run(tables, at + bytes, wanted - bytes)?;
                        if after.mapping != Mapping::Data(host + bytes) {
                            next = Some(after);
                            break;
                        }
                        bytes += after.length;
                    }
                    self.read_host(host, &mut rest[..length(bytes)])?;
                }
                Mapping::Compressed { offset, length } => {
                    bytes = self.read_compressed(tables, rest, at, (offset, length))?;
                }
                Mapping::Zero => rest[..length(bytes)].fill(0),
                Mapping::Unallocated => self.read_backing(&mut rest[..length(bytes)], at)?,
            }
            at += bytes;
            rest = &mut rest[length(bytes)..];
        }
        Ok(())
    }

    /// Reads stored bytes. A cluster that begins inside the file may end after it: writers need
    /// not store a tail past the end of the disk, and what is missing reads as zeros, as in QEMU.
    fn read_host(&self, host: u64, piece: &mut [u8]) -> Result<()> {
        let device = self.data_file.as_ref().unwrap_or(&self.file);
        let size_bytes = device.size_bytes();
        let end = host + piece.len() as u64;
        if end <= size_bytes {
            return device.read_at(piece, host);
        }
        let last_cluster = (end - 1) & !(self.geometry.cluster_bytes() - 1);
        if last_cluster >= size_bytes {
            return Err(BlockError::damaged(
                device.name(),
                format!(
                    "data cluster at {last_cluster:#x} is past the end of the file of \
                     {size_bytes} bytes: the image is truncated"
                ),
            ));
        }
        let present = piece.len().min(length(size_bytes.saturating_sub(host)));
        let (stored, missing) = piece.split_at_mut(present);
        missing.fill(0);
        if stored.is_empty() {
            return Ok(());
        }
        device.read_at(stored, host)
    }

    fn read_backing(&self, piece: &mut [u8], at: u64) -> Result<()> {
        let Some(backing) = &self.backing else {
            piece.fill(0);
            return Ok(());
        };
        let present = piece.len().min(length(backing.size_bytes().saturating_sub(at)));
        let (stored, missing) = piece.split_at_mut(present);
        missing.fill(0);
        if stored.is_empty() {
            return Ok(());
        }
        backing.read_at(stored, at)
    }

    /// What `range` holds, merged through the backing chain; a prefix of it, as
    /// [`BlockDevice::extents`] allows. The caller has checked the range.
    pub(crate) fn extents(&self, tables: &impl Tables, range: ByteRange) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        let mut at = range.offset;
        let mut work = 0;
        while at < range.end() && extents.len() < MAX_EXTENTS && work < MAX_CLUSTERS_PER_CALL {
            let Some(table) = tables.table_at(at)? else {
                let run = self.run(tables, at, range.end() - at)?;
                work += 1;
                at += self.push_run(&mut extents, run, at)?;
                continue;
            };
            let table_end = (at | (self.geometry.l2_span() - 1)).saturating_add(1);
            let first = at;
            while at < range.end().min(table_end)
                && extents.len() < MAX_EXTENTS
                && (at == first || table.maps(&self.geometry, at))
            {
                let run = table.run(&self.name, &self.geometry, at, range.end() - at)?;
                work += run.length / self.geometry.unit_bytes() + 1;
                at += self.push_run(&mut extents, run, at)?;
            }
        }
        Ok(extents)
    }

    /// Where the bytes of `range` are in this image, the backing file not asked.
    pub(crate) fn layout(&self, tables: &impl Tables, range: ByteRange) -> Result<Vec<Placement>> {
        let mut placements = Vec::new();
        let mut at = range.offset;
        let mut work = 0;
        while at < range.end() && placements.len() < MAX_EXTENTS && work < MAX_CLUSTERS_PER_CALL {
            let run = self.run(tables, at, range.end() - at)?;
            work += run.length / self.geometry.unit_bytes() + 1;
            let (kind, host, compressed) = match run.mapping {
                Mapping::Data(host) => (ExtentKind::Data, Some(host), false),
                Mapping::Compressed { .. } => (ExtentKind::Data, None, true),
                Mapping::Zero => (ExtentKind::Zero, None, false),
                Mapping::Unallocated => (ExtentKind::Unallocated, None, false),
            };
            let file_offset = host.filter(|_| self.data_file.is_none());
            let range = ByteRange::new(at, run.length);
            push_placement(&mut placements, Placement { range, kind, file_offset, compressed });
            at += run.length;
        }
        Ok(placements)
    }

    /// Appends one run's extents and returns the bytes they cover.
    fn push_run(&self, extents: &mut Vec<Extent>, run: Run, at: u64) -> Result<u64> {
        let kind = match run.mapping {
            Mapping::Data(_) | Mapping::Compressed { .. } => ExtentKind::Data,
            Mapping::Zero => ExtentKind::Zero,
            Mapping::Unallocated => ExtentKind::Unallocated,
        };
        let below = match &self.backing {
            Some(backing) if kind == ExtentKind::Unallocated => {
                let end = (at + run.length).min(backing.size_bytes());
                (end > at).then(|| (backing, ByteRange::from_bounds(at, end)))
            }
            _ => None,
        };
        let Some((backing, range)) = below else {
            push_extent(extents, Extent::new(at, run.length, kind));
            return Ok(run.length);
        };
        let mut covered = 0;
        for extent in backing.extents(range)? {
            if extent.range.offset != at + covered || extent.range.end() > range.end() {
                return Err(BlockError::damaged(
                    backing.name(),
                    format!("extent {} does not continue the answer", extent.range),
                ));
            }
            covered += extent.range.length;
            push_extent(extents, extent);
        }
        if covered == 0 {
            return Err(BlockError::damaged(
                backing.name(),
                format!("no extents reported for {range}"),
            ));
        }
        Ok(covered)
    }
}
