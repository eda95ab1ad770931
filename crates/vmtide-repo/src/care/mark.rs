//! What the restore points need, chunk by chunk.

use crate::condemned::Condemned;
use crate::context::RepoContext;
use crate::disk::{Forward, PackSet, Passed, Place};
use crate::envelope::ObjectKind;
use crate::map::{DiskMap, Target};
use crate::pack::Pack;
use crate::point::RestorePoint;
use crate::{BLOCK_BYTES, Location, ObjectId, RepoError, Result};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use vmtide_block::CancelToken;

/// How many forwards are followed in a row, as readers do.
const MAX_DEPTH: usize = crate::disk::MAX_FORWARDS;

/// Chunks of one pack by their number, one bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ChunkBits(Vec<u64>);

impl ChunkBits {
    fn insert_range(&mut self, chunks: Range<usize>) {
        for number in chunks {
            let word = number / 64;
            if word >= self.0.len() {
                self.0.resize(word + 1, 0);
            }
            self.0[word] |= 1 << (number % 64);
        }
    }

    pub(super) fn contains(&self, number: usize) -> bool {
        let word = self.0.get(number / 64).copied().unwrap_or(0);
        word >> (number % 64) & 1 == 1
    }

    pub(super) fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// Everything that is alive: one bit per chunk, so some 2 MiB per TiB of unique data. The size of a
/// chunk does not matter, its number in the pack does.
#[derive(Default)]
pub(super) struct Marks {
    /// The live chunks of each pack, where they are now.
    pub packs: HashMap<ObjectId, ChunkBits>,
    /// The map segments in use.
    pub maps: HashSet<ObjectId>,
    /// The forwards in use.
    pub forwards: HashSet<ObjectId>,
    /// The most forwards passed on the way to a pack.
    pub depth: HashMap<ObjectId, usize>,
    /// Packs that cannot be read, and whose content was healed. They stay all the same: that a
    /// damaged place is not needed any more is never concluded from what healed it.
    pub damaged: HashSet<ObjectId>,
    /// The restore points that this is of.
    pub points: HashSet<ObjectId>,
    /// Maps that were looked at: points share them.
    seen: HashSet<(Vec<ObjectId>, u64)>,
}

/// Follows restore points to what they need.
pub(super) struct Marker<'a> {
    context: &'a Arc<RepoContext>,
    /// Opened for this mark, so that nothing is taken for there that went before.
    packs: PackSet,
    condemned: &'a Condemned,
    cancel: &'a CancelToken,
}

impl<'a> Marker<'a> {
    /// A marker that knows what was condemned when it began.
    pub(super) fn new(
        context: &'a Arc<RepoContext>,
        condemned: &'a Condemned,
        cancel: &'a CancelToken,
    ) -> Self {
        Self { context, packs: PackSet::new(Arc::clone(context)), condemned, cancel }
    }

