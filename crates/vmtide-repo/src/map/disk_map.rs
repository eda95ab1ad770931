//! The map of one disk at one restore point: its segments as one.

use super::covering::Covering;
use super::overlay::{Overlay, RunSource, SliceSource};
use super::segment::{MapCache, MapSegment, SegmentCursor};
use super::{CACHED_PAGES, LOST, MAX_BLOCKS, MAX_SEGMENTS, MapRun, Target};
use crate::context::RepoContext;
use crate::pack::is_media_error;
use crate::{ObjectId, RepoError, Result};
use std::ops::Range;

/// A disk map. Shared by threads; a lookup takes no lock but one shard of the page cache.
#[derive(Debug)]
pub(crate) struct DiskMap {
    segments: Vec<MapSegment>,
    /// Beyond this the segments do not speak for the disk.
    mapped_blocks: u64,
    blocks: u64,
    cache: MapCache,
    /// What blocks are that no segment has.
    gap: Target,
}

impl DiskMap {
    /// Opens the map of a disk of `blocks` blocks from its segments, newest first. What segments
    /// hold beyond the disk's end is ignored: the disk was larger once.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] for a missing or damaged segment; [`RepoError::Invalid`] for more
    /// than [`MAX_SEGMENTS`] segments or 2⁴⁸ blocks; `Io`.
    pub fn open(ctx: &RepoContext, segments: &[ObjectId], blocks: u64) -> Result<Self> {
        if segments.len() > MAX_SEGMENTS || blocks > MAX_BLOCKS {
            return Err(RepoError::Invalid(format!(
                "a disk map of {} segments for {blocks} blocks: the limits are {MAX_SEGMENTS} and \
                 {MAX_BLOCKS}",
                segments.len()
            )));
        }
        let open = |&id: &ObjectId| MapSegment::open(ctx, id);
        Ok(Self {
            segments: segments.iter().map(open).collect::<Result<_>>()?,
            mapped_blocks: blocks,
            blocks,
            cache: MapCache::new(CACHED_PAGES),
            gap: Target::Zero,
        })
    }

    /// As [`open`](Self::open), of a map that may be damaged: what cannot be told leads to
    /// [`LOST`](super::LOST). Where a segment cannot be opened, that is all that no newer one has,
    /// because it might have said something else than the older ones.
    ///
    /// # Errors
    /// As [`open`](Self::open), but not for damage.
    pub fn salvage(ctx: &RepoContext, segments: &[ObjectId], blocks: u64) -> Result<Self> {
        let mut map = Self::open(ctx, &[], blocks)?;
        for id in segments.iter().take(MAX_SEGMENTS) {
            match MapSegment::open(ctx, *id) {
                Ok(segment) => map.segments.push(segment.salvaging()),
                Err(error) if is_media_error(&error) => {
                    tracing::warn!(%error, "what this part of the map covers is lost");
                    map.gap = Target::Data { pack: LOST, ordinal: 0 };
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(map)
    }

    /// The same map for the disk at another size: cut, or grown by zeros. A disk that grew must be
    /// compared with its base in this way, because segments may still hold what the base lost
    /// when it shrank once.
    #[must_use]
    pub fn resized(mut self, blocks: u64) -> Self {
        self.mapped_blocks = self.mapped_blocks.min(blocks);
        self.blocks = blocks;
        self
    }

    /// The disk's length in blocks.
    #[cfg(test)]
    pub const fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The segments, newest first.
    #[cfg(test)]
    pub fn segments(&self) -> &[MapSegment] {
        &self.segments
    }

    /// The runs that cover `blocks` exactly, in order, blocks without content as zero. The answer
    /// has at most one run per block asked for; [`for_each_run`](Self::for_each_run) holds less.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] for a range beyond the disk's end; [`RepoError::Damaged`], `Io`.
    #[cfg(test)]
    pub fn lookup(&self, blocks: Range<u64>) -> Result<Vec<MapRun>> {
        let mut found = Vec::new();
        self.for_each_run(blocks, &mut |run| {
            found.push(run);
            Ok(())
        })?;
        Ok(found)
    }

    /// Calls `visit` for the runs that cover `blocks` exactly, in order, blocks without content as
    /// zero, neighbours joined. Holds one page per segment, at most 96 KiB each, beside the cache.
    ///
    /// # Errors
    /// As [`lookup`](Self::lookup), and those of `visit`.
    pub fn for_each_run(
        &self,
        blocks: Range<u64>,
        visit: &mut dyn FnMut(MapRun) -> Result<()>,
    ) -> Result<()> {
        if blocks.end > self.blocks || blocks.start > blocks.end {
            return Err(RepoError::Invalid(format!(
                "blocks {} to {} are not on a disk of {} blocks",
                blocks.start, blocks.end, self.blocks
            )));
        }
        self.covering(blocks.clone()).for_each(blocks.start, visit)
    }

    /// Calls `visit` for the ranges of blocks whose target in `newer` is not that in `older`, in
    /// order, neighbours joined, within the newer disk; beyond its end the older disk is zero.
    /// Segments that both share at the old end of their lists are not read except below what
    /// the others cover. A block that `prune` moved, or that was stored twice, is reported though
    /// its content is the same.
    ///
    /// # Errors
    /// [`RepoError::Damaged`], `Io`, those of `visit`.
    pub fn diff(
        older: &Self,
        newer: &Self,
        visit: &mut dyn FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let pairs = older.segments.iter().rev().zip(newer.segments.iter().rev());
        let shared = pairs.take_while(|(a, b)| a.id() == b.id()).count();
        let own = |map: &Self| map.segments.len() - shared;
        let resized =
            [MapRun::zero(older.blocks.min(newer.blocks)..older.blocks.max(newer.blocks))];
        let resized = if older.blocks == newer.blocks { &[] } else { &resized[..] };
        let candidates = older.segments[..own(older)]
            .iter()
            .chain(&newer.segments[..own(newer)])
            .map(|segment| Box::new(SegmentCursor::new(segment, None)) as Box<dyn RunSource>)
            .chain([Box::new(SliceSource::new(resized)) as Box<dyn RunSource>])
            .collect();
        let mut candidates = Overlay::new(candidates, 0..newer.blocks);
        let mut before = older.covering(0..newer.blocks);
        let mut after = newer.covering(0..newer.blocks);
        let mut pending: Option<Range<u64>> = None;
        while let Some(candidate) = candidates.next_run()? {
            let mut position = candidate.first_block;
            while position < candidate.end() {
                let (old, new) = (before.run_at(position)?, after.run_at(position)?);
                let end = candidate.end().min(old.end()).min(new.end());
                if old.target != new.target {
                    match &mut pending {
                        Some(range) if range.end == position => range.end = end,
                        _ => {
                            if let Some(range) = pending.replace(position..end) {
                                visit(range)?;
                            }
                        }
                    }
                }
                position = end;
            }
        }
        pending.map_or(Ok(()), visit)
    }

    fn covering(&self, blocks: Range<u64>) -> Covering<'_> {
        let cursor = |(segment, number)| {
            Box::new(SegmentCursor::new(segment, Some((&self.cache, number)))) as Box<dyn RunSource>
        };
        let end = blocks.end;
        let mapped = blocks.start..end.min(self.mapped_blocks);
        let layers = self.segments.iter().zip(0..).map(cursor).collect();
        Covering::new(Overlay::new(layers, mapped), end, self.gap)
    }
}
