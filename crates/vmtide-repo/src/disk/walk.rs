//! A disk map, followed to where its blocks really are.

use super::{PackSet, Repairs, Traced};
use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::map::{DiskMap, MapRun, Target};
use crate::pack::Pack;
use crate::{BLOCK_BYTES, Location, ObjectId, RepoError, Result};
use std::collections::HashSet;
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
    map.for_each_run(blocks, &mut |run| place_run(packs, run, visit))
}

fn place_run(
    packs: &PackSet,
    run: MapRun,
    visit: &mut dyn FnMut(PlacedRun) -> Result<()>,
) -> Result<()> {
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
}

/// The bytes of a disk whose content cannot be had, as far as is known without reading it; where
/// `suspects` are named, only what they hold is looked at.
///
/// # Errors
/// As [`for_each_place`].
pub(crate) fn lost_ranges(
    map: &DiskMap,
    packs: &PackSet,
    size_bytes: u64,
    suspects: Option<&Suspects>,
) -> Result<RangeSet> {
    let mut lost = RangeSet::new();
    let blocks = size_bytes.div_ceil(BLOCK);
    let mut visit = |run: PlacedRun| {
        if run.is_lost() {
            lost.insert(run.bytes(size_bytes));
        }
        Ok(())
    };
    match suspects {
        Some(suspects) => for_each_suspect(map, packs, blocks, suspects, &mut visit)?,
        None => for_each_place(map, packs, 0..blocks, &mut visit)?,
    }
    Ok(lost)
}

/// The packs that maps may name and that may lead to damage: the others need not be opened to look
/// for it.
#[derive(Debug, Default)]
pub(crate) struct Suspects(HashSet<ObjectId>);

impl Suspects {
    /// Those on record, those that were healed or moved, and `more`.
    ///
    /// # Errors
    /// Those of the store.
    pub fn of(context: &RepoContext, repairs: &Repairs, more: &[ObjectId]) -> Result<Self> {
        let mut packs: HashSet<ObjectId> = more.iter().copied().collect();
        packs.extend(repairs.damaged.iter().map(|entry| entry.part.pack));
        packs.extend(repairs.healed.packs());
        context.store.list(ObjectKind::Forward.prefix(), &mut |entry| {
            let names = entry.name.strip_prefix(ObjectKind::Forward.prefix());
            let pack = names.and_then(|names| names.split('/').next()?.parse::<ObjectId>().ok());
            packs.extend(pack);
            Ok(())
        })?;
        Ok(Self(packs))
    }
}

/// As [`for_each_place`], for runs that `suspects` hold.
///
/// # Errors
/// As [`for_each_place`].
pub(crate) fn for_each_suspect(
    map: &DiskMap,
    packs: &PackSet,
    blocks: u64,
    suspects: &Suspects,
    visit: &mut dyn FnMut(PlacedRun) -> Result<()>,
) -> Result<()> {
    map.for_each_run(0..blocks, &mut |run| match run.target {
        Target::Data { pack, .. } if suspects.0.contains(&pack) => place_run(packs, run, visit),
        _ => Ok(()),
    })
}
