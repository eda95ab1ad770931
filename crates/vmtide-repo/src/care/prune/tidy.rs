//! What those who have ended left: leases, lists half removed, restore points that do not count,
//! index segments that were replaced, files that were never finished.

use super::Pruner;
use crate::condemned::{BoundaryRecord, list_beside};
use crate::envelope::ObjectKind;
use crate::index::ChunkIndex;
use crate::{ObjectId, RepoError, Result, record};
use std::collections::BTreeSet;

impl Pruner<'_> {
    /// Removes what stands beside lists that are gone.
    pub(super) fn remove_leftovers(&self) -> Result<()> {
        for (id, beside) in list_beside(self.context, ObjectKind::Condemned.prefix())? {
            if beside.has_list {
                continue;
            }
            // A list is put before anything beside it, so one that is not there now was removed; a
            // listing alone could have missed it.
            let name = ObjectKind::Condemned.object_name(id);
            if matches!(self.context.store.open(&name), Err(RepoError::NotFound { .. })) {
                beside.names.iter().try_for_each(|name| self.context.store.remove(name))?;
            }
        }
        Ok(())
    }

    /// Removes the rest.
    pub(super) fn tidy(&mut self) -> Result<()> {
        self.remove_void_points()?;
        self.remove_leases()?;
        for id in ChunkIndex::open(self.context)?.superseded() {
            match self.context.store.remove(&ObjectKind::IndexSegment.object_name(*id)) {
                Ok(()) => self.report.index_removed += 1,
                Err(RepoError::Locked { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.report.freed_bytes += self.context.store.remove_unfinished()?;
        Ok(())
    }

    fn remove_void_points(&mut self) -> Result<()> {
        for id in std::mem::take(&mut self.void) {
            match self.context.store.remove(&ObjectKind::Point.object_name(id)) {
                Ok(()) => self.report.void_points += 1,
                Err(RepoError::Locked { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Removes the leases of those who ended or were judged, but for those that a list still has to
    /// ask what they made.
    fn remove_leases(&self) -> Result<()> {
        let mut asked = BTreeSet::new();
        for list in &self.lists {
            for id in &list.beside.boundaries {
                let header = list.header(self.context, ObjectKind::Boundary, *id);
                let boundary = record::try_read::<BoundaryRecord>(self.context, header)?;
                asked.extend(boundary.into_iter().flat_map(|boundary| boundary.leases));
            }
            if list.beside.boundaries.is_empty() {
                return Ok(());
            }
        }
        let is_over = |id: ObjectId, ended: bool| ended || self.is_judged(id);
        for (id, lease) in self.roster.iter() {
            if Some(id) == self.lease.id() || asked.contains(&id) || !is_over(id, lease.ended) {
                continue;
            }
            // The end goes last: without it the rest would be taken for somebody at work.
            let end = ObjectKind::LeaseEnd.object_name(id);
            let rest = lease.names.iter().filter(|name| **name != end);
            for name in rest.chain(lease.names.iter().filter(|name| **name == end)) {
                match self.context.store.remove(name) {
                    Ok(()) | Err(RepoError::Locked { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}
