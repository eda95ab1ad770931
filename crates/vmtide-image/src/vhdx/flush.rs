//! Bringing changed tables to the file, in an order that is right at every moment.
//!
//! 1. All data, and what an earlier flush wrote in place, is made durable.
//! 2. The changed pages go into the log, in one entry where they fit, and are made durable there:
//!    from here on whoever opens the file sees them.
//! 3. They are written in place.
//! 4. Nothing durable refers to freed space any more: once no reader is under way it is punched
//!    out of the file and may be used again.
//!
//! Where the pages need several entries, a crash may come between two of them. So sector bitmaps
//! go first: their bits count only once the block table says so. Then the table goes from its end
//! to its beginning: a chunk's bitmap entry stands behind the entries of its blocks (MS-VHDX 2.5)
//! and must be there before a block can be partially present.

use super::pages::Page;
use super::writer::VhdxWriter;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmtide_block::{BlockDevice, ByteRange, Result};

impl VhdxWriter {
    /// Makes everything durable that was written before the call.
    pub(super) fn flush_metadata(&self) -> Result<()> {
        let _one_at_a_time = self.flush_lock.lock();
        self.check_sound()?;
        let result = self.flush_steps();
        if result.is_err() {
            self.poisoned.store(true, Ordering::Release);
        }
        result
    }

    fn flush_steps(&self) -> Result<()> {
        let frees = self.commit_changes()?;
        if frees.is_empty() {
            return Ok(());
        }
        // Reads and writes that began with an old mapping end before its space is reused.
        drop(self.gate.write());
        self.release(&frees)
    }

    /// Makes all changes durable and answers with what nothing durable refers to any more. The
    /// caller holds the flush lock.
    pub(super) fn commit_changes(&self) -> Result<Vec<ByteRange>> {
        let (mut pages, frees, bat) = {
            let mut metadata = self.metadata.write();
            (metadata.pages.take_dirty(), std::mem::take(&mut metadata.frees), metadata.bat)
        };
        if pages.is_empty() {
            self.file.flush()?;
        } else {
            put_in_order(&mut pages, bat);
            self.journal.lock().commit(&*self.file, &pages, self.file.size_bytes())?;
            self.metadata.write().pages.written(&pages);
        }
        Ok(frees)
    }

    /// Frees parts of the file that nothing durable refers to and nobody uses any more.
    pub(super) fn release(&self, frees: &[ByteRange]) -> Result<()> {
        let size_bytes = self.file.size_bytes();
        for part in frees {
            let end = part.end().min(size_bytes);
            self.file.write_zeroes(ByteRange::from_bounds(part.offset.min(end), end))?;
        }
        if let Some(space) = self.space.lock().as_mut() {
            for part in frees {
                space.release(part.offset, part.length);
            }
        }
        Ok(())
    }

    /// Empties the log and cuts the file. The caller has flushed.
    pub(super) fn close_log(&self) -> Result<()> {
        let was_used = self.journal.lock().empty(&*self.file)?;
        if !was_used && !self.marked.load(Ordering::Acquire) {
            return Ok(());
        }
        // Only now: while the log is live it says how long the file must at least be.
        if let Some(space) = self.space.lock().as_mut() {
            let end = space.cut();
            if end < self.file.size_bytes() {
                self.file.resize(end)?;
                self.file.flush()?;
            }
        }
        Ok(())
    }
}

/// Bitmaps first, then the block table from the end to the beginning.
fn put_in_order(pages: &mut [(u64, Arc<Page>)], bat: ByteRange) {
    pages.sort_unstable_by_key(|(offset, _)| (bat.contains(*offset), u64::MAX - offset));
}
