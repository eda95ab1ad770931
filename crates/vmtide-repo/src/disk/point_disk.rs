//! One disk of a restore point as a block device. Every byte is verified before anybody gets it.

use super::PackSet;
use super::frames::{Frames, Kept, Plan};
use crate::context::RepoContext;
use crate::map::{DiskMap, Target};
use crate::pack::{FrameDecoder, Pack};
use crate::point::DiskRecord;
use crate::{BLOCK_BYTES, Location, RepoError, Result};
use parking_lot::Mutex;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, Extent, ExtentKind, StorageOrder, push_extent,
};

pub(super) const BLOCK: u64 = BLOCK_BYTES as u64;

/// The most stored bytes fetched in one read: enough for one request to a distant store to pay. Frames that do not compress are
/// a little longer than 2 MiB: two of them fit. With 4 MiB each was asked for alone, which cost a server up to a tenth more time.
pub(crate) const FETCH_BYTES: u64 = 5 << 20;

/// The most extents in one answer.
const MAX_EXTENTS: usize = 1 << 16;

/// A disk of a restore point, readable at any place by many threads at once.
pub struct PointDisk {
    pub(super) name: String,
    pub(super) size_bytes: u64,
    pub(super) map: DiskMap,
    pub(super) packs: PackSet,
    frames: Frames,
    scratch: Mutex<Vec<Scratch>>,
}

/// A reader's working memory, reused between reads.
struct Scratch {
    decoder: FrameDecoder,
    stored: Vec<u8>,
}

impl PointDisk {
    pub(crate) fn open(
        context: &Arc<RepoContext>,
        name: String,
        record: &DiskRecord,
    ) -> Result<Self> {
        let blocks = record.size_bytes.div_ceil(BLOCK);
        let map = DiskMap::open(context, &record.map, blocks)?;
        Ok(Self::with_map(context, name, record.size_bytes, map))
    }

    /// A disk with a map that is open already.
    pub(super) fn with_map(
        context: &Arc<RepoContext>,
        name: String,
        size_bytes: u64,
        map: DiskMap,
    ) -> Self {
        Self {
            name,
            size_bytes,
            map,
            packs: PackSet::new(Arc::clone(context)),
            frames: Frames::new(),
            scratch: Mutex::default(),
        }
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let scratch = self.scratch.lock().pop();
        let mut scratch = match scratch {
            Some(scratch) => scratch,
            None => Scratch { decoder: FrameDecoder::new()?, stored: Vec::new() },
        };
        let end = offset + buffer.len() as u64;
        let blocks = offset / BLOCK..end.div_ceil(BLOCK);
        let outcome = self.map.for_each_run(blocks, &mut |run| {
            let start = run.first_block * BLOCK;
            let run_end = start + run.count * BLOCK;
            let from = start.max(offset);
            let part = &mut buffer[index(from - offset)..index(run_end.min(end) - offset)];
            match run.target {
                Target::Zero => {
                    part.fill(0);
                    Ok(())
                }
                Target::Data { pack, ordinal } => {
                    self.read_blocks(Location { pack, ordinal }, from - start, part, &mut scratch)
                }
            }
        });
        self.scratch.lock().push(scratch);
        outcome
    }

