//! Reading a disk in order, with several reads on the way, and looking at the blocks while they come.
//!
//! A planner asks for extents and hands pieces to workers; each reads its piece, looks for zeros and, where
//! asked to, computes digests; the caller gets the pieces in the order of the disk. Memory is bounded by
//! the pieces on the way.

use crate::digests::{DIGEST_BLOCK_BYTES, Digest, ZERO_DIGEST, digest};
use crate::{BackendError, Result};
use std::ops::Deref;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, RangeSet, for_each_extent, is_zero,
};
use vmtide_memory_ffi::{Memory, Slot};

/// What is read at a time. Larger only takes memory, smaller costs a round trip each on a network.
pub const PIECE_BYTES: usize = 1 << 20;

/// The slots of a memory below which it is not used: half of them is for what is being read.
pub const MIN_SLOTS: usize = 4;

/// How much of a disk is asked about at once, so that the answers of a scattered one stay small.
const WINDOW_BYTES: u64 = 1 << 30;

/// Ranges up to this size are read without asking what they hold: asking costs as much.
const SMALL_BYTES: u64 = 1 << 20;

/// Reads on the way at a time. More than the daemon's one thread can take is of no use.
const WORKERS: usize = 3;

/// Pieces that wait for or after each worker.
const QUEUE: usize = 2;

/// Parts that are planned ahead.
const PLANNED: usize = 256;

/// What is to be read.
#[derive(Clone, Copy)]
pub enum Want<'a> {
    /// All of it, in whole digest blocks.
    Whole {
        /// Whether to compute digests.
        digests: bool,
    },
    /// These ranges.
    Ranges(&'a RangeSet),
}

/// What is known of one block of a piece.
#[derive(Clone, Copy, Debug)]
pub struct Note {
    /// Whether it is all zeros.
    pub is_zero: bool,
    /// Its digest; that of zeros where none was asked for.
    pub digest: Digest,
}

/// A part of the disk, in order.
pub enum Part<'a> {
    /// Reads as zeros.
    Zero(ByteRange),
    /// Holds data.
    Data {
        /// Where.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
        /// The slot of which they are the beginning, where they lie in one.
        slot: Option<&'a Arc<Slot>>,
        /// One note for every 64 KiB from `offset` on.
        notes: &'a [Note],
    },
}

enum Planned {
    Zero(ByteRange),
    Data(usize),
    Failed(BlockError),
}

/// A place to read to.
enum Buffer {
    Own(Vec<u8>),
    Shared(Slot),
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Shared(slot) => slot,
        }
    }
}

impl Buffer {
    /// The first `length` bytes of it, to be written to.
    fn first(&mut self, length: usize) -> &mut [u8] {
        match self {
            Self::Own(bytes) => {
                bytes.resize(length, 0);
                bytes
            }
            Self::Shared(slot) => {
                slot.set_length(length);
                slot
            }
        }
    }
}

/// Buffers that were used already.
type Spare = Mutex<Vec<Vec<u8>>>;

struct Piece {
    offset: u64,
    bytes: Buffer,
    notes: Vec<Note>,
}

