//! Making ranges zero: blocks are given back, and only what cannot be is written.

use super::bat::{BatEntry, PayloadState};
use super::mapping::Place;
use super::write::{Source, is_present};
use super::writer::VhdxWriter;
use vmtide_block::{BlockDevice, ByteRange, Result};

impl VhdxWriter {
    /// Makes `range` read as zeros; the caller has checked it and shares the gate.
    pub(super) fn zero_range(&self, range: ByteRange) -> Result<()> {
        let block_bytes = self.geometry.block_bytes();
        let mut at = range.offset;
        while at < range.end() {
            let run = self.run(at, range.end() - at)?;
            if matches!(run.place, Place::Zero | Place::Absent) {
                at += run.length;
                continue;
            }
            let start = at - at % block_bytes;
            let end = start.saturating_add(block_bytes).min(range.end());
            // A last block that the disk ends in counts as whole: there is nothing after the end.
            let block_end = start.saturating_add(block_bytes).min(self.size_bytes());
            let piece = ByteRange::from_bounds(at, end);
            if !self.reads_as_zero(piece)? {
                if at == start && end == block_end && !self.keeps_blocks {
                    self.zero_block(at / block_bytes)?;
                } else {
                    self.zero_part(piece)?;
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Gives a whole block back. The state is "zero" and never "unmapped" or "not present": every
    /// reader must see zeros, and a child must not look through to its parent (MS-VHDX 2.5.1.1).
    fn zero_block(&self, block: u64) -> Result<()> {
        let _hold = self.hold(block..block + 1);
        let index = self.payload_index(block);
        let entry = self.entry(index)?;
        let mut metadata = self.metadata.write();
        self.set_entry(&mut metadata, index, BatEntry::payload(PayloadState::Zero, 0))?;
        if is_present(entry) {
            metadata.frees.push(ByteRange::new(entry.offset(), self.geometry.block_bytes()));
        }
        Ok(())
    }

    /// Writes zeros over what does not read as zeros.
    fn zero_part(&self, range: ByteRange) -> Result<()> {
        let mut at = range.offset;
        while at < range.end() {
            let run = self.run(at, range.end() - at)?;
            if !matches!(run.place, Place::Zero | Place::Absent) {
                self.write_source(Source::Zeros(run.length), at)?;
            }
            at += run.length;
        }
        Ok(())
    }
}
