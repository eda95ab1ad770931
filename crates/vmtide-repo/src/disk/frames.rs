//! The frames of a disk that were read lately, whole or in part, and the memory for the next ones.
//!
//! Whoever reads 4 KiB here and there wants little of each frame, and whoever reads on wants all of it. It is not known who reads,
//! so a part is read first, and the whole frame as soon as a reader goes on where the part ended, or when parts of it that were read
//! one after the other would have paid for all of it: then no reader has spent more than twice what would have been best.

use crate::ObjectId;
use crate::cache::ByteCache;
use crate::pack::Pack;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;

/// The decompressed frames that are kept for one disk, in bytes of memory. A frame at the edge of a read is
/// wanted again by the next one; random readers live from it.
const KEPT_BYTES: usize = 32 << 20;

/// The memory that waits for the next frames, in bytes. To take fresh memory from the system and give it back costs as much
/// as to decompress.
const SPARE_BYTES: usize = 8 << 20;

/// Smaller memory is left to the allocator.
const MIN_SPARE_BYTES: usize = 64 << 10;

/// Verified bytes of one frame.
pub(super) struct Kept {
    /// Begins with the bytes; may be longer.
    memory: Vec<u8>,
    /// Which bytes of the frame's content they are.
    part: Range<usize>,
    /// The bytes that were read of the frame so far, in parts.
    spent_bytes: usize,
}

impl Kept {
    /// Copies the bytes `wanted` of the frame's content, all of which are here.
    pub(super) fn copy(&self, wanted: &Range<usize>, out: &mut [u8]) {
        let start = self.part.start;
        out.copy_from_slice(&self.memory[wanted.start - start..wanted.end - start]);
    }

    fn has(&self, wanted: &Range<usize>) -> bool {
        self.part.start <= wanted.start && wanted.end <= self.part.end
    }
}

/// What to do for some bytes of a frame.
pub(super) enum Plan {
    /// Nothing: they are here.
    Kept(Arc<Kept>),
    /// Read this part of it. So many bytes of it were read in parts before.
    Part(Range<usize>, usize),
    /// Read all of it.
    Whole,
}

/// Shared by threads.
pub(super) struct Frames {
    kept: ByteCache<(ObjectId, usize), Kept>,
    spare: Mutex<Vec<Vec<u8>>>,
}

impl Frames {
    pub(super) fn new() -> Self {
        Self { kept: ByteCache::new(KEPT_BYTES), spare: Mutex::default() }
    }

    /// What to do for the bytes `wanted` of a frame's content.
    pub(super) fn plan(&self, pack: &Pack, number: usize, wanted: &Range<usize>) -> Plan {
        let known = self.kept.get(&(pack.id(), number));
        if let Some(kept) = known.as_ref().filter(|kept| kept.has(wanted)) {
            return Plan::Kept(Arc::clone(kept));
        }
        let Some(part) = pack.part_for(number, wanted) else { return Plan::Whole };
        let length = pack.content_length(number);
        let spent_bytes = match &known {
            Some(kept) if (kept.part.start..=kept.part.end).contains(&wanted.start) => length,
            Some(kept) => kept.spent_bytes,
            None if wanted.start == 0 && self.has_read_through(pack, number) => length,
            None => 0,
        };
        if spent_bytes + part.len() >= length { Plan::Whole } else { Plan::Part(part, spent_bytes) }
    }

    /// Whether the frame before this one is here whole, as it is for who reads on.
    fn has_read_through(&self, pack: &Pack, number: usize) -> bool {
        let before = number.checked_sub(1).and_then(|before| self.kept.get(&(pack.id(), before)));
        before.is_some_and(|kept| kept.part.len() == pack.content_length(number - 1))
    }

    /// Memory for `length` bytes or more. What it holds means nothing.
    pub(super) fn memory(&self, length: usize) -> Vec<u8> {
        // Few lengths, so that what one frame had fits the next.
        let length = length.next_multiple_of((length.next_power_of_two() / 8).max(1));
        let mut spare = self.spare.lock();
        let fitting = spare.iter().position(|memory| memory.len() == length);
        let found = fitting.map(|at| spare.swap_remove(at));
        drop(spare);
        found.unwrap_or_else(|| vec![0; length])
    }

    /// Keeps the bytes `part` of a frame's content, which `memory` begins with.
    pub(super) fn keep(
        &self,
        pack: &Pack,
        number: usize,
        part: Range<usize>,
        memory: Vec<u8>,
        spent_bytes: usize,
    ) -> Arc<Kept> {
        let (bytes, spent_bytes) = (memory.len(), spent_bytes + part.len());
        let kept = Arc::new(Kept { memory, part, spent_bytes });
        let left = self.kept.put((pack.id(), number), Arc::clone(&kept), bytes);
        // What somebody still copies from is let go of by them.
        left.into_iter().filter_map(Arc::into_inner).for_each(|kept| self.reuse(kept.memory));
        kept
    }

    /// Keeps memory for the next frames, and lets go of what has waited longest.
    fn reuse(&self, memory: Vec<u8>) {
        if memory.len() < MIN_SPARE_BYTES {
            return;
        }
        let mut spare = self.spare.lock();
        spare.push(memory);
        let mut sum: usize = spare.iter().map(Vec::len).sum();
        let superfluous = spare.iter().take_while(|memory| {
            let is_too_much = sum > SPARE_BYTES;
            sum -= memory.len();
            is_too_much
        });
        let count = superfluous.count();
        spare.drain(..count);
    }
}
