//! Bringing changed tables to the file, in an order that is right at every moment.
//!
//! 1. All data is made durable, and with it the sector bitmaps of new blocks of a dynamic disk, which say that
//!    all sectors are there, and a footer right behind the last block where the file is longer than needed.
//! 2. Other bitmaps and block table entries now lead to durable data. An entry that arrives without its
//!    bitmap leads to a block whose bitmap is zero: all of it is the parent's, as before.
//! 3. What the file is too long by is cut off; a footer is where it then ends.

use super::footer::{FOOTER_BYTES, Kind};
use super::writer::{Changed, State, VhdWriter};
use crate::bytes::length;
use std::sync::atomic::Ordering;
use vmtide_block::Result;

/// The entries of a table in one sector, the unit in which the table is written.
const SECTOR_ENTRIES: u64 = 128;

/// The bytes for one place in the file.
type Patch = (u64, Vec<u8>);

impl VhdWriter {
    /// Makes everything durable that was written before the call.
    pub(super) fn flush_tables(&self) -> Result<()> {
        let _one_at_a_time = self.flush_lock.lock();
        self.check_sound()?;
        let state = self.state.read();
        self.flush_or_poison(&state)
    }

    /// The flush itself; the caller holds the flush lock.
    pub(super) fn flush_or_poison(&self, state: &State) -> Result<()> {
        let result = self.flush_steps(state);
        if result.is_err() {
            self.poisoned.store(true, Ordering::Release);
        }
        result
    }

    fn flush_steps(&self, state: &State) -> Result<()> {
        let (changed, patches) = {
            let mut waiting = self.changed.lock();
            let changed = std::mem::take(&mut *waiting);
            // Under the lock, so that no entry is written of which `changed` does not know.
            let patches = self.patches(state, &changed);
            (changed, patches)
        };
        self.write_whole_bitmaps(state, &changed)?;
        let end = self.footer_behind_blocks(state)?;
        self.file.flush()?;
        self.space.lock().cut_footers.clear();
        for (offset, bytes) in &patches {
            self.file.write_at(bytes, *offset)?;
        }
        if !patches.is_empty() {
            self.file.flush()?;
        }
        drop(changed);
        self.cut_off(end)
    }

    /// Writes the bitmaps of a dynamic disk's new blocks. Not when they are allocated: a write of 512 bytes
    /// takes the file for itself, and waits for all writes of data that are under way.
    fn write_whole_bitmaps(&self, state: &State, changed: &Changed) -> Result<()> {
        if self.layers.kind != Kind::Dynamic {
            return Ok(());
        }
        let whole = vec![0xff; length(self.shape().bitmap_bytes)];
        for block in &changed.entries {
            if let Some(start) = state.block(self.shape(), *block) {
                self.file.write_at(&whole, start)?;
            }
        }
        Ok(())
    }

    /// What the tables are now. Whoever changed them had written the data before.
    fn patches(&self, state: &State, changed: &Changed) -> Vec<Patch> {
        let mut patches: Vec<Patch> = Vec::new();
        for (block, bitmap) in &changed.bitmaps {
            if let Some(start) = state.block(self.shape(), *block) {
                patches.push((start, bitmap.to_bytes()));
            }
        }
        let Some(header) = &state.header else {
            return patches;
        };
        let mut next = 0;
        for block in &changed.entries {
            let first = block / SECTOR_ENTRIES * SECTOR_ENTRIES;
            if first < next {
                continue;
            }
            next = first + SECTOR_ENTRIES;
            let entries = state.entries.iter().skip(length(first)).take(length(SECTOR_ENTRIES));
            let bytes: Vec<u8> =
                entries.flat_map(|entry| entry.load(Ordering::Acquire).to_be_bytes()).collect();
            let offset = header.table_offset + first * 4;
            match patches.last_mut() {
                Some((at, last)) if *at + last.len() as u64 == offset => {
                    last.extend_from_slice(&bytes);
                }
                _ => patches.push((offset, bytes)),
            }
        }
        patches
    }

    /// Writes a footer right behind the last block, where there is none; answers with its place
    /// where the file is longer than that.
    fn footer_behind_blocks(&self, state: &State) -> Result<Option<u64>> {
        let mut space = self.space.lock();
        let end = space.end;
        if state.header.is_none() || !space.trailer_right || space.file_bytes <= end + FOOTER_BYTES
        {
            return Ok(None);
        }
        if !space.footers.contains(&end) {
            self.file.write_at(&state.footer.encode(), end)?;
            space.footers.push(end);
        }
        Ok(Some(end))
    }

    /// Cuts the file off behind the durable footer at `end`, where nothing was allocated since.
    fn cut_off(&self, end: Option<u64>) -> Result<()> {
        let mut space = self.space.lock();
        match end {
            Some(end) if space.end == end => {
                self.file.resize(end + FOOTER_BYTES)?;
                space.file_bytes = end + FOOTER_BYTES;
                let cut = space.footers.extract_if(.., |footer| *footer != end);
                space.cut_footers = cut.collect();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Puts right what a crash left of the footers, before the first change: the copy at the start
    /// is what the file has while the one at the end moves.
    pub(super) fn make_ready(&self) -> Result<()> {
        let _one_at_a_time = self.making_ready.lock();
        let state = self.state.read();
        let mut space = self.space.lock();
        if !space.copy_right {
            self.file.write_at(&state.footer.encode(), 0)?;
            self.file.flush()?;
            space.copy_right = true;
        }
        if !space.trailer_right {
            // Behind everything that is in the file: what it is only a check can say.
            let end = space.end;
            self.file.resize(end + FOOTER_BYTES)?;
            self.file.write_at(&state.footer.encode(), end)?;
            space.file_bytes = end + FOOTER_BYTES;
            space.footers = vec![end];
            space.trailer_right = true;
        }
        Ok(())
    }

    /// Writes changed footers: at the start, then at the end. The caller has the state for itself.
    pub(super) fn rewrite_footers(&self, state: &State) -> Result<()> {
        let bytes = state.footer.encode();
        let space = self.space.lock();
        if state.header.is_some() {
            self.file.write_at(&bytes, 0)?;
        }
        for footer in &space.footers {
            self.file.write_at(&bytes, *footer)?;
        }
        self.file.flush()
    }
}
