//! A run: consecutive blocks of a disk and where their content is.

use crate::ObjectId;
use std::ops::Range;

/// Where the content of a run's blocks is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// All bytes are zero; nothing is stored.
    Zero,
    /// In a pack: the n-th block of the run is the pack's block `ordinal + n`.
    Data {
        /// The pack.
        pack: ObjectId,
        /// The ordinal of the run's first block in the pack.
        ordinal: u32,
    },
}

/// Consecutive blocks of a disk with one target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRun {
    /// The first block, counted in blocks from the start of the disk.
    pub first_block: u64,
    /// How many blocks, at least 1.
    pub count: u64,
    /// Where they are.
    pub target: Target,
}

impl MapRun {
    /// The block after the run.
    pub const fn end(&self) -> u64 {
        self.first_block.saturating_add(self.count)
    }

    /// A run of zeros.
    pub(crate) const fn zero(blocks: Range<u64>) -> Self {
        Self { first_block: blocks.start, count: blocks.end - blocks.start, target: Target::Zero }
    }

    /// The part of the run from block `from` to before `to`, which lie in it.
    pub(crate) fn slice(&self, from: u64, to: u64) -> Self {
        debug_assert!(self.first_block <= from && from < to && to <= self.end());
        let target = match self.target {
            Target::Zero => Target::Zero,
            Target::Data { pack, ordinal } => {
                let skipped = u32::try_from(from - self.first_block).unwrap_or(u32::MAX);
                // Every run's last ordinal was checked to fit when it was made or read.
                let ordinal = ordinal.saturating_add(skipped);
                Target::Data { pack, ordinal }
            }
        };
        Self { first_block: from, count: to - from, target }
    }

    /// The part of the run of `count` blocks from `first_block`, which lie in it.
    pub(crate) fn cut(&self, first_block: u64, count: u64) -> Self {
        self.slice(first_block, first_block + count)
    }

    /// Whether the run's blocks and ordinals are in bounds (format §7).
    pub(crate) const fn is_valid(&self) -> bool {
        let in_disk = self.count > 0
            && self.count <= super::MAX_BLOCKS
            && self.first_block <= super::MAX_BLOCKS - self.count;
        match self.target {
            Target::Zero => in_disk,
            Target::Data { ordinal, .. } => in_disk && self.count <= (1 << 32) - ordinal as u64,
        }
    }

    /// Lengthens the run by `next` where that continues it on the disk and in the pack.
    pub(crate) fn join(&mut self, next: &Self) -> bool {
        if self.end() != next.first_block {
            return false;
        }
        let continues = match (self.target, next.target) {
            (Target::Zero, Target::Zero) => true,
            (
                Target::Data { pack, ordinal },
                Target::Data { pack: next_pack, ordinal: next_ordinal },
            ) => pack == next_pack && u64::from(ordinal) + self.count == u64::from(next_ordinal),
            _ => false,
        };
        if continues {
            self.count += next.count;
        }
        continues
    }
}
