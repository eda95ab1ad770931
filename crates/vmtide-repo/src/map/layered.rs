//! Writes the map of a new restore point over that of its base.

use super::overlay::{Overlay, RunSource, SliceSource};
use super::segment::SegmentCursor;
use super::writer::MapSegmentWriter;
use super::{MAX_BLOCKS, MapBuilder, MapRun, MapSegment, Target};
use crate::context::RepoContext;
use crate::{ObjectId, RepoError, Result};

/// An older segment is merged into the new one while it has at most this many times the runs
/// gathered so far. Larger makes fewer segments and rewrites more; with 2 a run is rewritten at
/// most about log₂ of the number of runs times.
const ABSORB_FACTOR: u64 = 2;

/// The map on which a new one is built.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BaseMap<'a> {
    /// Its segments, newest first; none for a full backup.
    pub segments: &'a [ObjectId],
    /// The base disk's length in blocks.
    pub blocks: u64,
}

/// Writes the map of a disk of `blocks` blocks that is `base` with `new_runs` over it, and answers
/// with its segments, newest first. Writes one segment: the new runs and those older segments that
/// are not much larger; or none where nothing changed. Where the disk shrank, what lies beyond its
/// end is dropped from what is written and hidden from what is shared; where it grew, the new part
/// is zero unless `new_runs` say otherwise. Memory: a page per segment read.
///
/// # Errors
/// [`RepoError::Damaged`] for a damaged base; [`RepoError::Invalid`] for runs beyond the end; those
/// of the store.
pub(crate) fn write_layered(
    ctx: &RepoContext,
    base: BaseMap<'_>,
    new_runs: MapBuilder,
    blocks: u64,
) -> Result<Vec<ObjectId>> {
    let new_runs = new_runs.finish()?;
    if blocks > MAX_BLOCKS || new_runs.end_block() > blocks {
        return Err(RepoError::Invalid(format!(
            "a map up to block {} for a disk of {blocks} blocks; the limit is {MAX_BLOCKS}",
            new_runs.end_block()
        )));
    }
    let open = |&id: &ObjectId| MapSegment::open(ctx, id);
    let older = base.segments.iter().map(open).collect::<Result<Vec<_>>>()?;
    // A disk that shrank and grows again must not see what it lost: segments may still have it.
    let hidden = older.iter().any(|segment| segment.end_block() > base.blocks);
    let regrown = if hidden && blocks > base.blocks {
        vec![MapRun::zero(base.blocks..blocks)]
    } else {
        Vec::new()
    };
    let mut runs = new_runs.run_count() + regrown.len() as u64;
    if runs == 0 {
        return Ok(base.segments.to_vec());
    }
    let absorbed = older
        .iter()
        .take_while(|segment| {
            let absorb = segment.run_count() <= runs.saturating_mul(ABSORB_FACTOR);
            runs += segment.run_count();
            absorb
        })
        .count();
    let mut layers: Vec<Box<dyn RunSource + '_>> = Vec::new();
    new_runs.sources(&mut layers);
    layers.push(Box::new(SliceSource::new(&regrown)));
    for segment in &older[..absorbed] {
        layers.push(Box::new(SegmentCursor::new(segment, None)));
    }
    // With nothing below, absent says zero as well.
    let drop_zeros = absorbed == older.len();
    let written = write(ctx, layers, blocks, drop_zeros)?;
    new_runs.discard(ctx);
    let kept = &base.segments[absorbed..];
    Ok(written.into_iter().chain(kept.iter().copied()).collect())
}

fn write(
    ctx: &RepoContext,
    layers: Vec<Box<dyn RunSource + '_>>,
    blocks: u64,
    drop_zeros: bool,
) -> Result<Option<ObjectId>> {
    let mut writer = MapSegmentWriter::create(ctx)?;
    let mut overlay = Overlay::new(layers, 0..blocks);
    while let Some(run) = overlay.next_run()? {
        if !(drop_zeros && run.target == Target::Zero) {
            writer.push(run)?;
        }
    }
    writer.finish()
}
