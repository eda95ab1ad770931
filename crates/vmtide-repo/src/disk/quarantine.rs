//! What was found damaged, on record (format §10.1).
//!
//! Whoever meets a frame or a pack that cannot be read puts it on record under `damaged/`. Nothing
//! refers to what is on record any more: writers store such content again, and by that heal it
//! ([`Healed`](super::Healed)). A record is a note for everybody, not a verdict: who reads a frame
//! in spite of one verifies every byte of it as always.

use crate::context::RepoContext;
use crate::envelope::ObjectKind;
use crate::{Location, ObjectId, RepoError, Result, record};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};

/// Parts of packs in one record; what is more goes into another. Each takes some 150 bytes of JSON.
const PARTS_PER_RECORD: usize = 10_000;

/// A part of a pack that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedPart {
    /// The pack.
    pub pack: ObjectId,
    /// The frame's number in the pack; none where the pack as a whole is missing or its directory
    /// cannot be read.
    pub frame: Option<u32>,
    /// The first block of the frame, counted through the pack; 0 for the whole pack.
    pub first_block: u32,
    /// How many blocks are in the frame; 2³² − 1, which is more than there can be, for the whole pack.
    pub blocks: u32,
    /// What is wrong.
    pub detail: String,
}

impl DamagedPart {
    /// The whole of a pack.
    pub(crate) const fn whole(pack: ObjectId, detail: String) -> Self {
        Self { pack, frame: None, first_block: 0, blocks: u32::MAX, detail }
    }

    const fn end(&self) -> u32 {
        self.first_block.saturating_add(self.blocks)
    }
}

/// One record under `damaged/`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DamageRecord {
    /// When it was found.
    pub found: Timestamp,
    /// By what: `verify`, `restore`, `backup`.
    pub by: String,
    /// The program and version.
    pub program: String,
    /// What.
    pub parts: Vec<DamagedPart>,
    /// Records that count no more: this one says what is left of them.
    #[serde(default)]
    pub replaces: Vec<ObjectId>,
}

/// A part on record, with where it is on record.
#[derive(Clone, Debug)]
pub(crate) struct Quarantined {
    /// What.
    pub part: DamagedPart,
    /// Since when.
    pub found: Timestamp,
    /// By what it was found.
    pub by: String,
}

/// All that is on record. Empty in nearly every repository.
#[derive(Debug, Default)]
pub(crate) struct Quarantine {
    packs: HashMap<ObjectId, Vec<Quarantined>>,
    /// All records there are.
    pub records: Vec<ObjectId>,
    /// Records that cannot be read.
    pub unreadable: Vec<RepoError>,
}

impl Quarantine {
    /// Reads all records. One that is damaged is passed over: what it says is found again.
    ///
    /// # Errors
    /// Those of the store.
    pub fn load(context: &RepoContext) -> Result<Self> {
        let records = record::list(context, ObjectKind::Damaged)?;
        let mut quarantine = Self { records, ..Self::default() };
        let mut found = Vec::new();
        let mut replaced = HashSet::new();
        for id in &quarantine.records {
            match record::read::<DamageRecord>(context, ObjectKind::Damaged, *id) {
                Ok(content) => {
                    replaced.extend(content.replaces.iter().copied());
                    found.push((*id, content));
                }
                Err(error @ (RepoError::Damaged { .. } | RepoError::Unsupported { .. })) => {
                    tracing::warn!(%error, "a record of damage is passed over");
                    quarantine.unreadable.push(error);
                }
                Err(error) => return Err(error),
            }
        }
        for (_, content) in found.into_iter().filter(|(id, _)| !replaced.contains(id)) {
            quarantine.add(content);
        }
        for parts in quarantine.packs.values_mut() {
            parts.sort_by_key(|entry| (entry.part.first_block, entry.part.end()));
        }
        Ok(quarantine)
    }

    fn add(&mut self, content: DamageRecord) {
        let DamageRecord { found, by, parts, .. } = content;
        for part in parts {
            let entry = Quarantined { part, found, by: by.clone() };
            self.packs.entry(entry.part.pack).or_default().push(entry);
        }
    }

    /// Whether nothing is on record.
    pub fn is_empty(&self) -> bool {
        self.packs.is_empty()
    }

    /// All that is on record.
    pub fn iter(&self) -> impl Iterator<Item = &Quarantined> {
        self.packs.values().flatten()
    }

    /// Whether the block is on record as damaged.
    pub fn covers(&self, place: Location) -> bool {
        self.entry(place).is_some()
    }

    /// The entry that the block is in.
    pub fn entry(&self, place: Location) -> Option<&Quarantined> {
        let within = |entry: &&Quarantined| {
            (entry.part.first_block..entry.part.end()).contains(&place.ordinal)
        };
        self.packs.get(&place.pack)?.iter().find(within)
    }

    /// Whether the block is on record with its pack, and in no part of its own: that the pack is
    /// there and opens speaks against such a record.
    pub fn covers_pack_only(&self, place: Location) -> bool {
        let parts = self.packs.get(&place.pack).into_iter().flatten().map(|entry| &entry.part);
        let mut over =
            parts.filter(|part| (part.first_block..part.end()).contains(&place.ordinal)).peekable();
        over.peek().is_some() && over.all(|part| part.frame.is_none())
    }

    /// For how many blocks from `place` on (at most `count`) the answer of [`covers`](Self::covers)
    /// stays the same.
    pub fn same_for(&self, place: Location, count: u32) -> u32 {
        let edges = self.packs.get(&place.pack).into_iter().flatten();
        edges
            .flat_map(|entry| [entry.part.first_block, entry.part.end()])
            .filter_map(|edge| edge.checked_sub(place.ordinal).filter(|blocks| *blocks > 0))
            .fold(count, u32::min)
    }
}

/// Puts parts on record.
///
/// # Errors
/// Those of the store.
pub(crate) fn write_damaged(context: &RepoContext, by: &str, parts: &[DamagedPart]) -> Result<()> {
    for parts in parts.chunks(PARTS_PER_RECORD) {
        let content = DamageRecord {
            found: Timestamp::now(),
            by: by.into(),
            program: crate::PROGRAM.into(),
            parts: parts.to_vec(),
            replaces: Vec::new(),
        };
        record::write(context, ObjectKind::Damaged, ObjectId::random()?, &content)?;
    }
    Ok(())
}
