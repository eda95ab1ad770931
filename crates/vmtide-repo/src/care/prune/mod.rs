//! Removing what no restore point needs, beside writers and readers (format §11).
//!
//! ```text
//! mark ─► condemn (put a list) ─► leases that were there have ended? ─► mark again ─► verdict
//!                                        └─ no: leave it to the next run       remove ◄──┘
//! ```
//!
//! 1. **Condemn.** What nothing needs goes on a list (`condemned/C/list`), as do packs of which so
//!    little is alive that it was stored elsewhere, with the forward that says where. Whoever begins
//!    from then on does not refer to what is on it.
//! 2. **Boundary.** The leases that have not ended when they are listed *after* the list can be seen
//!    are noted beside it. When all of them have ended or were revoked, nothing new can come to
//!    need what is on the list. Until then it stays; any later run, by anybody, goes on with it.
//! 3. **Verdict.** After that the restore points are listed again and marked. What of the list they do
//!    not need is dead: now, and for as long as the list is there. That is put beside the list, and
//!    takes effect where nobody is about to remove the list then.
//! 4. **Remove** what is dead. Whoever does so, and however much later a process that stood still
//!    goes on with it: it removes what is dead or gone.
//! 5. **Close.** When all that any verdict found dead is gone, the list goes. What is on it and was
//!    needed after all is not condemned any more. Before, `closing-R` is put and the verdicts are
//!    listed once more: one that took effect is seen by then, and one that is put later sees the
//!    closing and does not.
//!
//! None of it depends on who does it or on two not doing it at the same time.

mod condemn;
mod decide;
mod index;
mod leases;
mod repack;
mod report;
mod tidy;

pub use report::{PruneOptions, PruneReport, WaitsFor};

use super::mark::{Marker, Marks};
use crate::condemned::{Condemned, OpenList, VerdictRecord, read_all};
use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::lease::{Lease, LeaseRecord, Purpose, Revocations, Roster};
use crate::point_list::{self, Reading};
use crate::{ObjectId, RepoError, Result, record};
use condemn::Inventory;
use decide::Outcome;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmtide_block::{CancelToken, Progress};

/// How often a prune that waits for leases looks whether they have ended.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Says what a refusal to remove means: many a credential is meant to add and never to remove.
fn may_remove(outcome: Result<()>) -> Result<()> {
    outcome.map_err(|error| match error {
        RepoError::Denied { context, source } => RepoError::Denied {
            context: format!(
                "{context}: prune removes what nobody needs, and this user or credential may not \
                 remove objects; use one that may"
            ),
            source,
        },
        other => other,
    })
}

/// One run.
struct Pruner<'a> {
    context: &'a Arc<RepoContext>,
    lease: &'a Lease,
    options: &'a PruneOptions,
    progress: &'a Progress,
    cancel: &'a CancelToken,
    report: PruneReport,
    /// What is there, as it was when the run began. What was not there then never comes back.
    inventory: Inventory,
    /// The lists of which everything is in the inventory, or gone.
    known_lists: BTreeSet<ObjectId>,
    roster: Roster,
    revocations: Revocations,
    /// What leases say about their holders.
    records: BTreeMap<ObjectId, Option<LeaseRecord>>,
    /// Leases that this run revoked.
    revoked: BTreeSet<ObjectId>,
    /// Lists that are open.
    lists: Vec<OpenList>,
    condemned: Condemned,
    marks: Marks,
    /// The lists that were known when the marks were made.
    marked_with: Option<BTreeSet<ObjectId>>,
    /// The records of damage and healing that were known then.
    repairs: BTreeSet<ObjectId>,
    /// The verdicts that took effect, by list, with their ids.
    verdicts: BTreeMap<ObjectId, BTreeMap<ObjectId, VerdictRecord>>,
    /// What this run removed.
    removed: BTreeSet<String>,
    void: Vec<ObjectId>,
}

