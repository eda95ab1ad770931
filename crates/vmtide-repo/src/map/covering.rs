//! An overlay without gaps: what no layer has is zero, or lost where layers are lost.

use super::overlay::Overlay;
use super::{MapRun, Target};
use crate::Result;
use std::ops::Range;

/// Answers for every block up to `end`, walking forward.
pub(super) struct Covering<'a> {
    overlay: Overlay<'a>,
    ahead: Option<MapRun>,
    end: u64,
    gap: Target,
}

impl<'a> Covering<'a> {
    /// `gap` is what blocks are that no layer has.
    pub const fn new(overlay: Overlay<'a>, end: u64, gap: Target) -> Self {
        Self { overlay, ahead: None, end, gap }
    }

    const fn gap(&self, blocks: Range<u64>) -> MapRun {
        MapRun { first_block: blocks.start, count: blocks.end - blocks.start, target: self.gap }
    }

    /// The run over `block`, from there on; `block` is before the end and never decreases.
    ///
    /// # Errors
    /// Those of the layers.
    pub fn run_at(&mut self, block: u64) -> Result<MapRun> {
        if self.ahead.is_none_or(|run| run.end() <= block) {
            self.overlay.seek(block);
            self.ahead = self.overlay.next_run()?;
        }
        Ok(match self.ahead {
            Some(run) if run.first_block <= block => run.slice(block, run.end()),
            Some(run) => self.gap(block..run.first_block),
            None => self.gap(block..self.end),
        })
    }

    /// Calls `visit` for runs that cover `from` to the end, joined where they continue each other.
    ///
    /// # Errors
    /// Those of the layers and of `visit`.
    pub fn for_each(
        mut self,
        from: u64,
        visit: &mut dyn FnMut(MapRun) -> Result<()>,
    ) -> Result<()> {
        let mut pending: Option<MapRun> = None;
        let mut position = from;
        while position < self.end {
            let run = self.run_at(position)?;
            position = run.end();
            if pending.as_mut().is_some_and(|last| last.join(&run)) {
                continue;
            }
            if let Some(last) = pending.replace(run) {
                visit(last)?;
            }
        }
        pending.map_or(Ok(()), visit)
    }
}
