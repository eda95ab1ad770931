//! Makes the index anew, for `prune`, in bounded memory.

use super::Key;
use super::merge::merge;
use super::segment::SegmentHead;
use super::writer::write_unsorted;
use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::{Location, ObjectId, RepoError, Result};

/// Collects entries in any order; every `batch` of them becomes a segment (36 bytes of memory per
/// entry until then), and in the end all are merged into one.
pub(crate) struct IndexRebuild<'a> {
    ctx: &'a RepoContext,
    batch: usize,
    entries: Vec<(Key, Location)>,
    written: Vec<ObjectId>,
}

impl<'a> IndexRebuild<'a> {
    pub(super) const fn new(ctx: &'a RepoContext, batch: usize) -> Self {
        Self { ctx, batch, entries: Vec::new(), written: Vec::new() }
    }

    /// Adds an entry.
    ///
    /// # Errors
    /// Those of the store.
    pub fn push(&mut self, key: Key, location: Location) -> Result<()> {
        self.entries.push((key, location));
        if self.entries.len() >= self.batch {
            let entries = std::mem::take(&mut self.entries);
            self.written.extend(write_unsorted(self.ctx, entries, Vec::new())?);
        }
        Ok(())
    }

    /// Writes one segment with all entries, which supersedes `superseded`. `None`, and no segment,
    /// where there was no entry. Segments written on the way are removed; if the process ends
    /// before, they are right, and superseded by the next.
    ///
    /// # Errors
    /// Those of the store; [`RepoError::Damaged`](crate::RepoError::Damaged) where what was just
    /// written cannot be read.
    pub fn finish(mut self, superseded: &[ObjectId]) -> Result<Option<ObjectId>> {
        let entries = std::mem::take(&mut self.entries);
        if self.written.is_empty() {
            return write_unsorted(self.ctx, entries, superseded.to_vec());
        }
        self.written.extend(write_unsorted(self.ctx, entries, Vec::new())?);
        let open = |&id: &ObjectId| SegmentHead::open(self.ctx, id);
        let heads = self.written.iter().map(open).collect::<Result<Vec<_>>>()?;
        let merged = merge(self.ctx, &heads.iter().collect::<Vec<_>>(), superseded)?;
        drop(heads);
        for &id in &self.written {
            match self.ctx.store.remove(&ObjectKind::IndexSegment.object_name(id)) {
                // A bucket may keep what is put into it: then these are a second copy for a while.
                Ok(()) | Err(RepoError::Locked { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(merged)
    }
}