/// Prunes.
pub(crate) fn prune(
    context: &Arc<RepoContext>,
    options: &PruneOptions,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<PruneReport> {
    let lease = if options.dry_run {
        Lease::begin_reading(context, Purpose::Read)?
    } else {
        Lease::begin(context, Purpose::Prune)?
    };
    let mut pruner = Pruner {
        context,
        lease: &lease,
        options,
        progress,
        cancel,
        report: PruneReport { dry_run: options.dry_run, ..PruneReport::default() },
        inventory: Inventory::read(context)?,
        known_lists: BTreeSet::new(),
        roster: Roster::default(),
        revocations: Revocations::default(),
        records: BTreeMap::new(),
        revoked: BTreeSet::new(),
        lists: Vec::new(),
        condemned: Condemned::default(),
        marks: Marks::default(),
        marked_with: None,
        repairs: BTreeSet::new(),
        verdicts: BTreeMap::new(),
        removed: BTreeSet::new(),
        void: Vec::new(),
    };
    let outcome = if options.dry_run { pruner.explain() } else { pruner.run() };
    let report = std::mem::take(&mut pruner.report);
    outcome.map(|()| report).map_err(|error| lease.explain(error))
}

impl Pruner<'_> {
    fn run(&mut self) -> Result<()> {
        self.look_at_leases()?;
        self.keep_off_others()?;
        self.remove_leftovers()?;
        // What earlier runs left comes first, so that a full store can be pruned.
        self.go_on()?;
        if self.condemn()? {
            self.go_on()?;
        }
        let deadline = Instant::now().checked_add(self.options.wait);
        while !self.report.waits_for.is_empty()
            && deadline.is_some_and(|deadline| Instant::now() < deadline)
        {
            self.cancel.check()?;
            std::thread::sleep(LOOK_AGAIN.min(self.options.wait));
            self.go_on()?;
        }
        self.tidy()?;
        self.count_what_stays();
        Ok(())
    }

    /// Goes on with all lists as far as they come. The order is part of the protocol: leases are
    /// listed when the lists can be seen, restore points after that.
    fn go_on(&mut self) -> Result<()> {
        self.look_at_lists()?;
        self.look_at_leases()?;
        self.mark()?;
        self.advance_all()
    }

    /// Says what a run would do.
    fn explain(&mut self) -> Result<()> {
        self.roster = Roster::read(self.context, self.lease.id())?;
        self.revocations = Revocations::read(self.context)?;
        self.look_at_lists()?;
        self.mark()?;
        self.report.void_points = self.void.len() as u64;
        let candidates = self.candidates()?;
        self.report.packs_removed = candidates.packs.len() as u64;
        self.report.packs_repacked = candidates.sparse.len() as u64;
        self.report.maps_removed = candidates.maps.len() as u64;
        self.report.rewritten_bytes = candidates.sparse.iter().map(|(_, live)| live).sum();
        self.report.freed_bytes = candidates.freed_bytes;
        let own = self.lease.id();
        let mut waits: BTreeSet<ObjectId> = self
            .roster
            .unfinished(own)
            .map(|(id, _)| id)
            .filter(|id| !self.is_judged(*id))
            .collect();
        let expired = |id: &ObjectId| {
            self.roster.get(*id).is_none_or(|lease| lease.is_expired(self.roster.now))
        };
        waits.retain(|id| !expired(id));
        self.name_waits(&waits)?;
        for list in &self.lists {
            self.report.waiting_objects += list.record.len() as u64;
            self.report.waiting_bytes += self.inventory.bytes_of(&list.record);
        }
        self.count_what_stays();
        Ok(())
    }

    /// Reads the lists that are open now.
    fn look_at_lists(&mut self) -> Result<()> {
        self.lists = read_all(self.context)?;
        self.condemned = Condemned::of(&self.lists);
        // What is on a list of somebody else may be newer than the inventory.
        if !self.condemned.lists.is_subset(&self.known_lists) {
            self.inventory = Inventory::read(self.context)?;
            self.known_lists.extend(&self.condemned.lists);
        }
        Ok(())
    }

    /// Marks what is needed: by the restore points that are there now, as far as that is not marked
    /// already. What is condemned was read before, so that nothing counts as staying that is not.
    fn mark(&mut self) -> Result<()> {
        #[cfg(feature = "simulation")]
        if self.marked_with.is_some()
            && crate::simulation::is_weak(crate::simulation::Weakness::MarkedBefore)
        {
            return Ok(());
        }
        let mut repairs: BTreeSet<ObjectId> = BTreeSet::new();
        for kind in [ObjectKind::Damaged, ObjectKind::Healed] {
            repairs.extend(record::list(self.context, kind)?);
        }
        if self.marked_with.as_ref() != Some(&self.condemned.lists) || self.repairs != repairs {
            // Other forwards may be the ones to keep now, and other places be needed.
            self.marks = Marks::default();
            self.marked_with = Some(self.condemned.lists.clone());
            self.repairs = repairs;
        }
        let mut list = point_list::load(self.context, Reading::Remembered)?;
        if let Some((_, error)) = list.first_lost().or_else(|| list.unreadable_holds.pop()) {
            return Err(error);
        }
        let marker = Marker::new(self.context, &self.condemned, self.cancel);
        marker.add_moved(&mut self.marks)?;
        marker.add_points(&mut self.marks, &list.points)?;
        self.marks.points = list.points.iter().map(|point| point.id).collect();
        self.void = list.void;
        Ok(())
    }

    /// Goes on with every list as far as it comes.
    fn advance_all(&mut self) -> Result<()> {
        self.report.waiting_objects = 0;
        self.report.waiting_bytes = 0;
        self.report.locked_objects = 0;
        let mut waits = BTreeSet::new();
        for list in std::mem::take(&mut self.lists) {
            self.cancel.check()?;
            match self.advance(&list)? {
                Outcome::Gone => {}
                Outcome::Stays => self.lists.push(list),
                Outcome::Waits(leases) => {
                    waits.extend(leases);
                    self.report.waiting_objects += list.record.len() as u64;
                    self.report.waiting_bytes += self.inventory.bytes_of(&list.record);
                    self.lists.push(list);
                }
            }
        }
        self.name_waits(&waits)
    }

    fn count_what_stays(&mut self) {
        let gone = |id: &&ObjectId| self.removed.contains(&ObjectKind::Pack.object_name(**id));
        let packs = self.inventory.packs.keys();
        self.report.packs_kept = packs.filter(|id| !gone(id)).count() as u64;
        if self.options.dry_run {
            let going = self.report.packs_removed + self.report.packs_repacked;
            self.report.packs_kept = self.report.packs_kept.saturating_sub(going);
        }
    }
}
