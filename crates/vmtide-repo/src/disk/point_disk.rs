//! One disk of a restore point as a block device. Every byte is verified before anybody gets it.

use super::PackSet;
use crate::cache::ByteCache;
use crate::context::RepoContext;
use crate::map::{DiskMap, Target};
use crate::pack::{FrameDecoder, Pack};
use crate::point::DiskRecord;
use crate::{BLOCK_BYTES, Location, ObjectId, RepoError, Result};
use parking_lot::Mutex;
use std::sync::Arc;
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, Extent, ExtentKind, StorageOrder, push_extent,
};

pub(super) const BLOCK: u64 = BLOCK_BYTES as u64;

/// The decompressed frames that are kept for one disk, in bytes. A frame at the edge of a read is
/// wanted again by the next one; random readers live from it.
const FRAME_CACHE_BYTES: usize = 32 << 20;

/// The most stored bytes fetched in one read: enough for one request to a distant store to pay.
pub(crate) const FETCH_BYTES: u64 = 4 << 20;

/// The most extents in one answer.
const MAX_EXTENTS: usize = 1 << 16;

/// A disk of a restore point, readable at any place by many threads at once.
pub struct PointDisk {
    pub(super) name: String,
    pub(super) size_bytes: u64,
    pub(super) map: DiskMap,
    pub(super) packs: PackSet,
    frames: ByteCache<(ObjectId, usize), Vec<u8>>,
    scratch: Mutex<Vec<Scratch>>,
}

/// A reader's working memory, reused between reads.
struct Scratch {
    decoder: FrameDecoder,
    stored: Vec<u8>,
    /// The memory of a frame that left the cache, for the next one.
    spare: Vec<u8>,
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
            frames: ByteCache::new(FRAME_CACHE_BYTES),
            scratch: Mutex::default(),
        }
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let scratch = self.scratch.lock().pop();
        let mut scratch = match scratch {
            Some(scratch) => scratch,
            None => {
                Scratch { decoder: FrameDecoder::new()?, stored: Vec::new(), spare: Vec::new() }
            }
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
        let end = start + part.len() as u64;
        let last = narrow((end - 1) / BLOCK)?;
        let mut frame = pack.frame_of(ordinal)?;
        let last_frame = pack.frame_of(last)?;
        while frame <= last_frame {
            let batch = batch_from(pack, frame, last_frame);
            let cached = self.frames.get(&(pack.id(), frame));
            let mut stored: &mut [u8] = &mut [];
            if cached.is_none() {
                stored = pack.read_stored(frame..batch, &mut scratch.stored)?;
            }
            let batch = if cached.is_some() { frame + 1 } else { batch };
            for number in frame..batch {
                let entry = &pack.frames()[number];
                let blocks = pack.blocks_of(number);
                let content_start = u64::from(blocks.start) * BLOCK;
                let content_end = u64::from(blocks.end) * BLOCK;
                let (from, to) = (start.max(content_start), end.min(content_end));
                let target = &mut part[index(from - start)..index(to - start)];
                let wanted = index(from - content_start)..index(to - content_start);
                if let Some(content) = &cached {
                    target.copy_from_slice(&content[wanted]);
                    continue;
                }
                let rest = std::mem::take(&mut stored);
                let (this, after) = rest.split_at_mut(entry.stored_length as usize);
                stored = after;
                if from == content_start && to == content_end {
                    pack.decode(number, this, target, &mut scratch.decoder)?;
                } else {
                    let mut content = std::mem::take(&mut scratch.spare);
                    content.resize(pack.content_length(number), 0);
                    pack.decode(number, this, &mut content, &mut scratch.decoder)?;
                    target.copy_from_slice(&content[wanted]);
                    let bytes = content.len();
                    let evicted = self.frames.put((pack.id(), number), Arc::new(content), bytes);
                    scratch.spare = evicted.and_then(Arc::into_inner).unwrap_or_default();
                }
            }
            frame = batch;
        }
        Ok(())
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
