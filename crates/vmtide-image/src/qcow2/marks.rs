//! What the header and the bitmap directory must say before an image is changed.
//!
//! Autoclear features that we do not know are switched off, as the specification demands. Bitmaps
//! that record changes (flag `auto`) will miss ours: they are flagged `in_use`, which every reader
//! takes as "do not trust" and which keeps their clusters accounted for, unlike clearing the
//! bitmaps feature as a whole. Bitmaps that do not record stay as true as they were.

use super::bitmap::{flag, read_directory};
use super::header::{autoclear, field};
use super::writer::Qcow2Writer;
use std::sync::atomic::Ordering;
use vmtide_block::Result;

impl Qcow2Writer {
    /// Marks the image, durably, before its first change.
    pub(super) fn mark_changed(&self) -> Result<()> {
        let _one_at_a_time = self.marking.lock();
        if self.marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let unknown = self.header.autoclear & !autoclear::KNOWN;
        let mut keep = self.header.autoclear & autoclear::KNOWN;
        let mut changed = unknown != 0;
        if keep & autoclear::BITMAPS != 0 {
            match read_directory(&*self.file, &self.header) {
                Ok(entries) => {
                    for entry in entries.iter().filter(|entry| entry.info.recording) {
                        let flags = entry.flags | flag::IN_USE;
                        self.file.write_at(&flags.to_be_bytes(), entry.flags_offset)?;
                        changed = true;
                    }
                }
                // A directory that cannot be read cannot be flagged, either: none of it counts.
                Err(_) => {
                    keep &= !autoclear::BITMAPS;
                    changed = true;
                }
            }
        }
        if keep != self.header.autoclear {
            self.file.write_at(&keep.to_be_bytes(), field::AUTOCLEAR as u64)?;
        }
        if changed {
            self.file.flush()?;
        }
        self.marked.store(true, Ordering::Release);
        Ok(())
    }
}
