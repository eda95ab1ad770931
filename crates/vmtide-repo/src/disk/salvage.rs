//! Reading what is left of a damaged disk.
//!
//! For the day on which no sound copy exists: what can be verified is read, what cannot reads as
//! zeros, and every byte that is not the disk's is on a list. Nothing here is a substitute for a
//! restore, and nothing passes silently.

use super::{PackSet, PlacedRun, PointDisk, for_each_place};
use crate::context::RepoContext;
use crate::map::DiskMap;
use crate::point::DiskRecord;
use crate::{BLOCK_BYTES, Result};
use parking_lot::Mutex;
use std::collections::HashSet;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, RangeSet};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// The most damaged parts that are told one by one.
const MAX_TOLD: usize = 1000;

/// A disk of a restore point as far as it can be read. Shared by threads.
pub struct SalvagedDisk {
    disk: PointDisk,
    map: DiskMap,
    packs: PackSet,
    lost: Mutex<RangeSet>,
    /// What was wrong, so that it is told once and not for each read.
    told: Mutex<HashSet<String>>,
}

impl SalvagedDisk {
    pub(crate) fn open(
        context: &Arc<RepoContext>,
        name: String,
        record: &DiskRecord,
    ) -> Result<Self> {
        let map = || DiskMap::salvage(context, &record.map, record.size_bytes.div_ceil(BLOCK));
        Ok(Self {
            disk: PointDisk::with_map(context, name, record.size_bytes, map()?),
            map: map()?,
            packs: PackSet::new(Arc::clone(context)),
            lost: Mutex::default(),
            told: Mutex::default(),
        })
    }

    /// The bytes that could not be read so far and read as zeros instead.
    pub fn lost(&self) -> RangeSet {
        self.lost.lock().clone()
    }

    fn tell(&self, error: &BlockError) {
        let mut told = self.told.lock();
        if told.len() < MAX_TOLD && told.insert(error.to_string()) {
            tracing::warn!(%error, "passed over");
        } else {
            tracing::debug!(%error, "passed over");
        }
    }

    /// Reads a range that cannot be read as a whole: frame by frame.
    fn read_parts(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let wanted = ByteRange::new(offset, buffer.len() as u64);
        // What is no data reads as zeros; what is data is read over them.
        buffer.fill(0);
        let size_bytes = self.disk.size_bytes();
        let blocks = offset / BLOCK..wanted.end().div_ceil(BLOCK);
        for_each_place(&self.map, &self.packs, blocks, &mut |run| {
            for part in frames_of(&run, size_bytes)? {
                let part = part.intersect(&wanted);
                if part.length == 0 {
                    continue;
                }
                let index = |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX);
                let target = &mut buffer[index(part.offset)..index(part.end())];
                match self.disk.read_at(target, part.offset) {
                    Ok(()) => {}
                    Err(error) if is_lost(&error) => {
                        target.fill(0);
                        self.lost.lock().insert(part);
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(())
        })
    }
}

/// Whether the data is gone, and not the way to it.
fn is_lost(error: &BlockError) -> bool {
    match error {
        BlockError::Damaged { .. } => true,
        BlockError::Io { source, .. } => vmtide_block::files::is_media_error(source),
        _ => false,
    }
}

/// A run in parts that lie in one frame each; one part where it has no place.
fn frames_of(run: &PlacedRun, size_bytes: u64) -> Result<Vec<ByteRange>> {
    let Ok((pack, ordinal)) = &run.place else { return Ok(vec![run.bytes(size_bytes)]) };
    let mut parts = Vec::new();
    let mut done = 0;
    while done < run.count {
        let frame = pack.blocks_of(pack.frame_of(ordinal + done)?);
        let count = (frame.end - (ordinal + done)).min(run.count - done);
        let start = (run.first_block + u64::from(done)) * BLOCK;
        let end = (start + u64::from(count) * BLOCK).min(size_bytes);
        parts.push(ByteRange::from_bounds(start, end));
        done += count;
    }
    Ok(parts)
}

impl BlockDevice for SalvagedDisk {
    fn name(&self) -> String {
        self.disk.name()
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), BlockError> {
        match self.disk.read_at(buffer, offset) {
            Err(error) if is_lost(&error) => {
                self.tell(&error);
                Ok(self.read_parts(buffer, offset)?)
            }
            other => other,
        }
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, BlockError> {
        self.disk.extents(range)
    }
}
