//! Collects the runs of a backup from its workers, in any order and in bounded memory.

use super::overlay::{RunSource, SliceSource};
use super::segment::SegmentCursor;
use super::writer::MapSegmentWriter;
use super::{MAX_RUNS_IN_MEMORY, MapRun, MapSegment};
use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::{ObjectId, RepoError, Result};
use parking_lot::Mutex;
use std::sync::Arc;

/// Runs collected before the first attempt to join neighbours.
const FIRST_TIDY: usize = 64 << 10;

/// Collects runs, each disjoint from the others. Shared by the workers of one disk.
///
/// Beyond its limit it writes what it has as a map segment of its own, which
/// [`write_layered`](super::write_layered) merges in and removes; if the process ends before, it is
/// garbage like any other.
pub(crate) struct MapBuilder {
    ctx: Arc<RepoContext>,
    limit: usize,
    state: Mutex<State>,
}

struct State {
    runs: Vec<MapRun>,
    tidy_at: usize,
    spills: Vec<ObjectId>,
}

impl MapBuilder {
    /// An empty builder.
    pub fn new(ctx: Arc<RepoContext>) -> Self {
        Self::with_limit(ctx, MAX_RUNS_IN_MEMORY)
    }

    /// An empty builder that holds at most `limit` runs in memory.
    pub fn with_limit(ctx: Arc<RepoContext>, limit: usize) -> Self {
        Self {
            ctx,
            limit,
            state: Mutex::new(State {
                runs: Vec::new(),
                tidy_at: FIRST_TIDY.min(limit),
                spills: Vec::new(),
            }),
        }
    }

    /// Adds a run.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] for a run out of bounds, or, now or at the end, one that overlaps
    /// another; those of the store when memory is full.
    pub fn push(&self, run: MapRun) -> Result<()> {
        if !run.is_valid() {
            return Err(RepoError::Invalid(format!("{run:?} is out of bounds")));
        }
        let mut state = self.state.lock();
        if let Some(last) = state.runs.last_mut()
            && last.join(&run)
        {
            return Ok(());
        }
        state.runs.push(run);
        if state.runs.len() < state.tidy_at {
            return Ok(());
        }
        tidy(&mut state.runs)?;
        if state.runs.len() > self.limit / 2 {
            let spill = write(&self.ctx, &state.runs)?;
            state.spills.extend(spill);
            state.runs.clear();
        }
        state.tidy_at = (state.runs.len() * 2).max(FIRST_TIDY).min(self.limit);
        Ok(())
    }

    /// All runs, sorted.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] where runs overlap; those of the store.
    pub(super) fn finish(self) -> Result<BuiltRuns> {
        let mut state = self.state.into_inner();
        tidy(&mut state.runs)?;
        let open = |&id: &ObjectId| MapSegment::open(&self.ctx, id);
        Ok(BuiltRuns {
            spills: state.spills.iter().map(open).collect::<Result<_>>()?,
            runs: state.runs,
        })
    }
}

/// What a [`MapBuilder`] collected.
#[derive(Debug, Default)]
pub(super) struct BuiltRuns {
    runs: Vec<MapRun>,
    spills: Vec<MapSegment>,
}

impl BuiltRuns {
    /// How many runs there are, at most.
    pub fn run_count(&self) -> u64 {
        let spilled: u64 = self.spills.iter().map(MapSegment::run_count).sum();
        spilled + self.runs.len() as u64
    }

    /// The block after the last run.
    pub fn end_block(&self) -> u64 {
        let spilled = self.spills.iter().map(MapSegment::end_block).max();
        self.runs.last().map_or(0, MapRun::end).max(spilled.unwrap_or(0))
    }

    /// The layers that hold them.
    pub(super) fn sources<'a>(&'a self, sources: &mut Vec<Box<dyn RunSource + 'a>>) {
        sources.push(Box::new(SliceSource::new(&self.runs)));
        for spill in &self.spills {
            sources.push(Box::new(SegmentCursor::new(spill, None)));
        }
    }

    /// Removes what was written for want of memory. What cannot be removed is left to `prune`.
    pub(super) fn discard(self, ctx: &RepoContext) {
        for spill in &self.spills {
            let name = ObjectKind::MapSegment.object_name(spill.id());
            if let Err(error) = ctx.store.remove(&name) {
                tracing::debug!(%name, %error, "a temporary map segment is left for prune");
            }
        }
    }
}

/// Sorts, and joins neighbours.
fn tidy(runs: &mut Vec<MapRun>) -> Result<()> {
    runs.sort_unstable_by_key(|run| run.first_block);
    if let Some(pair) = runs.windows(2).find(|pair| pair[0].end() > pair[1].first_block) {
        return Err(RepoError::Invalid(format!(
            "block {} was stored twice in one backup",
            pair[1].first_block
        )));
    }
    runs.dedup_by(|next, run| run.join(next));
    Ok(())
}

fn write(ctx: &RepoContext, runs: &[MapRun]) -> Result<Option<ObjectId>> {
    let mut writer = MapSegmentWriter::create(ctx)?;
    runs.iter().try_for_each(|&run| writer.push(run))?;
    writer.finish()
}
