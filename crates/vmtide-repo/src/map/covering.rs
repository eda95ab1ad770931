//! An overlay without gaps: what no layer has is zero.

use super::MapRun;
use super::overlay::Overlay;
use crate::Result;

/// Answers for every block up to `end`, walking forward.
pub(super) struct Covering<'a> {
    overlay: Overlay<'a>,
    ahead: Option<MapRun>,
    end: u64,
}

impl<'a> Covering<'a> {
    pub const fn new(overlay: Overlay<'a>, end: u64) -> Self {
        Self { overlay, ahead: None, end }
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
            Some(run) => MapRun::zero(block..run.first_block),
            None => MapRun::zero(block..self.end),
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
