//! What is there, and what of it is to go.

use super::Pruner;
use super::repack::Mover;
use crate::care::mark::Marker;
use crate::condemned::{Condemned, CondemnedRecord, OpenList};
use crate::context::RepoContext;
use crate::disk::write_forward;
use crate::envelope::ObjectKind;
use crate::{ObjectId, Result};
use jiff::Timestamp;
use std::collections::BTreeMap;

/// Objects on one list at most; what is more goes on another. Each takes some 40 bytes of JSON, twice
/// for a forward.
const OBJECTS_PER_LIST: usize = 20_000;

/// As [`OBJECTS_PER_LIST`]; in a simulation so few that what happens between two lists is met.
fn objects_per_list() -> usize {
    #[cfg(feature = "simulation")]
    if crate::simulation::process().is_some() {
        return 2;
    }
    OBJECTS_PER_LIST
}

/// Packs that are reached through this many forwards are not moved again (format §10 allows 16).
const MAX_DEPTH: usize = crate::disk::MAX_FORWARDS - 1;

/// An object in the inventory: its length, and when it was written in the store's time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored {
    pub length_bytes: u64,
    pub modified: Timestamp,
}

/// All packs, map segments and forwards.
#[derive(Debug, Default)]
pub(super) struct Inventory {
    pub packs: BTreeMap<ObjectId, Stored>,
    pub maps: BTreeMap<ObjectId, Stored>,
    /// By pack and forward.
    pub forwards: BTreeMap<(ObjectId, ObjectId), Stored>,
}

impl Inventory {
    /// Lists them. What has no id for a name is not ours.
    ///
    /// # Errors
    /// Those of the store.
    pub fn read(context: &RepoContext) -> Result<Self> {
        let mut inventory = Self {
            packs: list(context, ObjectKind::Pack)?,
            maps: list(context, ObjectKind::MapSegment)?,
            forwards: BTreeMap::new(),
        };
        context.store.list(ObjectKind::Forward.prefix(), &mut |entry| {
            let mut ids = entry.name.split('/').skip(1).map(str::parse::<ObjectId>);
            if let (Some(Ok(pack)), Some(Ok(forward)), None) = (ids.next(), ids.next(), ids.next())
            {
                let stored = Stored { length_bytes: entry.length_bytes, modified: entry.modified };
                inventory.forwards.insert((pack, forward), stored);
            }
            Ok(())
        })?;
        Ok(inventory)
    }

    /// What is there of the objects of a list, by name, with their lengths.
    pub fn names_of(&self, record: &CondemnedRecord) -> Vec<(String, u64)> {
        let packs = record
            .packs
            .iter()
            .filter_map(|id| Some((ObjectKind::Pack.object_name(*id), self.packs.get(id)?)));
        let maps = record
            .maps
            .iter()
            .filter_map(|id| Some((ObjectKind::MapSegment.object_name(*id), self.maps.get(id)?)));
        let forwards = record.forwards.iter().filter_map(|(pack, id)| {
            let name = ObjectKind::Forward.name_under(*pack, *id);
            Some((name, self.forwards.get(&(*pack, *id))?))
        });
        let all = packs.chain(maps).chain(forwards);
        all.map(|(name, stored)| (name, stored.length_bytes)).collect()
    }

    /// The bytes of what is there of the objects of a list.
    pub fn bytes_of(&self, record: &CondemnedRecord) -> u64 {
        self.names_of(record).iter().map(|(_, bytes)| bytes).sum()
    }
}

/// All objects of a kind.
pub(super) fn list(context: &RepoContext, kind: ObjectKind) -> Result<BTreeMap<ObjectId, Stored>> {
    let mut found = BTreeMap::new();
    context.store.list(kind.prefix(), &mut |entry| {
        let id = entry.name.rsplit('/').next().and_then(|name| name.parse::<ObjectId>().ok());
        if let Some(id) = id.filter(|id| kind.object_name(*id) == entry.name) {
            let stored = Stored { length_bytes: entry.length_bytes, modified: entry.modified };
            found.insert(id, stored);
        }
        Ok(())
    })?;
    Ok(found)
}

