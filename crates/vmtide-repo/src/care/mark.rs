//! What the restore points need, chunk by chunk.

use crate::context::RepoContext;
use crate::disk::{PackSet, Passed, Traced};
use crate::map::{DiskMap, Target};
use crate::point::RestorePoint;
use crate::{BLOCK_BYTES, Location, ObjectId, Result};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use vmtide_block::CancelToken;

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
    /// The forwards that some map still leads through, with the longest way from a map to the pack
    /// behind them.
    pub forwards: HashSet<ObjectId>,
    /// The most forwards passed on the way to a pack.
    pub depth: HashMap<ObjectId, usize>,
    /// The records of what was healed that some map leads through.
    pub healed: HashSet<ObjectId>,
    /// Packs whose directory cannot be read, and whose content was healed. They stay all the same:
    /// that a damaged place is not needed any more is never concluded from what healed it.
    pub damaged: HashSet<ObjectId>,
}

impl Marks {
    /// Marks what `points` need. Anything that cannot be read is an error: guessing would remove
    /// what it names.
    pub(super) fn of(
        context: &Arc<RepoContext>,
        packs: &PackSet,
        points: &[RestorePoint],
        cancel: &CancelToken,
    ) -> Result<Self> {
        let mut marks = Self::default();
        let mut seen = HashSet::new();
        for disk in points.iter().flat_map(|point| &point.disks) {
            cancel.check()?;
            marks.maps.extend(&disk.map);
            // Points that share a whole map need looking at once.
            if seen.insert((&disk.map, disk.size_bytes)) {
                marks.add_map(context, packs, &disk.map, disk.size_bytes)?;
            }
        }
        Ok(marks)
    }

    fn add_map(
        &mut self,
        context: &Arc<RepoContext>,
        packs: &PackSet,
        map: &[ObjectId],
        size_bytes: u64,
    ) -> Result<()> {
        let blocks = size_bytes.div_ceil(BLOCK_BYTES as u64);
        DiskMap::open(context, map, blocks)?.for_each_run(0..blocks, &mut |run| {
            let Target::Data { pack, ordinal } = run.target else { return Ok(()) };
            let mut done = 0;
            while done < run.count {
                let part = u32::try_from(run.count - done).unwrap_or(u32::MAX);
                let offset = u32::try_from(done).unwrap_or(u32::MAX);
                let place = Location { pack, ordinal: ordinal.saturating_add(offset) };
                done += u64::from(self.add_run(packs, place, part)?);
            }
            Ok(())
        })
    }

    /// Marks the chunks of blocks from `place` on; answers with how many blocks.
    fn add_run(&mut self, packs: &PackSet, place: Location, count: u32) -> Result<u32> {
        let (traced, was_healed) = self.trace(packs, place, count, true)?;
        let count = traced.count;
        self.add_traced(traced)?;
        let mut done = 0;
        while was_healed && done < count {
            let place = Location { ordinal: place.ordinal.saturating_add(done), ..place };
            let (damaged, _) = self.trace(packs, place, count - done, false)?;
            done += damaged.count;
            let last = damaged.last;
            match self.add_traced(damaged) {
                Err(error) if error.is_damage() => {
                    self.damaged.insert(last.pack);
                }
                other => other?,
            }
        }
        Ok(count)
    }

    /// Follows a run, and marks what it passes. Answers with where it leads, and whether a record of
    /// what was healed led there.
    fn trace(
        &mut self,
        packs: &PackSet,
        place: Location,
        count: u32,
        healed: bool,
    ) -> Result<(Traced, bool)> {
        let (mut depth, mut was_healed) = (0, false);
        let traced = packs.trace(place, count, healed, &mut |passed| match passed {
            Passed::Forward(id) => {
                depth += 1;
                self.forwards.insert(id);
            }
            Passed::Healed(id) => {
                depth += 1;
                was_healed = true;
                self.healed.insert(id);
            }
        })?;
        if let Ok((pack, _)) = &traced.place {
            let deepest = self.depth.entry(pack.id()).or_default();
            *deepest = depth.max(*deepest);
        }
        Ok((traced, was_healed))
    }

    fn add_traced(&mut self, traced: Traced) -> Result<()> {
        let (pack, ordinal) = traced.place?;
        // A map that names a block past the pack's end is damage that must not be marked over. A
        // chunk is alive as long as one of its blocks is.
        let (first, last) =
            (pack.chunk_of(ordinal)?, pack.chunk_of(ordinal.saturating_add(traced.count - 1))?);
        self.packs.entry(pack.id()).or_default().insert_range(first..last + 1);
        Ok(())
    }
}
