//! A disk map, followed to where its blocks really are.

use super::{PackSet, Traced};
use crate::map::{DiskMap, Target};
use crate::pack::Pack;
use crate::{BLOCK_BYTES, Location, RepoError, Result};
use std::ops::Range;
use std::sync::Arc;
use vmtide_block::{ByteRange, RangeSet};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Neighbouring blocks of a disk that hold data, and where they are.
pub(crate) struct PlacedRun {
    /// The first block on the disk.
    pub first_block: u64,
    /// How many.
    pub count: u32,
    /// Where the first block is, or would be.
    pub at: Location,
    /// The pack and the ordinal of the first block in it; or why there is no such place.
    pub place: Result<(Arc<Pack>, u32), RepoError>,
    /// Whether these blocks are on record as damaged.
    pub damaged: bool,
}

impl PlacedRun {
    /// Whether their content cannot be had, as far as is known.
    pub const fn is_lost(&self) -> bool {
        self.damaged || self.place.is_err()
    }

    /// The blocks as bytes of a disk of `size_bytes`.
    pub fn bytes(&self, size_bytes: u64) -> ByteRange {
        let end = (self.first_block + u64::from(self.count)) * BLOCK;
        ByteRange::from_bounds(self.first_block * BLOCK, end.min(size_bytes))
    }
}

/// Calls `visit` for all blocks that hold data, in order.
///
/// # Errors
/// Those of reading the map and of the store; those of `visit`. A place that is not there is no
/// error.
pub(crate) fn for_each_place(
    map: &DiskMap,
    packs: &PackSet,
    blocks: Range<u64>,
    visit: &mut dyn FnMut(PlacedRun) -> Result<()>,
) -> Result<()> {
    map.for_each_run(blocks, &mut |run| {
        let Target::Data { pack, ordinal } = run.target else { return Ok(()) };
        let mut done = 0u64;
        while done < run.count {
            let offset = u32::try_from(done).unwrap_or(u32::MAX);
            let left = u32::try_from(run.count - done).unwrap_or(u32::MAX);
            let at = Location { pack, ordinal: ordinal.saturating_add(offset) };
            let Traced { mut count, last, place } = packs.trace(at, left, true, &mut |_| {})?;
            let mut damaged = false;
            let place = place.and_then(|(pack, ordinal)| {
                let at = Location { pack: pack.id(), ordinal };
                let repairs = packs.repairs()?;
                damaged = repairs.damaged.covers(at);
                count = repairs.damaged.same_for(at, count);
                // A map that names blocks past the end of a pack is damaged.
                pack.frame_of(ordinal.saturating_add(count - 1))?;
                Ok((pack, ordinal))
            });
            if let Err(error) = &place
                && !error.is_damage()
            {
                return place.map(drop);
            }
            let first_block = run.first_block + done;
            visit(PlacedRun { first_block, count, at: last, place, damaged })?;
            done += u64::from(count);
        }
        Ok(())
    })
}

/// The bytes of a disk whose content cannot be had, as far as is known without reading it.
///
/// # Errors
/// As [`for_each_place`].
pub(crate) fn lost_ranges(map: &DiskMap, packs: &PackSet, size_bytes: u64) -> Result<RangeSet> {
    let mut lost = RangeSet::new();
    for_each_place(map, packs, 0..size_bytes.div_ceil(BLOCK), &mut |run| {
        if run.is_lost() {
            lost.insert(run.bytes(size_bytes));
        }
        Ok(())
    })?;
    Ok(lost)
}
