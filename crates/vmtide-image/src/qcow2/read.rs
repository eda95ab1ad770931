//! Reading through the mapping: what the read-only image, its snapshots and the writer share.

use super::cache::Cache;
use super::decompress::decompress;
use super::header::{Compression, Header};
use super::table::{Geometry, L2Table, Mapping, Run};
use crate::bytes::length;
use crate::image::{Placement, push_placement};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, ExtentKind, Result, push_extent};

/// The most memory that decompressed clusters take, for readers that ask in smaller pieces than a
/// cluster; without it a 4 KiB scan of a 64 KiB-cluster image decompresses everything 16 times.
const DECOMPRESSED_BYTES: u64 = 4 << 20;

/// The most extents in one answer.
const MAX_EXTENTS: usize = 1 << 16;

/// The most clusters one call of `extents` looks at. A hostile image can map the largest disk with
/// one L2 table; the caller gets its turn (and its chance to cancel) within milliseconds.
const MAX_CLUSTERS_PER_CALL: u64 = 1 << 20;

/// Gives the L2 table for an L1 index; `None` where there is none.
pub(crate) trait Tables {
    fn table(&self, l1_index: u64) -> Result<Option<Arc<L2Table>>>;
}

/// The files under an image and what is needed to read them.
pub(crate) struct Layers {
    pub(crate) name: String,
    pub(crate) file: Arc<dyn BlockDevice>,
    /// The external data file.
    pub(crate) data_file: Option<Arc<dyn BlockDevice>>,
    pub(crate) backing: Option<Arc<dyn BlockDevice>>,
    pub(crate) geometry: Geometry,
    compression: Compression,
    decompressed: Cache<Vec<u8>>,
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
            compression: header.compression,
            decompressed: Cache::new(DECOMPRESSED_BYTES, header.cluster_bytes()),
        }
    }

    /// The run at `offset`, at most `limit` bytes.
    pub(crate) fn run(&self, tables: &impl Tables, offset: u64, limit: u64) -> Result<Run> {
        let (l1_index, _) = self.geometry.indices(offset);
        match tables.table(l1_index)? {
            Some(table) => table.run(&self.name, &self.geometry, offset, limit),
            None => {
                let span = self.geometry.l2_span();
                Ok(Run { mapping: Mapping::Unallocated, length: limit.min(span - offset % span) })
            }
        }
    }

    /// Fills `buffer` from `offset`; the caller has checked the range.
    pub(crate) fn read(&self, tables: &impl Tables, buffer: &mut [u8], offset: u64) -> Result<()> {
        let mut rest = buffer;
        let mut at = offset;
        while !rest.is_empty() {
            let run = self.run(tables, at, rest.len() as u64)?;
            let (piece, after) = rest.split_at_mut(length(run.length));
            self.read_run(run.mapping, piece, at)?;
            at += run.length;
            rest = after;
        }
        Ok(())
    }

    fn read_run(&self, mapping: Mapping, piece: &mut [u8], at: u64) -> Result<()> {
        match mapping {
            Mapping::Zero => piece.fill(0),
            Mapping::Data(host) => self.read_host(host, piece)?,
            Mapping::Unallocated => self.read_backing(piece, at)?,
            Mapping::Compressed { offset, length } => {
                let cluster = self.compressed_cluster(offset, length, at)?;
                let inside = crate::bytes::length(at % self.geometry.cluster_bytes());
                piece.copy_from_slice(&cluster[inside..inside + piece.len()]);
            }
        }
        Ok(())
    }

    /// Reads stored bytes. A cluster that begins inside the file may end after it: writers need
    /// not store a tail past the end of the disk, and what is missing reads as zeros, as in QEMU.
    fn read_host(&self, host: u64, piece: &mut [u8]) -> Result<()> {
        let device = self.data_file.as_ref().unwrap_or(&self.file);
        let size_bytes = device.size_bytes();
        if host + piece.len() as u64 <= size_bytes {
            return device.read_at(piece, host);
        }
        let cluster_start = host & !(self.geometry.cluster_bytes() - 1);
        if cluster_start >= size_bytes {
            return Err(BlockError::damaged(
                device.name(),
                format!(
                    "data cluster at {cluster_start:#x} is past the end of the file of \
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

    fn compressed_cluster(&self, offset: u64, bytes: u64, at: u64) -> Result<Arc<Vec<u8>>> {
        if let Some(cluster) = self.decompressed.get(offset) {
            return Ok(cluster);
        }
        let damaged = |detail: String| {
            BlockError::damaged(
                &self.name,
                format!("compressed cluster at {offset:#x} (disk offset {at}): {detail}"),
            )
        };
        // The last sector need not be there in full: the file may end with the data.
        let size_bytes = self.file.size_bytes();
        let available = bytes.min(size_bytes.saturating_sub(offset));
        if available == 0 {
            return Err(damaged(format!("past the end of the file of {size_bytes} bytes")));
        }
        let mut compressed = vec![0u8; length(available)];
        self.file.read_at(&mut compressed, offset)?;
        let mut cluster = vec![0u8; length(self.geometry.cluster_bytes())];
        decompress(self.compression, &compressed, &mut cluster).map_err(damaged)?;
        let cluster = Arc::new(cluster);
        self.decompressed.insert(offset, cluster.clone());
        Ok(cluster)
    }

    /// What `range` holds, merged through the backing chain; a prefix of it, as
    /// [`BlockDevice::extents`] allows. The caller has checked the range.
    pub(crate) fn extents(&self, tables: &impl Tables, range: ByteRange) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        let mut at = range.offset;
        let mut work = 0;
        while at < range.end() && extents.len() < MAX_EXTENTS && work < MAX_CLUSTERS_PER_CALL {
            let (l1_index, _) = self.geometry.indices(at);
            let mut table = tables.table(l1_index)?;
            let table_end = (at | (self.geometry.l2_span() - 1)).saturating_add(1).min(range.end());
            work += 1;
            while at < table_end && extents.len() < MAX_EXTENTS {
                let limit = table_end - at;
                let run = match &mut table {
                    Some(table) => table.run(&self.name, &self.geometry, at, limit)?,
                    None => Run { mapping: Mapping::Unallocated, length: limit },
                };
                if table.is_some() {
                    work += run.length / self.geometry.unit_bytes() + 1;
                }
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
