//! Changing the size of the disk.
//!
//! Growing: what is to be there is made durable first (a larger block table, zeros behind the old
//! end, the blocks of a fixed image), then the size. Shrinking: the size first, then what is no
//! longer there is given back. So a crash on the way leaves a disk of one size or the other.

use super::bat::{
    BITMAP_BLOCK_BYTES, BatEntry, BatIndex, ENTRY_BYTES, EntryOf, Geometry, PayloadState,
};
use super::header::MIB;
use super::log_entry::LOG_SECTOR_BYTES;
use super::metadata::MAX_DISK_BYTES;
use super::pages::{PAGE_BYTES, Page};
use super::region::{BAT_REGION, REGION_TABLE_OFFSETS, RegionTable};
use super::write::is_present;
use super::writer::{METADATA_BYTES, VhdxWriter};
use crate::bytes::{le_u64, length, put};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result, WritableBlockDevice, is_zero};

/// The most blocks that get their place at once: changes are written to the file now and then, so
/// that those of a huge disk do not fill the memory.
const BATCH_BLOCKS: u64 = 1 << 16;

impl VhdxWriter {
    /// Makes the disk `size_bytes` large; a new part reads as zeros.
    pub(super) fn change_size(&self, size_bytes: u64) -> Result<()> {
        let _one_at_a_time = self.resizing.lock();
        self.check_sound()?;
        let old_bytes = self.size_bytes();
        if size_bytes == old_bytes {
            return Ok(());
        }
        if size_bytes > MAX_DISK_BYTES || !size_bytes.is_multiple_of(self.geometry.sector_bytes()) {
            return Err(BlockError::unsupported(
                &self.name,
                format!(
                    "the disk cannot have {size_bytes} bytes: it must be a multiple of its sector \
                     size {} and at most {MAX_DISK_BYTES}",
                    self.geometry.sector_bytes()
                ),
            ));
        }
        self.begin_change()?;
        if size_bytes > old_bytes {
            self.grow(old_bytes, size_bytes)
        } else {
            self.shrink(old_bytes, size_bytes)
        }
    }

    fn geometry_of(&self, disk_size_bytes: u64) -> Geometry {
        Geometry { disk_size_bytes, ..self.geometry }
    }

    fn grow(&self, old_bytes: u64, size_bytes: u64) -> Result<()> {
        let (old, new) = (self.geometry_of(old_bytes), self.geometry_of(size_bytes));
        if new.table_bytes() > self.metadata.read().bat.length {
            self.move_table(new.table_bytes().next_multiple_of(MIB))?;
        }
        self.clear_entries(&old, &new, false)?;
        if self.keeps_blocks {
            self.allocate_all(old.block_count()..new.block_count())?;
        }
        let zeroed = {
            let _no_flush = self.flush_lock.lock();
            let _nobody_else = self.gate.write();
            self.size_bytes.store(size_bytes, Ordering::Release);
            self.zero_new(old_bytes, size_bytes)
        };
        let result = zeroed.and_then(|()| self.flush()).and_then(|()| self.store_size(size_bytes));
        if result.is_err() {
            self.size_bytes.store(old_bytes, Ordering::Release);
        }
        result
    }

    /// Makes what would show in a new part zero: the rest of the last block, and what a longer parent
    /// has there. The caller holds the flush lock and the gate.
    fn zero_new(&self, old_bytes: u64, size_bytes: u64) -> Result<()> {
        let block_bytes = self.geometry.block_bytes();
        let below = self.parent.as_ref().map_or(0, |parent| parent.size_bytes());
        let end = below.max(old_bytes.next_multiple_of(block_bytes)).min(size_bytes);
        let mut at = old_bytes;
        while at < end {
            // The table of a long parent would fill the memory.
            if self.metadata.read().pages.memory_bytes() > METADATA_BYTES / 2 {
                let result = self.check_sound().and_then(|()| {
                    let frees = self.commit_changes()?;
                    self.release(&frees)
                });
                if result.is_err() {
                    self.poisoned.store(true, Ordering::Release);
                    return result;
                }
                self.metadata.write().pages.drop_clean();
            }
            let next = (at - at % block_bytes)
                .saturating_add(BATCH_BLOCKS.saturating_mul(block_bytes))
                .min(end);
            self.zero_range(ByteRange::from_bounds(at, next))?;
            at = next;
        }
        Ok(())
    }

    fn shrink(&self, old_bytes: u64, size_bytes: u64) -> Result<()> {
        {
            let _nobody_else = self.gate.write();
            self.size_bytes.store(size_bytes, Ordering::Release);
        }
        self.store_size(size_bytes)?;
        let (old, new) = (self.geometry_of(old_bytes), self.geometry_of(size_bytes));
        self.clear_entries(&new, &old, true)?;
        self.flush()
    }

    /// Changes the size in the metadata, durably.
    fn store_size(&self, size_bytes: u64) -> Result<()> {
        {
            let mut metadata = self.metadata.write();
            // The item is eight bytes on no particular boundary.
            for (at, byte) in (self.size_item..).zip(size_bytes.to_le_bytes()) {
                metadata.pages.change(&*self.file, at - at % PAGE_BYTES, |page| {
                    put(page, length(at % PAGE_BYTES), &[byte]);
                })?;
            }
        }
        self.flush()
    }

