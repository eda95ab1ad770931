//! A qcow2 image that is open for reading.

use super::bitmap::{BitmapEntry, read_bitmap, read_directory};
use super::header::{Header, MAX_L1_BYTES, OFFSET_MASK, incompatible};
use super::read::{Layers, Tables};
use super::snapshot::{SnapshotEntry, read_snapshots};
use super::table::{Geometry, L2Table, l2_offset};
use crate::bytes::{decode_table, length};
use crate::table_cache::{Page, TableCache};
use crate::{BitmapInfo, DiskImage, Format, Placement, SnapshotInfo};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, RangeSet, Result};

/// The most memory the L2 tables of one image take. At 64 KiB clusters this maps 256 GiB of disk
/// at a time; a slice that is needed again is read again.
const L2_CACHE_BYTES: u64 = 32 << 20;

/// What a cached slice takes beside its entries.
const SLICE_OVERHEAD_BYTES: u64 = 96;

/// The other files an image consists of, opened by whoever trusts them.
#[derive(Clone, Default)]
pub struct Companions {
    /// What unallocated clusters read as. Must be given where the image names a backing file.
    pub backing: Option<Arc<dyn BlockDevice>>,
    /// The external data file. Must be given where the image has one.
    pub data_file: Option<Arc<dyn BlockDevice>>,
}

/// A qcow2 image that is open for reading, or one of its internal snapshots.
///
/// Any number of threads may read at once and no lock is held: the L1 table is immutable, L2 tables
/// come in slices of 4 KiB from a bounded cache (32 MiB) without locks. A read that the tables in
/// memory map to one place costs one read of the file. The image must not be written by anybody
/// while it is open here.
pub struct Qcow2Image {
    header: Header,
    layers: Arc<Layers>,
    size_bytes: u64,
    l1: Vec<u64>,
    /// Slices of L2 tables, by their place on the disk.
    cache: TableCache<L2Table>,
}

/// A slice of an L2 table in the cache.
pub(crate) struct Slice(Arc<Page<L2Table>>);

impl std::ops::Deref for Slice {
    type Target = L2Table;

    fn deref(&self) -> &L2Table {
        &self.0.entries
    }
}

fn new_cache(geometry: &Geometry, l1: &[u64]) -> TableCache<L2Table> {
    let slices = geometry.cluster_bytes() / geometry.slice_bytes();
    let most = L2_CACHE_BYTES / (geometry.slice_bytes() + SLICE_OVERHEAD_BYTES);
    TableCache::new((l1.len() as u64).saturating_mul(slices), length(most))
}

impl Qcow2Image {
    /// Opens an image from any device: a file, a network export, or bytes in memory.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] naming the structure, its offset and the value found;
    /// [`BlockError::Unsupported`] for encryption, unknown features, and where a file the image
    /// needs was not given in `companions`.
    pub fn open_device(file: Arc<dyn BlockDevice>, companions: Companions) -> Result<Self> {
        let header = Header::read(&*file)?;
        check_readable(&header, &file.name(), &companions)?;
        let l1 = read_l1(&*file, header.l1_offset, header.l1_entries)?;
        let cache = new_cache(&Geometry::of(&header), &l1);
        let data_file = companions.data_file.filter(|_| header.has(incompatible::EXTERNAL_DATA));
        let backing = companions.backing;
        Ok(Self {
            size_bytes: header.size_bytes,
            layers: Arc::new(Layers::new(&header, file, data_file, backing)),
            header,
            l1,
            cache,
        })
    }

    /// The cluster size in bytes: the unit of allocation.
    pub fn cluster_size_bytes(&self) -> u64 {
        self.header.cluster_bytes()
    }

    /// The internal snapshots, oldest first as in the image.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] where the snapshot table breaks the specification.
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        let entries = read_snapshots(&*self.layers.file, &self.header)?;
        Ok(entries.into_iter().map(|entry| entry.info).collect())
    }

    /// The disk as it was in the internal snapshot with this id or else this name.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] where there is no such snapshot, [`BlockError::Damaged`] where
    /// its tables break the specification.
    pub fn open_snapshot(&self, id_or_name: &str) -> Result<Self> {
        let entries = read_snapshots(&*self.layers.file, &self.header)?;
        let entry = pick(&entries, id_or_name).ok_or_else(|| {
            BlockError::unsupported(
                &self.layers.name,
                format!("has no internal snapshot {id_or_name:?}; `info` lists them"),
            )
        })?;
        let l1 = read_l1(&*self.layers.file, entry.l1_offset, entry.l1_entries)?;
        let needed = entry.info.size_bytes.div_ceil(self.layers.geometry.l2_span());
        if needed > l1.len() as u64 {
            return Err(BlockError::damaged(
                &self.layers.name,
                format!(
                    "snapshot {id_or_name:?}: its L1 table has {} entries, a disk of {} bytes \
                     needs {needed}",
                    l1.len(),
                    entry.info.size_bytes
                ),
            ));
        }
        Ok(Self {
            header: self.header.clone(),
            layers: self.layers.clone(),
            size_bytes: entry.info.size_bytes,
            cache: new_cache(&self.layers.geometry, &l1),
            l1,
        })
    }

    /// The persistent dirty bitmaps, with what keeps each from being used.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] where the bitmap directory breaks the specification.
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        let entries = read_directory(&*self.layers.file, &self.header)?;
        Ok(entries.into_iter().map(|entry| entry.info).collect())
    }

    /// The bytes a persistent bitmap marks as changed, clamped to the disk. Where there are more
    /// than two million separate ranges the set is rounded outward to bound its memory.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] where there is no such bitmap or it must not be used (see
    /// [`BitmapInfo::state`]): the caller reads the whole disk instead.
    /// [`BlockError::Damaged`] where its tables break the specification.
    pub fn read_bitmap(&self, name: &str) -> Result<RangeSet> {
        let entries = read_directory(&*self.layers.file, &self.header)?;
        let entry: &BitmapEntry =
            entries.iter().find(|entry| entry.info.name == name).ok_or_else(|| {
                BlockError::unsupported(
                    &self.layers.name,
                    format!("has no bitmap {name:?}; `info` lists them"),
                )
            })?;
        read_bitmap(&*self.layers.file, &self.header, entry)
    }
}

