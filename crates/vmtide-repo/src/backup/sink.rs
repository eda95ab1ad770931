//! Where the runs of a disk's new map end up: what equals the base is dropped here.

use crate::Result;
use crate::map::{DiskMap, MapBuilder, MapRun, Target};
use std::sync::atomic::{AtomicU64, Ordering};

/// Collects the runs of one disk from planner and workers.
pub(super) struct RunSink {
    base: Option<DiskMap>,
    builder: MapBuilder,
    changed_blocks: AtomicU64,
}

impl RunSink {
    pub(super) fn new(base: Option<DiskMap>, builder: MapBuilder) -> Self {
        Self { base, builder, changed_blocks: AtomicU64::new(0) }
    }

    /// Notes what some blocks are now. Blocks that are the same in the base need no run, and blocks
    /// that are in no run of any segment are zero.
    pub(super) fn record(&self, run: MapRun) -> Result<()> {
        let Some(base) = &self.base else {
            return if run.target == Target::Zero { Ok(()) } else { self.keep(run) };
        };
        base.for_each_run(run.first_block..run.end(), &mut |old| {
            let new = run.cut(old.first_block, old.count);
            if new.target == old.target { Ok(()) } else { self.keep(new) }
        })
    }

    fn keep(&self, run: MapRun) -> Result<()> {
        self.changed_blocks.fetch_add(run.count, Ordering::Relaxed);
        self.builder.push(run)
    }

    /// The runs, and how many blocks they cover.
    pub(super) fn finish(self) -> (MapBuilder, u64) {
        (self.builder, self.changed_blocks.into_inner())
    }
}
