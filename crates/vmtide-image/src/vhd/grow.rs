//! Growing the disk.

use super::check::fixed_regions;
use super::create::check_size;
use super::footer::{FOOTER_BYTES, Kind};
use super::header::{ABSENT, Header};
use super::writer::{BITMAP_BYTES, MAX_ENTRIES, State, VhdWriter};
use crate::bytes::length;
use std::sync::atomic::{AtomicU32, Ordering};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result};

impl VhdWriter {
    /// Makes the disk `size_bytes` large; the new part reads as zeros.
    ///
    /// First the table gets its entries (at a new place, if it has no room), then what would show
    /// in the new part is zeroed, then the footers get the new size. Each step is durable before
    /// the next, so a crash leaves the old size or the new one.
    pub(super) fn grow(&self, size_bytes: u64) -> Result<()> {
        let old_bytes = self.size_bytes();
        let refuse =
            |detail: &str| Err(BlockError::unsupported(&self.layers.name, detail.to_owned()));
        if size_bytes == old_bytes {
            return Ok(());
        }
        if size_bytes < old_bytes {
            return refuse("cannot be made smaller; copy it to a new image of the size wanted");
        }
        if self.layers.kind == Kind::Fixed {
            return refuse(
                "is a fixed VHD, whose only footer would have to move, which a crash could lose; \
                 copy it to a new image of the size wanted",
            );
        }
        check_size(&self.layers.name, size_bytes)?;
        self.check_entries(size_bytes)?;
        let _no_flush = self.flush_lock.lock();
        let mut state = self.state.write();
        // Another thread may have changed it.
        let old_bytes = self.size_bytes();
        if size_bytes <= old_bytes {
            return if size_bytes == old_bytes { Ok(()) } else { refuse("has just grown") };
        }
        self.flush_or_poison(&state)?;
        let result = self.grow_steps(&mut state, old_bytes, size_bytes);
        if result.is_err() {
            // What of it is in the file is not known: nothing more is written, and the disk reads
            // as it did.
            self.poisoned.store(true, Ordering::Release);
            self.size_bytes.store(old_bytes, Ordering::Release);
            state.footer.set_size(old_bytes);
        }
        result
    }

    fn grow_steps(&self, state: &mut State, old_bytes: u64, size_bytes: u64) -> Result<()> {
        self.grow_table(state, size_bytes)?;
        let below = self.layers.parent.as_ref().map_or(0, |parent| parent.size_bytes());
        let block_end = old_bytes.next_multiple_of(self.shape().block_bytes);
        let end = below.max(block_end).min(size_bytes);
        // What is written past the end of the disk is not seen until the footers say so.
        self.size_bytes.store(size_bytes, Ordering::Release);
        let mut at = old_bytes;
        while at < end {
            let blocks = (BITMAP_BYTES / 2 / self.shape().bitmap_bytes.max(1)).max(1);
            let batch_bytes = blocks.saturating_mul(self.shape().block_bytes);
            let next = end.min(at.saturating_add(batch_bytes));
            self.zero_range(state, ByteRange::from_bounds(at, next))?;
            // The sector bitmaps of all blocks of a long parent would fill the memory.
            if self.held_bitmap_bytes() > BITMAP_BYTES / 2 {
                self.flush_or_poison(state)?;
                self.drop_bitmaps();
            }
            at = next;
        }
        self.flush_or_poison(state)?;
        state.footer.set_size(size_bytes);
        self.rewrite_footers(state)
    }

    /// Succeeds where a disk of this size has no more blocks than are written.
    fn check_entries(&self, size_bytes: u64) -> Result<()> {
        let block_bytes = self.shape().block_bytes;
        let needed = size_bytes.div_ceil(block_bytes);
        if needed <= MAX_ENTRIES {
            return Ok(());
        }
        Err(BlockError::unsupported(
            &self.layers.name,
            format!(
                "a disk of {size_bytes} bytes needs {needed} blocks of {block_bytes}; images of at \
                 most {MAX_ENTRIES} blocks are written"
            ),
        ))
    }

    /// Whether the table has room for `needed` entries where it is. The header says for how many
    /// there is, but nothing keeps a file from having a block there.
    fn has_room(&self, state: &State, header: &Header, needed: u64) -> bool {
        let from = header.table_offset + state.entries.len() as u64 * 4;
        let to = header.table_offset + needed * 4;
        let space = self.space.lock();
        let shape = self.shape();
        let block = |entry: &AtomicU32| shape.start(entry.load(Ordering::Acquire));
        let is_hit = |start: u64, end: u64| start < to && from < end;
        needed <= u64::from(header.table_entries)
            && to <= space.end
            && !space.footers.iter().any(|footer| is_hit(*footer, footer + FOOTER_BYTES))
            && !fixed_regions(header, 0, space.file_bytes)
                .iter()
                .any(|(_, start, end)| is_hit(*start, *end))
            && !state
                .entries
                .iter()
                .filter_map(block)
                .any(|start| is_hit(start, start + shape.stored_bytes()))
    }

    /// Gives the table the entries that a disk of this size needs.
    fn grow_table(&self, state: &mut State, size_bytes: u64) -> Result<()> {
        let needed = size_bytes.div_ceil(self.shape().block_bytes);
        let Some(header) = state.header.clone() else {
            return Ok(());
        };
        let present = state.entries.len() as u64;
        if needed <= present {
            return Ok(());
        }
        if self.has_room(state, &header, needed) {
            // The room is there; what is in it was never an entry of the disk.
            let unused = vec![0xff; length((needed - present) * 4)];
            self.file.write_at(&unused, header.table_offset + present * 4)?;
            self.file.flush()?;
        } else {
            state.header = Some(self.move_table(state, &header, needed)?);
        }
        state.entries.resize_with(length(needed), || AtomicU32::new(ABSENT));
        Ok(())
    }

    /// Writes a larger table behind the blocks and lets the header lead to it.
    fn move_table(&self, state: &State, header: &Header, needed: u64) -> Result<Header> {
        let mut bytes: Vec<u8> = Vec::with_capacity(length(needed * 4 + FOOTER_BYTES));
        for entry in &state.entries {
            bytes.extend_from_slice(&entry.load(Ordering::Acquire).to_be_bytes());
        }
        bytes.resize(length((needed * 4).next_multiple_of(FOOTER_BYTES)), 0xff);
        let offset = {
            let mut space = self.space.lock();
            let offset = space.end;
            self.reserve(state, &mut space, offset + bytes.len() as u64)?;
            offset
        };
        self.file.write_at(&bytes, offset)?;
        self.file.flush()?;
        let mut moved = header.clone();
        moved.table_offset = offset;
        moved.table_entries = u32::try_from(needed).unwrap_or(u32::MAX);
        // All that changes is in the header's first sector, which is written as a whole or not.
        let bytes = moved.encode();
        let sector = bytes.get(..length(FOOTER_BYTES)).unwrap_or_default();
        self.file.write_at(sector, moved.offset)?;
        self.file.flush()?;
        Ok(moved)
    }
}