fn pick<'a>(entries: &'a [SnapshotEntry], id_or_name: &str) -> Option<&'a SnapshotEntry> {
    entries
        .iter()
        .find(|entry| entry.info.id == id_or_name)
        .or_else(|| entries.iter().find(|entry| entry.info.name == id_or_name))
}

/// Succeeds where the image is one we can read with these companions.
pub(crate) fn check_readable(header: &Header, name: &str, companions: &Companions) -> Result<()> {
    let refuse = |detail: String| Err(BlockError::unsupported(name, detail));
    match header.encryption {
        0 => {}
        1 => {
            return refuse("is AES-encrypted; decrypt it first, e.g. with qemu-img convert".into());
        }
        2 => {
            return refuse(
                "is LUKS-encrypted; decrypt it first, e.g. with qemu-img convert".into(),
            );
        }
        other => {
            return Err(BlockError::damaged(
                name,
                format!("header at 32: encryption method {other} is unknown"),
            ));
        }
    }
    if header.has(incompatible::EXTERNAL_DATA) && companions.data_file.is_none() {
        return refuse(format!(
            "keeps its data in the external file {:?}, which was not opened; \
             allow it (backing policy) if you trust the image",
            header.data_file_name.as_deref().unwrap_or("(not named)")
        ));
    }
    if let Some(backing) = &header.backing_name
        && companions.backing.is_none()
    {
        return refuse(format!(
            "depends on the backing file {backing:?}, which was not opened; \
             allow it (backing policy) if you trust the image"
        ));
    }
    Ok(())
}

/// Reads an L1 table whose size is not checked yet.
pub(crate) fn read_l1(file: &dyn BlockDevice, offset: u64, entries: u32) -> Result<Vec<u64>> {
    let range = ByteRange::new(offset, u64::from(entries) * 8);
    let inside = range.checked_end().is_some_and(|end| end <= file.size_bytes());
    if range.length > MAX_L1_BYTES || !inside {
        return Err(BlockError::damaged(
            file.name(),
            format!(
                "L1 table at {offset:#x}: its {entries} entries are not inside the file of {} \
                 bytes, or more than {}",
                file.size_bytes(),
                MAX_L1_BYTES / 8
            ),
        ));
    }
    let mut bytes = vec![0u8; length(range.length)];
    file.read_at(&mut bytes, offset)?;
    Ok(decode_table(&bytes))
}

impl Tables for Qcow2Image {
    type Table = Slice;

    fn table_at(&self, offset: u64) -> Result<Option<Slice>> {
        let layers = &self.layers;
        let geometry = &layers.geometry;
        let (l1_index, l2_index) = geometry.indices(offset);
        let entry = self.l1.get(length(l1_index)).copied().unwrap_or(0);
        if entry & OFFSET_MASK == 0 {
            return Ok(None);
        }
        let slice = l2_index / geometry.slice_entries();
        let number = l1_index * (geometry.cluster_bytes() / geometry.slice_bytes()) + slice;
        let read = || {
            let size_bytes = layers.file.size_bytes();
            let table = l2_offset(&layers.name, geometry, l1_index, entry, size_bytes)?;
            L2Table::read_slice(&*layers.file, geometry, table.unwrap_or_default(), slice)
        };
        self.cache.get_or_read(number, read).map(|page| Some(Slice(page)))
    }
}

impl BlockDevice for Qcow2Image {
    fn name(&self) -> String {
        self.layers.name.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        self.layers.read(self, buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.check_range(range)?;
        self.layers.extents(self, range)
    }
}

impl DiskImage for Qcow2Image {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn layout(&self, range: ByteRange) -> Result<Vec<Placement>> {
        self.check_range(range)?;
        self.layers.layout(self, range)
    }
}