    /// Makes the table entries zero that a disk as large as `more` has over one as large as `less`.
    /// Where the disk used them until now, what they refer to is `freed`; what else may stand
    /// there is not trusted.
    fn clear_entries(&self, less: &Geometry, more: &Geometry, freed: bool) -> Result<()> {
        // In the last chunk of a differencing disk there are entries of blocks behind its end.
        let mut at = self.payload_index(less.block_count()).0;
        let end = more.entry_count();
        while at < end {
            let count = (end - at).min(MIB / ENTRY_BYTES);
            // The file has these entries as they are: all changes to them were flushed, and
            // nobody changes them outside of the disk.
            let bat = self.metadata.read().bat.offset;
            let mut bytes = vec![0; length(count * ENTRY_BYTES)];
            self.file.read_at(&mut bytes, bat + at * ENTRY_BYTES)?;
            for (index, entry) in (at..).zip(bytes.chunks_exact(8)) {
                let (index, entry) = (BatIndex(index), BatEntry(le_u64(entry, 0)));
                let stays = match self.geometry.entry_at(index) {
                    EntryOf::Bitmap(chunk) => chunk.0 < less.chunk_count(),
                    EntryOf::Payload(_) => false,
                };
                if entry != BatEntry::default() && !stays {
                    self.clear_entry(index, entry, freed)?;
                }
            }
            at += count;
            if self.metadata.read().pages.memory_bytes() > METADATA_BYTES {
                self.flush()?;
                self.metadata.write().pages.drop_clean();
            }
        }
        Ok(())
    }

    fn clear_entry(&self, index: BatIndex, entry: BatEntry, freed: bool) -> Result<()> {
        let (bytes, is_own, is_bitmap) = match self.geometry.entry_at(index) {
            EntryOf::Payload(_) => {
                let is_own = is_present(entry) || self.anchors_trusted();
                (self.geometry.block_bytes(), is_own, false)
            }
            EntryOf::Bitmap(_) => (BITMAP_BLOCK_BYTES, self.parent.is_some(), true),
        };
        let mut metadata = self.metadata.write();
        self.set_entry(&mut metadata, index, BatEntry::default())?;
        if freed && is_own && entry.offset() != 0 {
            let place = ByteRange::new(entry.offset(), bytes);
            if is_bitmap {
                metadata.pages.forget(place);
            }
            metadata.frees.push(place);
        }
        Ok(())
    }

    /// Gives new blocks of a fixed image, which are behind the end of the disk, their place.
    fn allocate_all(&self, blocks: Range<u64>) -> Result<()> {
        let block_bytes = self.geometry.block_bytes();
        let mut first = blocks.start;
        while first < blocks.end {
            let claim = self.claim((blocks.end - first).min(BATCH_BLOCKS), block_bytes)?;
            if !claim.fresh {
                let range = ByteRange::new(claim.offset, claim.count * block_bytes);
                self.file.write_zeroes(range)?;
            }
            let mut metadata = self.metadata.write();
            for number in 0..claim.count {
                let at = claim.offset + number * block_bytes;
                let entry = BatEntry::payload(PayloadState::FullyPresent, at);
                self.set_entry(&mut metadata, self.payload_index(first + number), entry)?;
            }
            drop(metadata);
            first += claim.count;
            if self.metadata.read().pages.memory_bytes() > METADATA_BYTES {
                self.flush()?;
                self.metadata.write().pages.drop_clean();
            }
        }
        Ok(())
    }

    /// Moves the block table to a place of `bytes` bytes. The new table is durable before the
    /// region tables, in one log entry, lead to it.
    fn move_table(&self, bytes: u64) -> Result<()> {
        let _no_flush = self.flush_lock.lock();
        let result = self.move_table_alone(bytes);
        if result.is_err() {
            self.poisoned.store(true, Ordering::Release);
        }
        result
    }

    fn move_table_alone(&self, bytes: u64) -> Result<()> {
        self.check_sound()?;
        let _nobody_else = self.gate.write();
        let frees = self.commit_changes()?;
        let old = self.metadata.read().bat;
        let claim = self.claim(1, bytes)?;
        let new = ByteRange::new(claim.offset, bytes);
        if !claim.fresh {
            self.file.write_zeroes(new)?;
        }
        let mut piece = vec![0; length(MIB)];
        for at in (0..old.length).step_by(length(MIB)) {
            let piece = &mut piece[..length((old.length - at).min(MIB))];
            self.file.read_at(piece, old.offset + at)?;
            if !is_zero(piece) {
                self.file.write_at(piece, new.offset + at)?;
            }
        }
        let mut metadata = self.metadata.write();
        let mut regions = metadata.regions.clone();
        for region in &mut regions.regions {
            if region.id == BAT_REGION {
                region.range = new;
            }
        }
        let pages = self.region_pages(&regions)?;
        self.journal.lock().commit(&*self.file, &pages, self.file.size_bytes())?;
        metadata.pages.forget(old);
        metadata.bat = new;
        metadata.regions = regions;
        drop(metadata);
        self.release(&frees)?;
        self.release(&[old])
    }

    /// The pages of both copies of the region table that change.
    fn region_pages(&self, regions: &RegionTable) -> Result<Vec<(u64, Arc<Page>)>> {
        let bytes = regions.encode();
        let mut pages = Vec::new();
        for copy in REGION_TABLE_OFFSETS {
            for (number, page) in (0..).zip(bytes.as_chunks::<LOG_SECTOR_BYTES>().0) {
                let offset = copy + number * PAGE_BYTES;
                let mut present = [0; LOG_SECTOR_BYTES];
                self.file.read_at(&mut present, offset)?;
                if present != *page {
                    pages.push((offset, Arc::new(*page)));
                }
            }
        }
        Ok(pages)
    }
}
