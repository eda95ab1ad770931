//! One condemned list, from its boundary to its end.

use super::{Pruner, may_remove};
use crate::care::mark::Marker;
use crate::condemned::{Beside, BoundaryRecord, CondemnedRecord, OpenList, VerdictRecord};
use crate::envelope::ObjectKind;
use crate::lease::{LeaseRecord, Purpose};
use crate::{ObjectId, RepoError, Result, record};
use std::collections::BTreeSet;
use std::collections::btree_map::Entry;

/// How far a list came.
pub(super) enum Outcome {
    /// It is gone.
    Gone,
    /// It stays, for a reason that waiting for nobody changes.
    Stays,
    /// It waits for these leases to end.
    Waits(BTreeSet<ObjectId>),
}

impl Pruner<'_> {
    /// Goes on with a list as far as it comes. The leases were listed after the list could be seen,
    /// and the restore points after that.
    pub(super) fn advance(&mut self, list: &OpenList) -> Result<Outcome> {
        let boundary = self.boundary(list)?;
        if list.beside.is_closing {
            return self.close(list, false);
        }
        let waits = self.unsettled(&boundary.leases);
        if !waits.is_empty() {
            return Ok(Outcome::Waits(waits));
        }
        for id in &list.beside.verdicts {
            self.read_verdict(list, *id)?;
        }
        let own = self.decide(list, &boundary.writers)?;
        if !self.takes_effect(list)? {
            self.verdicts.remove(&list.id);
            return Ok(Outcome::Stays);
        }
        if let Some((id, verdict)) = own {
            self.verdicts.entry(list.id).or_default().insert(id, verdict);
        }
        let verdicts: Vec<VerdictRecord> =
            self.verdicts.get(&list.id).into_iter().flat_map(|all| all.values().cloned()).collect();
        let mut waits = BTreeSet::new();
        for verdict in &verdicts {
            let readers = self.unsettled_now(&verdict.waits_for)?;
            if readers.is_empty() {
                self.remove_dead(&verdict.dead)?;
            }
            waits.extend(readers);
        }
        if !waits.is_empty() {
            return Ok(Outcome::Waits(waits));
        }
        self.close(list, true)
    }

    /// The leases that the list waits for; noted now where nobody has.
    fn boundary(&mut self, list: &OpenList) -> Result<BoundaryRecord> {
        let mut all = BoundaryRecord::default();
        let mut known = false;
        for id in &list.beside.boundaries {
            let header = list.header(self.context, ObjectKind::Boundary, *id);
            if let Some(boundary) = record::try_read::<BoundaryRecord>(self.context, header)? {
                all.leases.extend(boundary.leases);
                all.writers.extend(boundary.writers);
                known = true;
            }
        }
        if !known {
            let unfinished = self.roster.unfinished(None).map(|(id, _)| id);
            all.leases = unfinished.filter(|id| !self.is_judged(*id)).collect();
            for id in &all.leases {
                let makes_none = |record: &LeaseRecord| record.purpose != Purpose::Backup;
                if !self.record(*id)?.is_some_and(makes_none) {
                    all.writers.push(*id);
                }
            }
            list.put_beside(self.context, ObjectKind::Boundary, &all)?;
        }
        Ok(all)
    }

    fn read_verdict(&mut self, list: &OpenList, id: ObjectId) -> Result<()> {
        let known = self.verdicts.entry(list.id).or_default();
        if let Entry::Vacant(slot) = known.entry(id) {
            let header = list.header(self.context, ObjectKind::Verdict, id);
            if let Some(verdict) = record::try_read(self.context, header)? {
                slot.insert(verdict);
            }
        }
        Ok(())
    }

    /// What of a list is dead, put beside it, as far as no verdict says so yet.
    fn decide(
        &mut self,
        list: &OpenList,
        writers: &[ObjectId],
    ) -> Result<Option<(ObjectId, VerdictRecord)>> {
        let dead = self.find_dead(list)?;
        if dead.len() == 0 {
            return Ok(None);
        }
        // Somebody may read a restore point that was made after the list and is forgotten by now:
        // then those who are at work now have to end first.
        let waits_for =
            if self.all_points_are_there(writers)? { Vec::new() } else { self.now_at_work()? };
        let verdict = VerdictRecord { dead, waits_for };
        let id = list.put_beside(self.context, ObjectKind::Verdict, &verdict)?;
        Ok(Some((id, verdict)))
    }

    fn find_dead(&self, list: &OpenList) -> Result<CondemnedRecord> {
        let decided = self.verdicts.get(&list.id);
        let known = |find: &dyn Fn(&CondemnedRecord) -> bool| {
            decided.is_some_and(|all| all.values().any(|verdict| find(&verdict.dead)))
        };
        let marker = Marker::new(self.context, &self.condemned, self.cancel);
        let mut dead = CondemnedRecord { lease: self.lease.id(), ..CondemnedRecord::default() };
        for id in &list.record.packs {
            let is_there = self.inventory_has_pack(*id);
            if !is_there || known(&|dead| dead.packs.contains(id)) {
                continue;
            }
            match self.marks.packs.get(id) {
                None => dead.packs.push(*id),
                Some(marked) => {
                    #[cfg(feature = "simulation")]
                    if crate::simulation::is_weak(crate::simulation::Weakness::ForwardTrusted)
                        && list.record.moved.iter().any(|(pack, _)| pack == id)
                    {
                        dead.packs.push(*id);
                        continue;
                    }
                    let moved = list.record.moved.iter().filter(|(pack, _)| pack == id);
                    let forwards: Vec<ObjectId> = moved.map(|(_, forward)| *forward).collect();
                    if !forwards.is_empty()
                        && let Some(pack) = marker.pack(*id)?
                        && marker.is_replaced(&pack, marked, &forwards)?
                    {
                        dead.packs.push(*id);
                    }
                }
            }
        }
        for id in &list.record.maps {
            if !self.marks.maps.contains(id) && !known(&|dead| dead.maps.contains(id)) {
                dead.maps.push(*id);
            }
        }
        for forward in &list.record.forwards {
            if !self.marks.forwards.contains(&forward.1)
                && !known(&|dead| dead.forwards.contains(forward))
            {
                dead.forwards.push(*forward);
            }
        }
        // What is gone already needs no verdict.
        dead.maps.retain(|id| self.inventory.maps.contains_key(id));
        dead.forwards.retain(|forward| self.inventory.forwards.contains_key(forward));
        Ok(dead)
    }

    fn inventory_has_pack(&self, id: ObjectId) -> bool {
        self.inventory.packs.contains_key(&id)
            && !self.removed.contains(&ObjectKind::Pack.object_name(id))
    }

    /// Whether the verdicts that are there take effect: nobody is about to remove the list, and it is
    /// there. Whoever closes it later sees them.
    fn takes_effect(&self, list: &OpenList) -> Result<bool> {
        #[cfg(feature = "simulation")]
        if crate::simulation::is_weak(crate::simulation::Weakness::VerdictUnconfirmed) {
            return Ok(true);
        }
        if Beside::read(self.context, list.id)?.is_closing {
            return Ok(false);
        }
        self.is_there(list)
    }

    fn is_there(&self, list: &OpenList) -> Result<bool> {
        match self.context.store.open(&ObjectKind::Condemned.object_name(list.id)) {
            Ok(_) => Ok(true),
            Err(RepoError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes what is dead. What the store keeps until a time stays until a later run.
    fn remove_dead(&mut self, dead: &CondemnedRecord) -> Result<()> {
        let moved: BTreeSet<String> =
            self.condemned.moved().map(|(pack, _)| ObjectKind::Pack.object_name(pack)).collect();
        for (name, length_bytes) in self.inventory.names_of(dead) {
            if self.removed.contains(&name) {
                continue;
            }
            self.cancel.check()?;
            match may_remove(self.context.store.remove(&name)) {
                Ok(()) => {
                    self.report.freed_bytes += length_bytes;
                    self.report.packs_removed +=
                        u64::from(name.starts_with("packs/") && !moved.contains(&name));
                    self.report.maps_removed += u64::from(name.starts_with("maps/"));
                    self.removed.insert(name);
                }
                Err(RepoError::Locked { until, .. }) => {
                    self.report.locked_objects += 1;
                    self.report.locked_until = self.report.locked_until.max(Some(until));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Removes a list when all that any verdict found dead is gone. What is on it and not dead is
    /// not condemned any more then.
    fn close(&mut self, list: &OpenList, announce: bool) -> Result<Outcome> {
        #[cfg(feature = "simulation")]
        if crate::simulation::is_weak(crate::simulation::Weakness::ListRemovedEarly) {
            list.remove(self.context)?;
            return Ok(Outcome::Gone);
        }
        let left = self.left_of(&list.record);
        if left > 0 {
            if announce {
                if !self.all_verdicts_are_done(list)? {
                    return Ok(Outcome::Stays);
                }
                list.put_closing(self.context)?;
            }
            // Again, now that nobody's verdict takes effect any more.
            if !self.all_verdicts_are_done(list)? {
                return Ok(Outcome::Stays);
            }
            self.report.needed_after_all += left;
        }
        match list.remove(self.context) {
            Ok(()) => {}
            // A bucket may keep whatever is put into it; then the list goes when its time is over.
            Err(RepoError::Locked { .. }) => return Ok(Outcome::Stays),
            Err(error) => return Err(error),
        }
        if let Some(known) = &mut self.marked_with {
            known.remove(&list.id);
        }
        self.verdicts.remove(&list.id);
        Ok(Outcome::Gone)
    }

    /// How many objects of a list are there.
    fn left_of(&self, record: &CondemnedRecord) -> u64 {
        let names = self.inventory.names_of(record);
        names.iter().filter(|(name, _)| !self.removed.contains(name)).count() as u64
    }

    fn all_verdicts_are_done(&mut self, list: &OpenList) -> Result<bool> {
        for id in Beside::read(self.context, list.id)?.verdicts {
            self.read_verdict(list, id)?;
        }
        let verdicts = self.verdicts.get(&list.id);
        let left: u64 = verdicts
            .into_iter()
            .flat_map(|all| all.values())
            .map(|verdict| self.left_of(&verdict.dead))
            .sum();
        Ok(left == 0)
    }
}
