//! A disk made up of a sample, every block of it another.

use crate::BLOCK_BYTES;
use vmtide_block::{BlockDevice, ByteRange, Result};

/// A sample, repeated as often as the disk is long; the first bytes of every block hold its number,
/// so that no two chunks are equal and all compress as the sample does.
pub(super) struct SampleDisk<'a> {
    sample: &'a [u8],
    size_bytes: u64,
}

impl<'a> SampleDisk<'a> {
    /// A disk of `size_bytes`, of whole blocks of `sample`, of which there is at least one.
    pub(super) fn new(sample: &'a [u8], size_bytes: u64) -> Self {
        let whole = &sample[..sample.len() / BLOCK_BYTES * BLOCK_BYTES];
        let sample = if whole.is_empty() { &[7; BLOCK_BYTES] } else { whole };
        Self { sample, size_bytes: size_bytes / BLOCK_BYTES as u64 * BLOCK_BYTES as u64 }
    }

    /// The block of this number.
    pub(super) fn fill(&self, number: u64, block: &mut [u8]) {
        let blocks = (self.sample.len() / BLOCK_BYTES) as u64;
        #[allow(clippy::cast_possible_truncation, reason = "less than the sample's length")]
        let at = (number % blocks) as usize * BLOCK_BYTES;
        block.copy_from_slice(&self.sample[at..at + block.len()]);
        let length = block.len().min(8);
        block[..length].copy_from_slice(&(number + 1).to_le_bytes()[..length]);
    }
}

impl BlockDevice for SampleDisk<'_> {
    fn name(&self) -> String {
        "the benchmark's disk".into()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        let mut at = offset;
        let mut rest = buffer;
        let mut block = [0; BLOCK_BYTES];
        while !rest.is_empty() {
            #[allow(clippy::cast_possible_truncation, reason = "less than a block")]
            let skip = (at % BLOCK_BYTES as u64) as usize;
            let (now, later) = rest.split_at_mut(rest.len().min(BLOCK_BYTES - skip));
            let number = at / BLOCK_BYTES as u64;
            if now.len() == BLOCK_BYTES {
                self.fill(number, now);
            } else {
                self.fill(number, &mut block);
                now.copy_from_slice(&block[skip..skip + now.len()]);
            }
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }
}