/// What is to be condemned.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    pub packs: Vec<ObjectId>,
    pub maps: Vec<ObjectId>,
    pub forwards: Vec<(ObjectId, ObjectId)>,
    /// Packs that are worth rewriting, with about how many bytes of them are alive.
    pub sparse: Vec<(ObjectId, u64)>,
    /// About what will be freed.
    pub freed_bytes: u64,
}

impl Pruner<'_> {
    /// What nothing needs and nobody has condemned yet.
    pub(super) fn candidates(&mut self) -> Result<Candidates> {
        // What is younger than somebody at work was perhaps made by them, and will be needed. It
        // would come back from the list; this only spares the work.
        let oldest = self.oldest_writer()?;
        // From a list that somebody began to close nothing is removed any more.
        let open: Vec<OpenList> =
            self.lists.iter().filter(|list| !list.beside.is_closing).cloned().collect();
        let condemned = Condemned::of(&open);
        let mut found = Candidates::default();
        let mut new_objects = 0;
        let mut is_due = |stored: &Stored| {
            let is_new = oldest.is_some_and(|oldest| stored.modified >= oldest);
            new_objects += u64::from(is_new);
            !is_new
        };
        for (id, stored) in &self.inventory.packs {
            let needed = self.marks.packs.contains_key(id)
                || self.marks.damaged.contains(id)
                || self.is_removed_pack(*id);
            if !needed && !condemned.has_pack(*id) && is_due(stored) {
                found.packs.push(*id);
                found.freed_bytes += stored.length_bytes;
            }
        }
        for (id, stored) in &self.inventory.maps {
            let name = ObjectKind::MapSegment.object_name(*id);
            let needed = self.marks.maps.contains(id) || self.removed.contains(&name);
            if !needed && !condemned.has_map(*id) && is_due(stored) {
                found.maps.push(*id);
                found.freed_bytes += stored.length_bytes;
            }
        }
        for ((pack, id), stored) in &self.inventory.forwards {
            let name = ObjectKind::Forward.name_under(*pack, *id);
            let needed = self.marks.forwards.contains(id) || self.removed.contains(&name);
            if !needed && !condemned.has_forward(*id) && is_due(stored) {
                found.forwards.push((*pack, *id));
                found.freed_bytes += stored.length_bytes;
            }
        }
        self.find_sparse(&condemned, oldest, &mut found)?;
        self.report.new_objects = new_objects;
        Ok(found)
    }

    fn is_removed_pack(&self, id: ObjectId) -> bool {
        self.removed.contains(&ObjectKind::Pack.object_name(id))
    }

    /// The packs worth rewriting, those first of which least is alive, as far as the limit goes.
    fn find_sparse(
        &self,
        condemned: &Condemned,
        oldest: Option<Timestamp>,
        found: &mut Candidates,
    ) -> Result<()> {
        let percent = u64::from(self.options.repack_below_percent);
        let marker = Marker::new(self.context, &self.condemned, self.cancel);
        let mut sparse = Vec::new();
        for (id, stored) in &self.inventory.packs {
            let Some(live) = self.marks.packs.get(id) else { continue };
            let depth = self.marks.depth.get(id).copied().unwrap_or(0);
            let is_new = oldest.is_some_and(|oldest| stored.modified >= oldest);
            if percent == 0
                || is_new
                || depth >= MAX_DEPTH
                || condemned.has_pack(*id)
                || self.is_removed_pack(*id)
            {
                continue;
            }
            let Some(pack) = marker.pack(*id)? else { continue };
            let (live, total) = (live.count(), pack.chunk_count() as u64);
            if live * 100 < total * percent {
                let live_bytes =
                    u128::from(stored.length_bytes) * u128::from(live) / u128::from(total.max(1));
                let live_bytes = u64::try_from(live_bytes).unwrap_or(u64::MAX);
                // By what part of it is alive.
                let rank = live.saturating_mul(1 << 20) / total.max(1);
                sparse.push((rank, *id, live_bytes, stored.length_bytes));
            }
        }
        sparse.sort_unstable();
        let mut left = self.options.max_repack_bytes.unwrap_or(u64::MAX);
        for (_, id, live_bytes, length_bytes) in sparse {
            let Some(rest) = left.checked_sub(live_bytes) else { continue };
            left = rest;
            found.freed_bytes += length_bytes.saturating_sub(live_bytes);
            found.sparse.push((id, live_bytes));
        }
        Ok(())
    }

    /// Puts what nothing needs on lists, and makes the index anew without it. Answers with whether
    /// there was anything.
    pub(super) fn condemn(&mut self) -> Result<bool> {
        let candidates = self.candidates()?;
        let moved = self.repack(&candidates.sparse)?;
        let mut records = vec![CondemnedRecord::default()];
        let next = |records: &mut Vec<CondemnedRecord>, add: &dyn Fn(&mut CondemnedRecord)| {
            if records.last().is_none_or(|record| record.len() >= objects_per_list()) {
                records.push(CondemnedRecord::default());
            }
            records.last_mut().into_iter().for_each(add);
        };
        for id in &candidates.packs {
            next(&mut records, &|record| record.packs.push(*id));
        }
        for (pack, forward) in &moved {
            next(&mut records, &|record| {
                record.packs.push(*pack);
                record.moved.push((*pack, *forward));
            });
        }
        for id in &candidates.maps {
            next(&mut records, &|record| record.maps.push(*id));
        }
        for forward in &candidates.forwards {
            next(&mut records, &|record| record.forwards.push(*forward));
        }
        records.retain(|record| record.len() > 0);
        if records.is_empty() {
            if self.is_index_incomplete()? {
                self.rebuild_index()?;
            }
            return Ok(false);
        }
        let has_packs = records.iter().any(|record| !record.packs.is_empty());
        for record in records {
            let record = CondemnedRecord { lease: self.lease.id(), ..record };
            let list = OpenList::put(self.context, record)?;
            self.adopt(&list)?;
        }
        if has_packs || self.is_index_incomplete()? {
            self.rebuild_index()?;
        }
        Ok(true)
    }

    /// Takes a list of this run into what is known, so that the marks need not be made anew: nothing
    /// on it is marked but packs that were moved, and for these the forwards are.
    fn adopt(&mut self, list: &OpenList) -> Result<()> {
        self.known_lists.insert(list.id);
        self.condemned.lists.insert(list.id);
        self.condemned.add(&list.record);
        if let Some(known) = &mut self.marked_with {
            known.insert(list.id);
        }
        let marker = Marker::new(self.context, &self.condemned, self.cancel);
        for (pack, forward) in &list.record.moved {
            marker.add_forward(&mut self.marks, *pack, *forward)?;
        }
        Ok(())
    }

    /// Rewrites packs without their dead chunks, and writes their forwards. Answers with both. A damaged pack is left as it is: it must not keep the others
    /// from being rewritten.
    fn repack(&mut self, sparse: &[(ObjectId, u64)]) -> Result<Vec<(ObjectId, ObjectId)>> {
        let length =
            |id: &ObjectId| self.inventory.packs.get(id).map_or(0, |pack| pack.length_bytes);
        self.progress.add_total(sparse.iter().map(|(id, _)| length(id)).sum());
        let marker = Marker::new(self.context, &self.condemned, self.cancel);
        let mut mover = Mover::new(self.context, self.options.pack_size_bytes)?;
        let mut moved = Vec::new();
        for (id, _) in sparse {
            self.cancel.check()?;
            let (Some(pack), Some(live)) = (marker.pack(*id)?, self.marks.packs.get(id)) else {
                continue;
            };
            match mover.move_chunks(&pack, live) {
                Ok(moves) => moved.push((*id, moves)),
                Err(error) if error.is_damage() => {
                    tracing::warn!(%error, "a damaged pack is left as it is");
                    self.report.packs_damaged += 1;
                }
                Err(error) => return Err(error),
            }
            self.progress.add_done(pack.length_bytes());
        }
        // Forwards may only name packs that are durable.
        let bytes = mover.finish()?;
        self.report.rewritten_bytes += bytes;
        self.report.packs_repacked += moved.len() as u64;
        let forwards = moved
            .iter()
            .map(|(id, moves)| Ok((*id, write_forward(self.context, *id, moves)?)))
            .collect::<Result<Vec<_>>>()?;
        Ok(forwards)
    }
}
