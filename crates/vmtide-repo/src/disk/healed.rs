//! Where content that was damaged is stored once more (format §10.1).
//!
//! A backup that meets the content of a damaged chunk stores it again, and notes under `healed/`
//! which blocks of which pack it stands for. Readers of any restore point go to the new place; the
//! maps stay as they are. A note counts only where what it leads to can be reached, so that one
//! left by a backup that came to nothing does no harm.

use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::{Location, ObjectId, RepoError, Result, record};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};

/// Runs in one record; what is more goes into another. Each takes at most 50 bytes of JSON.
const RUNS_PER_RECORD: usize = 50_000;

/// One record under `healed/`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct HealedRecord {
    /// When it was written.
    written: Timestamp,
    /// By what: `backup`, `repair`.
    by: String,
    /// The program and version.
    program: String,
    /// The packs, which runs name by position.
    packs: Vec<ObjectId>,
    /// Damaged pack, its first block, count of blocks, sound pack, its first block.
    runs: Vec<[u32; 5]>,
}

/// Some neighbouring blocks of a damaged pack, and where they are stored once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HealedRun {
    /// The first block in the damaged pack.
    pub ordinal: u32,
    /// How many blocks.
    pub count: u32,
    /// Where the first of them is now.
    pub target: Location,
    /// The record that says so.
    pub record: ObjectId,
}

impl HealedRun {
    /// The block after the last.
    pub const fn end(&self) -> u32 {
        self.ordinal.saturating_add(self.count)
    }
}

/// All that was healed. Empty in nearly every repository.
#[derive(Debug, Default)]
pub(crate) struct Healed {
    packs: HashMap<ObjectId, Vec<HealedRun>>,
    /// Records that cannot be read.
    pub unreadable: Vec<RepoError>,
}

impl Healed {
    /// Reads all records. One that is damaged is passed over: what it heals is damaged again.
    ///
    /// # Errors
    /// Those of the store.
    pub fn load(context: &RepoContext) -> Result<Self> {
        let mut healed = Self::default();
        for id in record::list(context, ObjectKind::Healed)? {
            let read = record::read::<HealedRecord>(context, ObjectKind::Healed, id)
                .and_then(|content| healed.add(id, &content));
            match read {
                Err(error @ (RepoError::Damaged { .. } | RepoError::Unsupported { .. })) => {
                    tracing::warn!(%error, "a record of what was healed is passed over");
                    healed.unreadable.push(error);
                }
                other => other?,
            }
        }
        for runs in healed.packs.values_mut() {
            runs.sort_by_key(|run| (run.ordinal, run.record));
        }
        Ok(healed)
    }

    fn add(&mut self, id: ObjectId, content: &HealedRecord) -> Result<()> {
        let pack = |number: u32| content.packs.get(number as usize).copied();
        for &[from, ordinal, count, to, target] in &content.runs {
            let fits = count > 0
                && ordinal.checked_add(count).is_some()
                && target.checked_add(count).is_some();
            let (Some(from), Some(to), true) = (pack(from), pack(to), fits) else {
                let name = ObjectKind::Healed.object_name(id);
                return Err(RepoError::damaged(
                    name,
                    format!("run [{from}, {ordinal}, {count}, {to}, {target}] is not possible"),
                ));
            };
            let target = Location { pack: to, ordinal: target };
            let run = HealedRun { ordinal, count, target, record: id };
            self.packs.entry(from).or_default().push(run);
        }
        Ok(())
    }

    /// The records that are of no other damaged packs than these.
    pub fn records_of_only(&self, packs: &BTreeSet<ObjectId>) -> BTreeSet<ObjectId> {
        let records = |wanted: bool| {
            let runs = self.packs.iter().filter(move |(id, _)| packs.contains(id) == wanted);
            runs.flat_map(|(_, runs)| runs).map(|run| run.record).collect::<BTreeSet<_>>()
        };
        &records(true) - &records(false)
    }

    /// The packs that were damaged.
    pub fn packs(&self) -> impl Iterator<Item = ObjectId> + '_ {
        self.packs.keys().copied()
    }

    /// Whether nothing was healed.
    pub fn is_empty(&self) -> bool {
        self.packs.is_empty()
    }

    /// The runs over the block; several where it was healed more than once.
    pub fn over(&self, place: Location) -> impl Iterator<Item = &HealedRun> {
        let runs = self.packs.get(&place.pack).into_iter().flatten();
        runs.filter(move |run| (run.ordinal..run.end()).contains(&place.ordinal))
    }

    /// For how many blocks from `place` on (at most `count`) the same runs lie over them.
    pub fn same_for(&self, place: Location, count: u32) -> u32 {
        let runs = self.packs.get(&place.pack).into_iter().flatten();
        runs.flat_map(|run| [run.ordinal, run.end()])
            .filter_map(|edge| edge.checked_sub(place.ordinal).filter(|blocks| *blocks > 0))
            .fold(count, u32::min)
    }
}

/// Some blocks of a damaged pack that are stored once more: where they were, how many, where they
/// are.
pub(crate) type Heal = (Location, u32, Location);

/// Puts on record what was healed. What it leads to must be durable. Answers with the blocks.
///
/// # Errors
/// Those of the store.
pub(crate) fn write_healed(context: &RepoContext, by: &str, mut heals: Vec<Heal>) -> Result<u64> {
    heals.sort_unstable();
    heals.dedup();
    let mut runs: Vec<Heal> = Vec::new();
    for (from, count, to) in heals {
        match runs.last_mut() {
            Some((first, length, target))
                if first.pack == from.pack
                    && first.ordinal + *length == from.ordinal
                    && target.pack == to.pack
                    && target.ordinal + *length == to.ordinal =>
            {
                *length += count;
            }
            _ => runs.push((from, count, to)),
        }
    }
    for runs in runs.chunks(RUNS_PER_RECORD) {
        let mut numbers = HashMap::new();
        let mut packs = Vec::new();
        let mut number = |id: ObjectId| -> Result<u32> {
            let next = u32::try_from(packs.len())
                .map_err(|_| RepoError::Invalid("too many packs to heal".into()))?;
            Ok(*numbers.entry(id).or_insert_with(|| {
                packs.push(id);
                next
            }))
        };
        let runs = runs
            .iter()
            .map(|(from, count, to)| {
                Ok([number(from.pack)?, from.ordinal, *count, number(to.pack)?, to.ordinal])
            })
            .collect::<Result<Vec<_>>>()?;
        let content = HealedRecord {
            written: Timestamp::now(),
            by: by.into(),
            program: crate::PROGRAM.into(),
            packs,
            runs,
        };
        record::write(context, ObjectKind::Healed, ObjectId::random()?, &content)?;
    }
    Ok(runs.iter().map(|(_, count, _)| u64::from(*count)).sum())
}
