//! Finding out what of a file is in use, before it is changed for the first time.
//!
//! The block table says it all, so it is read once from end to end. That is also when an image is
//! caught whose blocks overlap each other or a table: writing to it would destroy one of the two.

use super::allocate::Space;
use super::bat::{
    BITMAP_BLOCK_BYTES, BatEntry, BatIndex, BitmapBlockState, ENTRY_BYTES, EntryOf, PayloadState,
};
use super::header::MIB;
use super::write::is_present;
use super::writer::VhdxWriter;
use crate::bytes::{le_u64, length};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result, is_zero};

/// What the table's entries are looked at for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    /// Blocks with data.
    Data,
    /// Places that blocks without data keep.
    Anchors,
}

impl VhdxWriter {
    /// What of the file is in use.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] where two things use one place, or a block lies outside the file.
    pub(super) fn find_space(&self) -> Result<Space> {
        let mut space = Space::new(self.name.clone(), self.file.size_bytes())?;
        let header_section = ByteRange::new(0, MIB);
        let log = self.journal.lock().log();
        let regions = self.metadata.read().regions.clone();
        let regions = regions.regions.iter().map(|region| region.range);
        for part in [header_section, log].into_iter().chain(regions) {
            if !space.mark(part.offset, part.length)? {
                return Err(BlockError::damaged(
                    &self.name,
                    format!(
                        "the region of {} bytes at {:#x} lies outside the file of {} bytes or on \
                         another one",
                        part.length,
                        part.offset,
                        self.file.size_bytes()
                    ),
                ));
            }
        }
        if self.scan(&mut space, Pass::Data)? {
            self.scan(&mut space, Pass::Anchors)?;
        }
        Ok(space)
    }

    /// Goes through the table once; whether there are places that blocks without data keep.
    fn scan(&self, space: &mut Space, pass: Pass) -> Result<bool> {
        let bat = self.metadata.read().bat;
        let entries = self.present_geometry().entry_count();
        let mut anchors = false;
        let mut piece = vec![0; length((entries * ENTRY_BYTES).min(MIB))];
        let mut first = 0;
        while first < entries {
            let count = (entries - first).min(MIB / ENTRY_BYTES);
            let bytes = &mut piece[..length(count * ENTRY_BYTES)];
            self.file.read_at(bytes, bat.offset + first * ENTRY_BYTES)?;
            let bytes = if is_zero(bytes) { &[] } else { &*bytes };
            for (index, entry) in (first..).zip(bytes.chunks_exact(8)) {
                let entry = BatEntry(le_u64(entry, 0));
                if entry != BatEntry::default() {
                    anchors |= self.scan_entry(space, pass, BatIndex(index), entry)?;
                }
            }
            first += count;
        }
        Ok(anchors)
    }

    /// Marks what one entry says; whether it is an anchor.
    fn scan_entry(
        &self,
        space: &mut Space,
        pass: Pass,
        index: BatIndex,
        entry: BatEntry,
    ) -> Result<bool> {
        let (bytes, has_data) = match self.geometry.entry_at(index) {
            EntryOf::Payload(_) => (self.geometry.block_bytes(), is_present(entry)),
            // Without a parent nobody reads sector bitmaps; a place that is there stays.
            EntryOf::Bitmap(_) => {
                let is_present = entry.bitmap_state() == Some(BitmapBlockState::Present);
                (BITMAP_BLOCK_BYTES, is_present && self.parent.is_some())
            }
        };
        match pass {
            Pass::Data if has_data => {
                if entry.payload_state() == Some(PayloadState::PartiallyPresent)
                    && self.parent.is_none()
                {
                    return Err(self.bad_entry(index, entry, "partially present without a parent"));
                }
                self.check_in_file(index, entry)?;
                if !space.mark(entry.offset(), bytes)? {
                    return Err(self.bad_entry(
                        index,
                        entry,
                        "its place is outside the file or used by something else",
                    ));
                }
            }
            Pass::Anchors
                if !has_data && entry.offset() != 0 && !space.mark(entry.offset(), bytes)? =>
            {
                space.distrust_anchors();
            }
            _ => {}
        }
        Ok(!has_data && entry.offset() != 0)
    }
}
