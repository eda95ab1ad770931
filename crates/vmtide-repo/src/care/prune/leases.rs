//! Whom a prune waits for, and whom it takes for dead.

use super::{Pruner, WaitsFor};
use crate::lease::{self, LeaseRecord, Purpose, Revocations, Roster};
use crate::{ObjectId, RepoError, Result, point_list};
use jiff::Timestamp;
use std::collections::BTreeSet;

impl Pruner<'_> {
    /// Lists the leases, and revokes those of the dead.
    pub(super) fn look_at_leases(&mut self) -> Result<()> {
        // So that the newest time in the listing is now.
        self.lease.renew()?;
        self.roster = Roster::read(self.context, self.lease.id())?;
        self.revocations = Revocations::read(self.context)?;
        let own = self.lease.id();
        let unfinished: Vec<ObjectId> = self.roster.unfinished(own).map(|(id, _)| id).collect();
        for id in unfinished {
            if self.is_judged(id) || !self.is_dead(id)? {
                continue;
            }
            lease::revoke(self.context, id, || point_list::made_under(self.context, id))?;
            self.revoked.insert(id);
            self.report.leases_revoked += 1;
        }
        Ok(())
    }

    /// Whether what was made under a lease is settled, though its holder did not end it.
    pub(super) fn is_judged(&self, id: ObjectId) -> bool {
        self.revoked.contains(&id) || self.revocations.is_judged(id)
    }

    fn is_dead(&mut self, id: ObjectId) -> Result<bool> {
        let now = self.roster.now;
        if self.roster.get(id).is_some_and(|lease| lease.is_expired(now)) {
            return Ok(true);
        }
        Ok(self.record(id)?.is_some_and(LeaseRecord::is_gone))
    }

    /// What a lease says about its holder.
    pub(super) fn record(&mut self, id: ObjectId) -> Result<Option<&LeaseRecord>> {
        if !self.records.contains_key(&id) {
            self.records.insert(id, lease::read_record(self.context, id)?);
        }
        Ok(self.records.get(&id).and_then(Option::as_ref))
    }

    /// Those of the leases whose holders may still have been at work before the restore points were
    /// listed that count now. Only that says that all they made is marked: whoever ended since may
    /// have made a restore point that the marks do not know.
    pub(super) fn unsettled(&self, leases: &[ObjectId]) -> BTreeSet<ObjectId> {
        self.at_work_in(&self.roster, leases)
    }

    /// Those of the leases whose holders may be at work now. They may have begun after the roster
    /// was read that [`unsettled`](Self::unsettled) goes by.
    pub(super) fn unsettled_now(&self, leases: &[ObjectId]) -> Result<BTreeSet<ObjectId>> {
        if leases.is_empty() {
            return Ok(BTreeSet::new());
        }
        Ok(self.at_work_in(&Roster::read(self.context, self.lease.id())?, leases))
    }

    fn at_work_in(&self, roster: &Roster, leases: &[ObjectId]) -> BTreeSet<ObjectId> {
        #[cfg(feature = "simulation")]
        if crate::simulation::is_weak(crate::simulation::Weakness::LeasesIgnored) {
            return BTreeSet::new();
        }
        let own = self.lease.id();
        let at_work = |id: &ObjectId| {
            Some(*id) != own
                && roster.get(*id).is_some_and(|lease| !lease.ended)
                && !self.is_judged(*id)
        };
        leases.iter().copied().filter(at_work).collect()
    }

    /// Leaves the work to another prune that came before. Only to spare work: two prunes at the same
    /// time do no harm.
    pub(super) fn keep_off_others(&mut self) -> Result<()> {
        let own = self.lease.id();
        if self.options.beside_others {
            return Ok(());
        }
        let rank = |id: ObjectId, roster: &Roster| {
            (roster.get(id).and_then(lease::LeaseState::first_heard), id)
        };
        let own_rank = own.map(|id| rank(id, &self.roster));
        let others: Vec<ObjectId> = self.roster.unfinished(own).map(|(id, _)| id).collect();
        for id in others {
            let is_first = own_rank.is_some_and(|own| rank(id, &self.roster) < own);
            if self.is_judged(id) || !is_first {
                continue;
            }
            let Some(record) = self.record(id)? else { continue };
            if record.purpose == Purpose::Prune {
                let detail = format!(
                    "another prune is at work on {} since {}; try again when it has finished",
                    record.host, record.began
                );
                return Err(RepoError::Busy { detail });
            }
        }
        Ok(())
    }

    /// When the oldest of those began who may be writing, in the store's time.
    pub(super) fn oldest_writer(&mut self) -> Result<Option<Timestamp>> {
        let own = self.lease.id();
        let others: Vec<(ObjectId, Option<Timestamp>)> = self
            .roster
            .unfinished(own)
            .filter(|(id, _)| !self.is_judged(*id))
            .map(|(id, lease)| (id, lease.first_heard()))
            .collect();
        let mut oldest = None;
        for (id, since) in others {
            let reads = self.record(id)?.is_some_and(|record| record.purpose == Purpose::Read);
            if !reads {
                oldest = [oldest, since].into_iter().flatten().min();
            }
        }
        Ok(oldest)
    }

    /// Puts in the report whose end is waited for.
    pub(super) fn name_waits(&mut self, leases: &BTreeSet<ObjectId>) -> Result<()> {
        let mut waits = Vec::new();
        for id in leases {
            let since = self.roster.get(*id).and_then(lease::LeaseState::first_heard);
            let record = self.record(*id)?;
            waits.push(WaitsFor {
                lease: *id,
                purpose: record.map(|record| record.purpose),
                host: record.map(|record| record.host.clone()).unwrap_or_default(),
                since,
            });
        }
        waits.sort_by_key(|wait| (wait.since, wait.lease));
        self.report.waits_for = waits;
        Ok(())
    }

    /// Whether every restore point that was made under these leases is there: then nobody can be
    /// reading one that was forgotten since. Where that is not known the answer is no.
    pub(super) fn all_points_are_there(&self, leases: &[ObjectId]) -> Result<bool> {
        let own = self.lease.id();
        for id in leases.iter().filter(|id| Some(**id) != own) {
            let end = lease::read_end(self.context, *id)?.filter(|_| !self.is_judged(*id));
            let known = end.is_some_and(|end| {
                end.points.iter().all(|point| self.marks.points.contains(point))
            });
            if !known {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Lists the leases that have not ended. The roster by which boundaries are judged stays the one
    /// from before the marks.
    pub(super) fn now_at_work(&mut self) -> Result<Vec<ObjectId>> {
        let now = Roster::read(self.context, self.lease.id())?;
        let at_work: Vec<ObjectId> = now.unfinished(None).map(|(id, _)| id).collect();
        #[cfg(feature = "simulation")]
        if crate::simulation::is_weak(crate::simulation::Weakness::RosterReadAgain) {
            self.roster = now;
        }
        Ok(at_work.into_iter().filter(|id| !self.is_judged(*id)).collect())
    }
}