    /// Fills `part` from the bytes that begin `skip` bytes into the block at `location` and go on
    /// through the blocks after it.
    fn read_blocks(
        &self,
        location: Location,
        skip: u64,
        part: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let mut at = skip;
        let end = skip + part.len() as u64;
        while at < end {
            let within = narrow(at / BLOCK)?;
            let wanted = narrow(end.div_ceil(BLOCK))? - within;
            let place = Location {
                pack: location.pack,
                ordinal: location.ordinal.checked_add(within).ok_or_else(too_far)?,
            };
            let (pack, ordinal, count) = self.packs.resolve(place, wanted)?;
            let run_end = ((u64::from(within) + u64::from(count)) * BLOCK).min(end);
            let piece = &mut part[index(at - skip)..index(run_end - skip)];
            match self.read_run(&pack, ordinal, at % BLOCK, piece, scratch) {
                Ok(()) => at = run_end,
                // A prune may have moved it since it was opened; else it is as it is.
                Err(error) => match self.packs.look_again(pack.id()) {
                    Ok(true) => {}
                    Ok(false) | Err(_) => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// As [`read_blocks`](Self::read_blocks), all in one pack.
    fn read_run(
        &self,
        pack: &Pack,
        ordinal: u32,
        skip: u64,
        part: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        // Positions are counted in the pack's content: all blocks one after the other.
        let start = u64::from(ordinal) * BLOCK + skip;
        let mut rest = Rest { start, part };
        let mut frame = pack.frame_of(ordinal)?;
        let last = pack.frame_of(narrow((rest.end() - 1) / BLOCK)?)?;
        while frame <= last {
            let wanted = rest.in_frame(pack, frame);
            match self.frames.plan(pack, frame, &wanted) {
                Plan::Kept(kept) => {
                    kept.copy(&wanted, rest.take(wanted.len()));
                    frame += 1;
                }
                Plan::Part(part, spent_bytes) => {
                    match self.read_part(pack, frame, part, spent_bytes, scratch) {
                        Some(kept) => kept.copy(&wanted, rest.take(wanted.len())),
                        None => {
                            self.read_frames(pack, frame..=frame, &mut rest, scratch)?;
                        }
                    }
                    frame += 1;
                }
                Plan::Whole => {
                    // The last one may be here already, or be read in part.
                    let is_whole = |number: usize| {
                        let wanted = rest.in_frame(pack, number);
                        matches!(self.frames.plan(pack, number, &wanted), Plan::Whole)
                    };
                    let until = if frame < last && !is_whole(last) { last - 1 } else { last };
                    frame = self.read_frames(pack, frame..=until, &mut rest, scratch)?;
                }
            }
        }
        Ok(())
    }

    /// Reads a part of a frame, which is kept then; `None` where that cannot be and all of it is to be read.
    fn read_part(
        &self,
        pack: &Pack,
        number: usize,
        part: Range<usize>,
        spent_bytes: usize,
        scratch: &mut Scratch,
    ) -> Option<Arc<Kept>> {
        let mut memory = self.frames.memory(part.len());
        let Scratch { decoder, stored } = scratch;
        let is_read = pack.read_part(number, &part, stored, &mut memory[..part.len()], decoder);
        is_read.then(|| self.frames.keep(pack, number, part, memory, spent_bytes))
    }

    /// Reads frames, neighbours together and none in part, and answers with the one after those it read.
    fn read_frames(
        &self,
        pack: &Pack,
        frames: RangeInclusive<usize>,
        rest: &mut Rest<'_>,
        scratch: &mut Scratch,
    ) -> Result<usize> {
        let batch = *frames.start()..batch_from(pack, *frames.start(), *frames.end());
        let mut stored = pack.read_stored(batch.clone(), &mut scratch.stored)?;
        for number in batch.clone() {
            let length = pack.content_length(number);
            let wanted = rest.in_frame(pack, number);
            let target = rest.take(wanted.len());
            let stored_length = pack.frames()[number].stored_length as usize;
            let (this, after) = std::mem::take(&mut stored).split_at_mut(stored_length);
            stored = after;
            if wanted.len() == length {
                pack.decode(number, this, target, &mut scratch.decoder)?;
            } else {
                let mut memory = self.frames.memory(length);
                pack.decode(number, this, &mut memory[..length], &mut scratch.decoder)?;
                target.copy_from_slice(&memory[wanted]);
                self.frames.keep(pack, number, 0..length, memory, 0);
            }
        }
        Ok(batch.end)
    }
}

/// What is still to be filled of a read, from the byte `start` of a pack's content on.
struct Rest<'a> {
    start: u64,
    part: &'a mut [u8],
}

impl<'a> Rest<'a> {
    const fn end(&self) -> u64 {
        self.start + self.part.len() as u64
    }

    /// The bytes of a frame's content that are wanted; the frame has some.
    fn in_frame(&self, pack: &Pack, number: usize) -> Range<usize> {
        let blocks = pack.blocks_of(number);
        let begin = u64::from(blocks.start) * BLOCK;
        let end = u64::from(blocks.end) * BLOCK;
        index(self.start.max(begin) - begin)..index(self.end().min(end) - begin)
    }

    /// The room for the next `length` bytes.
    fn take(&mut self, length: usize) -> &'a mut [u8] {
        let (now, later) = std::mem::take(&mut self.part).split_at_mut(length);
        self.part = later;
        self.start += length as u64;
        now
    }
}

/// The end of the frames from `first` on that are worth fetching together.
fn batch_from(pack: &Pack, first: usize, last: usize) -> usize {
    let frames = &pack.frames()[first..=last];
    let bytes = frames.iter().scan(0, |sum, frame| {
        *sum += u64::from(frame.stored_length);
        Some(*sum)
    });
    first + bytes.take_while(|sum| *sum <= FETCH_BYTES).count().max(1)
}

/// A length inside a buffer, which is a `usize` already.
#[allow(clippy::cast_possible_truncation, reason = "bounded by the length of a slice")]
pub(super) const fn index(bytes: u64) -> usize {
    bytes as usize
}

pub(super) fn narrow(blocks: u64) -> Result<u32> {
    u32::try_from(blocks).map_err(|_| too_far())
}

pub(super) fn too_far() -> RepoError {
    RepoError::damaged("disk map", "a run goes past the last block a pack can have")
}

impl BlockDevice for PointDisk {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), BlockError> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        Ok(self.read(buffer, offset)?)
    }

    fn storage_order(&self) -> Option<&dyn StorageOrder> {
        Some(self)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, BlockError> {
        self.check_range(range)?;
        let blocks = range.offset / BLOCK..range.end().div_ceil(BLOCK);
        let mut extents = Vec::new();
        // The visitor cannot stop the walk, but it can stop collecting: the answer is a prefix.
        self.map.for_each_run(blocks, &mut |run| {
            let bytes =
                ByteRange::new(run.first_block * BLOCK, run.count * BLOCK).intersect(&range);
            let kind = match run.target {
                Target::Zero => ExtentKind::Zero,
                Target::Data { .. } => ExtentKind::Data,
            };
            if extents.len() < MAX_EXTENTS {
                push_extent(&mut extents, Extent { range: bytes, kind });
            }
            Ok(())
        })?;
        Ok(extents)
    }
}
