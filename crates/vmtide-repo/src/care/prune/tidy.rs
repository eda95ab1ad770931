//! What those who have ended left: leases, lists half removed, restore points that do not count,
//! index segments that were replaced, files that were never finished.

use super::{Pruner, may_remove};
use crate::care::quarantine;
use crate::condemned::{BoundaryRecord, list_beside};
use crate::disk::Repairs;
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
                beside.names.iter().try_for_each(|name| self.remove_if_allowed(name))?;
            }
        }
        Ok(())
    }

    /// Removes an object; one that the store keeps until a time stays until a later run.
    fn remove_if_allowed(&self, name: &str) -> Result<()> {
        match may_remove(self.context.store.remove(name)) {
            Err(RepoError::Locked { .. }) => Ok(()),
            outcome => outcome,
        }
    }

    /// Removes the rest.
    pub(super) fn tidy(&mut self) -> Result<()> {
        self.remove_void_points()?;
        self.remove_leases()?;
        for id in ChunkIndex::open(self.context)?.superseded() {
            match may_remove(self.context.store.remove(&ObjectKind::IndexSegment.object_name(*id)))
            {
                Ok(()) => self.report.index_removed += 1,
                Err(RepoError::Locked { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.report.freed_bytes += self.context.store.remove_unfinished()?;
        self.remove_idle_repairs()
    }

    /// Takes off the record what was damaged and is gone, and which no restore point leads to any
    /// more; and records of what healed only that. Otherwise every backup would look for it for ever.
    /// Not while anybody is at work: what they refer to is not known yet.
    fn remove_idle_repairs(&self) -> Result<()> {
        if !self.lists.is_empty() || self.roster.unfinished(self.lease.id()).next().is_some() {
            return Ok(());
        }
        let repairs = Repairs::load(self.context)?;
        let mut idle = BTreeSet::new();
        let damaged = repairs.damaged.iter().map(|entry| entry.part.pack);
        for pack in damaged.chain(repairs.healed.packs()).collect::<BTreeSet<_>>() {
            if self.is_idle(pack)? {
                idle.insert(pack);
            }
        }
        for (id, content) in quarantine::read_records(self.context)? {
            let parts = &content.parts;
            let left: Vec<_> =
                parts.iter().filter(|part| !idle.contains(&part.pack)).cloned().collect();
            let replaced = |id: &ObjectId| repairs.damaged.records.contains(id);
            if left.is_empty() && !content.replaces.iter().any(replaced) {
                quarantine::remove_record(self.context, id);
            } else if left.len() < parts.len() {
                quarantine::replace_record(self.context, id, content, left)?;
            }
        }
        for id in repairs.healed.records_of_only(&idle) {
            match may_remove(self.context.store.remove(&ObjectKind::Healed.object_name(id))) {
                Ok(()) | Err(RepoError::Locked { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether a pack is not there, was not moved, and is nothing that a restore point leads to.
    fn is_idle(&self, pack: ObjectId) -> Result<bool> {
        if self.marks.packs.contains_key(&pack) || self.marks.damaged.contains(&pack) {
            return Ok(false);
        }
        let name = ObjectKind::Pack.object_name(pack);
        match self.context.store.open(&name) {
            Err(RepoError::NotFound { .. }) => {}
            // There, or nobody knows.
            _ => return Ok(false),
        }
        let mut is_moved = false;
        let prefix = format!("{}{pack}/", ObjectKind::Forward.prefix());
        self.context.store.list(&prefix, &mut |_| {
            is_moved = true;
            Ok(())
        })?;
        Ok(!is_moved)
    }

    fn remove_void_points(&mut self) -> Result<()> {
        for id in std::mem::take(&mut self.void) {
            match may_remove(self.context.store.remove(&ObjectKind::Point.object_name(id))) {
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
                match may_remove(self.context.store.remove(name)) {
                    Ok(()) | Err(RepoError::Locked { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}
