//! The tables of an image that is open for writing, in memory.

use super::header::{COPIED, Header};
use super::image::read_l1;
use super::refcount::Refcounts;
use super::table::{Geometry, L2Table, l2_offset};
use crate::bytes::length;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result};

/// An L2 table in memory.
pub(super) struct CachedTable {
    pub(super) table: Arc<L2Table>,
    pub(super) dirty: bool,
    /// Being written by a flush: must not be dropped and read again.
    pub(super) flushing: bool,
}

/// All tables; what differs from the file is marked dirty and written by [`super::flush`].
pub(super) struct Metadata {
    pub(super) geometry: Geometry,
    pub(super) l1: Vec<u64>,
    pub(super) l1_offset: u64,
    pub(super) l1_dirty: BTreeSet<usize>,
    /// The header's size and L1 fields differ from the file's.
    pub(super) header_dirty: bool,
    pub(super) tables: HashMap<u64, CachedTable>,
    /// Where the last compressed cluster ends in the file and the next may begin; 0 for nowhere.
    pub(super) packed_end: u64,
    pub(super) refcounts: Refcounts,
}

impl Metadata {
    pub(super) fn read(file: &dyn BlockDevice, header: &Header) -> Result<Self> {
        Ok(Self {
            geometry: Geometry::of(header),
            l1: read_l1(file, header.l1_offset, header.l1_entries)?,
            l1_offset: header.l1_offset,
            l1_dirty: BTreeSet::new(),
            header_dirty: false,
            tables: HashMap::new(),
            packed_end: 0,
            refcounts: Refcounts::read(file, header)?,
        })
    }

    pub(super) fn l1_entry(&self, l1_index: u64) -> u64 {
        self.l1.get(length(l1_index)).copied().unwrap_or(0)
    }

    fn set_l1_entry(&mut self, l1_index: u64, entry: u64) {
        if let Some(slot) = self.l1.get_mut(length(l1_index)) {
            *slot = entry;
            self.l1_dirty.insert(length(l1_index));
        }
    }

    /// The table for an L1 index where that needs no I/O: `Some(None)` where there is none.
    pub(super) fn cached(&self, l1_index: u64) -> Option<Option<Arc<L2Table>>> {
        if self.l1_entry(l1_index) == 0 {
            return Some(None);
        }
        self.tables.get(&l1_index).map(|cached| Some(cached.table.clone()))
    }

    /// The table for an L1 index, read where it is not in memory.
    pub(super) fn load(
        &mut self,
        file: &dyn BlockDevice,
        l1_index: u64,
    ) -> Result<Option<Arc<L2Table>>> {
        if let Some(cached) = self.cached(l1_index) {
            return Ok(cached);
        }
        let entry = self.l1_entry(l1_index);
        let (name, size) = (file.name(), file.size_bytes());
        let Some(offset) = l2_offset(&name, &self.geometry, l1_index, entry, size)? else {
            return Ok(None);
        };
        let table = Arc::new(L2Table::read(file, &self.geometry, offset)?);
        let cached = CachedTable { table: table.clone(), dirty: false, flushing: false };
        self.tables.insert(l1_index, cached);
        Ok(Some(table))
    }

    /// Makes sure that the L1 index has a table of its own: a new one where there is none, a copy
    /// where an internal snapshot shares it.
    pub(super) fn own_table(&mut self, file: &dyn BlockDevice, l1_index: u64) -> Result<()> {
        let existing = self.load(file, l1_index)?;
        let entry = self.l1_entry(l1_index);
        if existing.is_some() && entry & COPIED != 0 {
            return Ok(());
        }
        let cluster = self.refcounts.claim(file, 1)?.first;
        let offset = cluster << self.geometry.cluster_bits;
        let table = match existing {
            Some(shared) => {
                let old = shared.offset >> self.geometry.cluster_bits;
                self.refcounts.pending_frees.push(old);
                let mut copy = L2Table::clone(&shared);
                copy.offset = offset;
                copy
            }
            None => L2Table::empty(&self.geometry, offset),
        };
        let cached = CachedTable { table: Arc::new(table), dirty: true, flushing: false };
        self.tables.insert(l1_index, cached);
        self.set_l1_entry(l1_index, offset | COPIED);
        Ok(())
    }

    /// Changes entries of a table that [`own_table`](Self::own_table) has prepared.
    pub(super) fn change(
        &mut self,
        name: &str,
        l1_index: u64,
        change: impl FnOnce(&Geometry, &mut L2Table),
    ) -> Result<()> {
        let cached = self.tables.get_mut(&l1_index).ok_or_else(|| {
            BlockError::damaged(name, format!("the L2 table of L1 entry {l1_index} is missing"))
        })?;
        cached.dirty = true;
        change(&self.geometry, Arc::make_mut(&mut cached.table));
        Ok(())
    }

    /// The name of the central table that `range` of the file overlaps, if any. A guest's data
    /// there would destroy the image.
    pub(super) fn table_at(&self, range: ByteRange) -> Option<&'static str> {
        let cluster = self.geometry.cluster_bytes();
        let counts = &self.refcounts;
        [
            ("the header", ByteRange::new(0, cluster)),
            ("the L1 table", ByteRange::new(self.l1_offset, self.l1.len() as u64 * 8)),
            (
                "the refcount table",
                ByteRange::new(counts.table_offset, counts.table_clusters * cluster),
            ),
        ]
        .into_iter()
        .find(|(_, table)| !table.intersect(&range).is_empty())
        .map(|(what, _)| what)
    }

    /// The bytes of tables and refcount blocks in memory; each is a cluster.
    pub(super) fn memory_bytes(&self) -> u64 {
        ((self.tables.len() + self.refcounts.blocks.len()) as u64) << self.geometry.cluster_bits
    }

    /// Drops what is the same in the file.
    pub(super) fn drop_clean(&mut self) {
        self.tables.retain(|_, cached| cached.dirty || cached.flushing);
        self.refcounts.drop_clean();
    }
}
