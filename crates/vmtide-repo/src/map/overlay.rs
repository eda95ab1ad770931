//! Several layers of runs seen as one: the newest decides.

use super::MapRun;
use crate::Result;
use std::ops::Range;

/// A sorted sequence of runs that do not overlap, walked forward.
pub(super) trait RunSource {
    /// The first run that ends after `block`, without what lies before `block`. From call to call
    /// `block` never decreases.
    fn run_from(&mut self, block: u64) -> Result<Option<MapRun>>;
}

/// Runs in memory.
pub(super) struct SliceSource<'a> {
    runs: &'a [MapRun],
}

impl<'a> SliceSource<'a> {
    pub const fn new(runs: &'a [MapRun]) -> Self {
        Self { runs }
    }
}

impl RunSource for SliceSource<'_> {
    fn run_from(&mut self, block: u64) -> Result<Option<MapRun>> {
        while let Some((run, rest)) = self.runs.split_first() {
            if run.end() > block {
                return Ok(Some(run.slice(run.first_block.max(block), run.end())));
            }
            self.runs = rest;
        }
        Ok(None)
    }
}

/// The layers, merged as they are walked: holds one run per layer.
pub(super) struct Overlay<'a> {
    layers: Vec<Layer<'a>>,
    position: u64,
    end: u64,
}

struct Layer<'a> {
    source: Box<dyn RunSource + 'a>,
    run: Option<MapRun>,
    finished: bool,
}

impl Layer<'_> {
    /// The layer's first run that ends after `block`; it may begin before.
    fn run_at(&mut self, block: u64) -> Result<Option<MapRun>> {
        if self.run.is_none_or(|run| run.end() <= block) && !self.finished {
            self.run = self.source.run_from(block)?;
            self.finished = self.run.is_none();
        }
        Ok(self.run)
    }
}

impl<'a> Overlay<'a> {
    /// The `sources`, newest first, within `blocks`.
    pub fn new(sources: Vec<Box<dyn RunSource + 'a>>, blocks: Range<u64>) -> Self {
        let layer = |source| Layer { source, run: None, finished: false };
        Self {
            layers: sources.into_iter().map(layer).collect(),
            position: blocks.start,
            end: blocks.end,
        }
    }

    /// Leaps forward: the next run will not begin before `block`.
    pub fn seek(&mut self, block: u64) {
        self.position = self.position.max(block);
    }

    /// The next run that some layer has, as much of it as the newest layers leave. Blocks that no
    /// layer has are passed over.
    ///
    /// # Errors
    /// Those of the sources.
    pub fn next_run(&mut self) -> Result<Option<MapRun>> {
        while self.position < self.end {
            // The layers already looked at have nothing before this.
            let mut free_until = self.end;
            for layer in &mut self.layers {
                let Some(run) = layer.run_at(self.position)? else {
                    continue;
                };
                if run.first_block <= self.position {
                    let part = run.slice(self.position, run.end().min(free_until));
                    self.position = part.end();
                    return Ok(Some(part));
                }
                free_until = free_until.min(run.first_block);
            }
            self.position = free_until;
        }
        Ok(None)
    }
}