    /// Marks what `points` need. Anything that cannot be read is an error: guessing would remove
    /// what it names.
    pub(super) fn add_points(&self, marks: &mut Marks, points: &[RestorePoint]) -> Result<()> {
        for point in points {
            if !marks.points.insert(point.id) {
                continue;
            }
            for disk in &point.disks {
                self.cancel.check()?;
                marks.maps.extend(&disk.map);
                if marks.seen.insert((disk.map.clone(), disk.size_bytes)) {
                    self.add_map(marks, &disk.map, disk.size_bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Marks the forwards of packs that are condemned because their chunks were moved, and what
    /// they lead to: the packs may go at any time. What such a forward leads to may be gone, and
    /// then the pack stays.
    pub(super) fn add_moved(&self, marks: &mut Marks) -> Result<()> {
        for (pack, forwards) in self.condemned.moved() {
            for id in forwards {
                self.add_forward(marks, pack, *id)?;
            }
        }
        Ok(())
    }

    /// Marks one forward and what it leads to.
    pub(super) fn add_forward(
        &self,
        marks: &mut Marks,
        pack: ObjectId,
        id: ObjectId,
    ) -> Result<()> {
        let forward = match Forward::open(self.context, pack, id) {
            Ok(Some(forward)) => forward,
            Ok(None) => return Ok(()),
            Err(error) if error.is_damage() => {
                tracing::warn!(%error, "a forward is passed over; its pack stays");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        marks.forwards.insert(id);
        for (_, count, place) in forward.moves() {
            match self.add_run(marks, place, count) {
                Err(error) if error.is_damage() => {
                    tracing::debug!(%error, "a forward leads to what is gone");
                }
                other => other?,
            }
        }
        Ok(())
    }

    fn add_map(&self, marks: &mut Marks, map: &[ObjectId], size_bytes: u64) -> Result<()> {
        let blocks = size_bytes.div_ceil(BLOCK_BYTES as u64);
        DiskMap::open(self.context, map, blocks)?.for_each_run(0..blocks, &mut |run| {
            let Target::Data { pack, ordinal } = run.target else { return Ok(()) };
            let count = u32::try_from(run.count).map_err(|_| {
                RepoError::damaged("disk map", "a run is longer than a pack can be")
            })?;
            self.add_run(marks, Location { pack, ordinal }, count)
        })
    }

    /// Marks the chunks of blocks from `place` on, and what they were healed by.
    fn add_run(&self, marks: &mut Marks, place: Location, count: u32) -> Result<()> {
        let repairs = self.packs.repairs()?;
        if repairs.healed.is_empty() {
            return self.add_stored(marks, place, count);
        }
        let mut done = 0;
        while done < count {
            let at = Location { ordinal: place.ordinal.saturating_add(done), ..place };
            let mut was_healed = false;
            let traced = self.packs.trace(at, count - done, true, &mut |passed| {
                was_healed |= matches!(passed, Passed::Healed(_));
            })?;
            done += traced.count;
            if !was_healed {
                self.add_stored(marks, at, traced.count)?;
                continue;
            }
            let (pack, ordinal) = traced.place?;
            self.add_stored(marks, Location { pack: pack.id(), ordinal }, traced.count)?;
            match self.add_stored(marks, at, traced.count) {
                Err(error) if error.is_damage() => {
                    let damaged = self.packs.trace(at, traced.count, false, &mut |_| {})?;
                    marks.damaged.insert(damaged.last.pack);
                }
                other => other?,
            }
        }
        Ok(())
    }

    /// Marks the chunks of blocks from `place` on.
    fn add_stored(&self, marks: &mut Marks, place: Location, count: u32) -> Result<()> {
        let mut done = 0;
        while done < count {
            let ordinal = place.ordinal.saturating_add(done);
            done += self.follow(marks, Location { ordinal, ..place }, count - done, 0)?;
        }
        Ok(())
    }

    /// Marks the chunks of blocks from `at` on; answers with how many blocks.
    fn follow(&self, marks: &mut Marks, at: Location, count: u32, depth: usize) -> Result<u32> {
        let forwards = match self.packs.place(at.pack)? {
            Place::Pack(pack) => {
                mark_chunks(marks, &pack, at.ordinal, count, depth)?;
                return Ok(count);
            }
            Place::Moved(forwards) if depth < MAX_DEPTH => forwards,
            Place::Moved(_) => return Err(moved_too_often(at.pack)),
        };
        // Of several forwards the first that leads to what stays is enough; where none does, all
        // that lead anywhere are kept.
        for (id, next, run) in forwards.over(at.ordinal, count) {
            if !self.condemned.has_forward(id) && self.stays(next, depth + 1)? {
                marks.forwards.insert(id);
                return self.follow(marks, next, run, depth + 1);
            }
        }
        let mut least = None;
        let mut failed = None;
        for (id, next, run) in forwards.over(at.ordinal, count) {
            match self.follow(marks, next, run, depth + 1) {
                Ok(run) => {
                    marks.forwards.insert(id);
                    least = Some(least.map_or(run, |least: u32| least.min(run)));
                }
                Err(error) if error.is_damage() => failed = Some(error),
                Err(error) => return Err(error),
            }
        }
        least.ok_or_else(|| {
            failed.unwrap_or_else(|| {
                let detail = format!("no forward says where block {} went", at.ordinal);
                RepoError::damaged(ObjectKind::Pack.object_name(at.pack), detail)
            })
        })
    }

    /// Whether a place leads to a pack that is there, with nothing on the way condemned.
    fn stays(&self, at: Location, depth: usize) -> Result<bool> {
        match self.packs.place(at.pack) {
            Ok(Place::Pack(_)) => Ok(!self.condemned.has_pack(at.pack)),
            Ok(Place::Moved(forwards)) if depth < MAX_DEPTH => {
                for (id, next, _) in forwards.over(at.ordinal, 1) {
                    if !self.condemned.has_forward(id) && self.stays(next, depth + 1)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            Ok(Place::Moved(_)) => Ok(false),
            Err(error) if error.is_damage() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether all chunks of a pack that are marked can be read without it: through those of its
    /// forwards that `allowed` names, from packs that are there, nothing of it condemned. Other
    /// forwards of the pack may go at any time.
    pub(super) fn is_replaced(
        &self,
        pack: &Pack,
        marked: &ChunkBits,
        allowed: &[ObjectId],
    ) -> Result<bool> {
        let forwards = match crate::disk::Forwards::open(self.context, pack.id()) {
            Ok(forwards) => forwards,
            Err(error) if error.is_damage() => return Ok(false),
            Err(error) => return Err(error),
        };
        for (number, (ordinal, chunk)) in pack.chunks().enumerate() {
            if !marked.contains(number) {
                continue;
            }
            let (mut at, end) = (ordinal, ordinal.saturating_add(u32::from(chunk.blocks)));
            while at < end {
                let mut next = None;
                for (id, target, run) in forwards.over(at, end - at) {
                    let is_there = matches!(self.packs.place(target.pack), Ok(Place::Pack(_)));
                    if is_there
                        && allowed.contains(&id)
                        && !self.condemned.has_forward(id)
                        && !self.condemned.has_pack(target.pack)
                    {
                        next = Some(at.saturating_add(run));
                        break;
                    }
                }
                let Some(next) = next else { return Ok(false) };
                at = next;
            }
        }
        Ok(true)
    }

    /// A pack that is there.
    pub(super) fn pack(&self, id: ObjectId) -> Result<Option<Arc<Pack>>> {
        match self.packs.place(id)? {
            Place::Pack(pack) => Ok(Some(pack)),
            Place::Moved(_) => Ok(None),
        }
    }
}

fn mark_chunks(marks: &mut Marks, pack: &Pack, first: u32, count: u32, depth: usize) -> Result<()> {
    // A map that names a block past the pack's end is damage that must not be marked over. A chunk
    // is alive as long as one of its blocks is.
    let last = first.saturating_add(count.saturating_sub(1));
    let chunks = pack.chunk_of(first)?..pack.chunk_of(last)? + 1;
    marks.packs.entry(pack.id()).or_default().insert_range(chunks);
    let deepest = marks.depth.entry(pack.id()).or_default();
    *deepest = depth.max(*deepest);
    Ok(())
}

fn moved_too_often(pack: ObjectId) -> RepoError {
    let detail = format!("moved more than {MAX_DEPTH} times");
    RepoError::damaged(ObjectKind::Pack.object_name(pack), detail)
}