/// Reads the disk and calls `take` with its parts, in order, on the caller's thread; what was read lies in `memory`
/// where there is one, of slots of [`PIECE_BYTES`].
///
/// # Errors
/// Those of the disk and of `take`; [`BlockError::Cancelled`].
pub fn read_disk(
    device: &dyn BlockDevice,
    want: Want<'_>,
    memory: Option<&Memory>,
    cancel: &CancelToken,
    take: &mut dyn FnMut(Part<'_>) -> Result<()>,
) -> Result<()> {
    let digests = matches!(want, Want::Whole { digests: true });
    let spare = Spare::default();
    std::thread::scope(|scope| {
        let (planned, plan) = sync_channel(PLANNED);
        let mut ranges = Vec::with_capacity(WORKERS);
        let mut pieces: Vec<Receiver<Result<Piece, BlockError>>> = Vec::with_capacity(WORKERS);
        for _ in 0..WORKERS {
            let (range_in, range_out) = sync_channel(QUEUE);
            let (piece_in, piece_out) = sync_channel(QUEUE);
            ranges.push(range_in);
            pieces.push(piece_out);
            scope.spawn(move || work(device, digests, &range_out, &piece_in));
        }
        let spare = &spare;
        scope.spawn(move || {
            let mut planner = Planner { device, cancel, memory, spare, planned, ranges, turn: 0 };
            if let Err(Some(error)) = planner.plan(want) {
                // Nobody listens any more where this cannot be told.
                let _ = planner.planned.send(Planned::Failed(error));
            }
        });
        for next in plan {
            match next {
                Planned::Failed(error) => return Err(error.into()),
                Planned::Zero(range) => take(Part::Zero(range))?,
                Planned::Data(worker) => {
                    let piece = pieces.get(worker).and_then(|pieces| pieces.recv().ok());
                    let piece = piece.ok_or_else(|| {
                        BackendError::Refused("a thread that reads the disk has ended".into())
                    })??;
                    give(piece, spare, take)?;
                }
            }
        }
        cancel.check()?;
        Ok(())
    })
}

/// Hands a piece to `take`, and keeps its buffer.
fn give(piece: Piece, spare: &Spare, take: &mut dyn FnMut(Part<'_>) -> Result<()>) -> Result<()> {
    let Piece { offset, bytes, notes } = piece;
    match bytes {
        Buffer::Own(bytes) => {
            take(Part::Data { offset, bytes: &bytes, slot: None, notes: &notes })?;
            if let Ok(mut spare) = spare.lock() {
                spare.push(bytes);
            }
            Ok(())
        }
        Buffer::Shared(slot) => {
            let slot = Arc::new(slot);
            take(Part::Data { offset, bytes: &slot, slot: Some(&slot), notes: &notes })
        }
    }
}

fn work(
    device: &dyn BlockDevice,
    digests: bool,
    ranges: &Receiver<(ByteRange, Buffer)>,
    pieces: &SyncSender<Result<Piece, BlockError>>,
) {
    for (range, mut bytes) in ranges {
        // At most PIECE_BYTES, by the planner.
        let length = usize::try_from(range.length).unwrap_or(0);
        let piece = device.read_at(bytes.first(length), range.offset).map(|()| {
            let block = usize::try_from(DIGEST_BLOCK_BYTES).unwrap_or(1 << 16);
            let notes = bytes.chunks(block).map(|block| note(block, digests)).collect();
            Piece { offset: range.offset, bytes, notes }
        });
        if pieces.send(piece).is_err() {
            return;
        }
    }
}

fn note(block: &[u8], digests: bool) -> Note {
    let is_zero = is_zero(block);
    let digest = if digests && !is_zero { digest(block) } else { ZERO_DIGEST };
    Note { is_zero, digest }
}

struct Planner<'a> {
    device: &'a dyn BlockDevice,
    cancel: &'a CancelToken,
    memory: Option<&'a Memory>,
    spare: &'a Spare,
    planned: SyncSender<Planned>,
    ranges: Vec<SyncSender<(ByteRange, Buffer)>>,
    turn: usize,
}

/// The end of planning: with an error, or because nobody listens any more.
type Stop = Option<BlockError>;

impl Planner<'_> {
    fn plan(&mut self, want: Want<'_>) -> Result<(), Stop> {
        match want {
            Want::Whole { .. } => {
                let whole = ByteRange::new(0, self.device.size_bytes());
                self.plan_range(whole, DIGEST_BLOCK_BYTES)
            }
            Want::Ranges(ranges) => ranges.iter().try_for_each(|range| {
                if range.length <= SMALL_BYTES {
                    self.data(range)
                } else {
                    self.plan_range(range, 1)
                }
            }),
        }
    }

    /// Plans a range, which begins at a multiple of `unit`: what holds data in units, the rest as zeros.
    fn plan_range(&mut self, range: ByteRange, unit: u64) -> Result<(), Stop> {
        let mut at = range.offset;
        while at < range.end() {
            self.cancel.check()?;
            let end = (at - at % WINDOW_BYTES).saturating_add(WINDOW_BYTES).min(range.end());
            let window = ByteRange::from_bounds(at, end);
            let mut data = RangeSet::new();
            for_each_extent(self.device, window, self.cancel, |extent| {
                if !extent.kind.reads_as_zero() {
                    data.insert(extent.range.align_outward(unit, end));
                }
                Ok(())
            })?;
            for found in data.iter() {
                self.zero(ByteRange::from_bounds(at, found.offset))?;
                self.data(found)?;
                at = found.end();
            }
            self.zero(ByteRange::from_bounds(at, end))?;
            at = end;
        }
        Ok(())
    }

    fn zero(&self, range: ByteRange) -> Result<(), Stop> {
        if range.is_empty() {
            return Ok(());
        }
        self.planned.send(Planned::Zero(range)).map_err(|_| None)
    }

    /// A buffer for a piece, in the order of the pieces: the one that is sent next has one then, and those that come
    /// after it can wait.
    fn buffer(&self) -> Buffer {
        match self.memory {
            Some(memory) => Buffer::Shared(memory.wait()),
            None => {
                let spare = self.spare.lock().ok().and_then(|mut spare| spare.pop());
                Buffer::Own(spare.unwrap_or_default())
            }
        }
    }

    fn data(&mut self, range: ByteRange) -> Result<(), Stop> {
        let mut at = range.offset;
        while at < range.end() {
            let end = at.saturating_add(PIECE_BYTES as u64).min(range.end());
            let piece = ByteRange::from_bounds(at, end);
            let buffer = self.buffer();
            let worker = self.turn % self.ranges.len().max(1);
            self.turn = self.turn.wrapping_add(1);
            let queue = self.ranges.get(worker).ok_or(None)?;
            queue.send((piece, buffer)).map_err(|_| None)?;
            self.planned.send(Planned::Data(worker)).map_err(|_| None)?;
            at = piece.end();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::MemoryDevice;

    fn collect(device: &dyn BlockDevice, want: Want<'_>) -> (Vec<u8>, RangeSet) {
        let mut bytes = vec![0u8; usize::try_from(device.size_bytes()).unwrap()];
        let mut seen = RangeSet::new();
        let mut at = 0;
        read_disk(device, want, None, &CancelToken::new(), &mut |part| {
            let range = match part {
                Part::Zero(range) => range,
                Part::Data { offset, bytes: found, notes, .. } => {
                    assert_eq!(notes.len(), found.len().div_ceil(1 << 16));
                    let start = usize::try_from(offset).unwrap();
                    bytes[start..start + found.len()].copy_from_slice(found);
                    ByteRange::new(offset, found.len() as u64)
                }
            };
            assert!(range.offset >= at, "{range} comes after {at}");
            at = range.end();
            seen.insert(range);
            Ok(())
        })
        .unwrap();
        (bytes, seen)
    }

    #[test]
    fn a_disk_comes_whole_and_in_order() {
        let bytes: Vec<u8> = (0..(5usize << 20) + 513)
            .map(|at| u8::try_from((at >> 16 ^ at) & 0xff).unwrap())
            .collect();
        let device = MemoryDevice::from_bytes(bytes.clone());
        for digests in [false, true] {
            let (found, seen) = collect(&device, Want::Whole { digests });
            assert!(found == bytes);
            assert_eq!(seen.total_bytes(), bytes.len() as u64);
        }
        let ranges = RangeSet::from(vec![ByteRange::new(7, 3), ByteRange::new(1 << 20, 3 << 20)]);
        let (_, seen) = collect(&device, Want::Ranges(&ranges));
        assert_eq!(seen, ranges);
    }

    #[test]
    fn an_error_of_the_taker_ends_everything() {
        let device = MemoryDevice::from_bytes(vec![1; 64 << 20]);
        let mut calls = 0;
        let want = Want::Whole { digests: true };
        let outcome = read_disk(&device, want, None, &CancelToken::new(), &mut |_| {
            calls += 1;
            Err(BackendError::Gone)
        });
        assert!(matches!(outcome, Err(BackendError::Gone)));
        assert_eq!(calls, 1);
    }
}
