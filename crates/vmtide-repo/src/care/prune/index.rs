//! The index without what is to go.

use super::condemn::list;
use super::{Pruner, may_remove};
use crate::care::mark::Marker;
use crate::envelope::ObjectKind;
use crate::index::ChunkIndex;
use crate::{Location, ObjectId, RepoError, Result};

/// Index entries that are sorted in memory at once: 1 Mi, some 48 MiB.
const INDEX_BATCH: usize = 1 << 20;

impl Pruner<'_> {
    /// Whether a part of the index is damaged; or it does not know a pack that is needed: one that
    /// was condemned and is not any more, or all, where the index was lost; or it knows packs that
    /// are gone, because somebody who stood still wrote of them later.
    pub(super) fn is_index_incomplete(&self) -> Result<bool> {
        let index = ChunkIndex::open(self.context)?;
        let known = index.packs();
        // After the index: it names no pack that came later.
        let there = list(self.context, ObjectKind::Pack)?;
        let is_missing = |id: &ObjectId| {
            there.contains_key(id) && !self.condemned.has_pack(*id) && !known.contains(id)
        };
        Ok(!index.skipped().is_empty()
            || self.marks.packs.keys().any(is_missing)
            || known.iter().any(|id| !there.contains_key(id)))
    }

    /// One new index of the packs that stay. It supersedes all there were, even unreadable ones.
    /// Nobody relies on the index, so it needs no protection: whoever looks something up in a
    /// segment that is gone stores it again.
    pub(super) fn rebuild_index(&mut self) -> Result<()> {
        let old: Vec<ObjectId> =
            list(self.context, ObjectKind::IndexSegment)?.into_keys().collect();
        let marker = Marker::new(self.context, &self.condemned, self.cancel);
        let mut builder = ChunkIndex::rebuild(self.context, INDEX_BATCH);
        for id in list(self.context, ObjectKind::Pack)?.keys() {
            self.cancel.check()?;
            if self.condemned.has_pack(*id) {
                continue;
            }
            let pack = match marker.pack(*id) {
                Ok(Some(pack)) => pack,
                Ok(None) => continue,
                // Nothing is known about it, and nobody is to refer to it.
                Err(error) if error.is_damage() => continue,
                Err(error) => return Err(error),
            };
            for (ordinal, chunk) in pack.chunks() {
                builder.push(chunk.id.prefix(), Location { pack: *id, ordinal })?;
            }
        }
        builder.finish(&old)?;
        for id in old {
            match may_remove(self.context.store.remove(&ObjectKind::IndexSegment.object_name(id))) {
                Ok(()) => self.report.index_removed += 1,
                // It is superseded, and goes when it may.
                Err(RepoError::Locked { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
