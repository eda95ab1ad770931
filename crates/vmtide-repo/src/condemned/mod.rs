//! Condemned lists: what a prune wants to remove, for everybody to see before it is removed.
//!
//! `condemned/C/list` is put first. From when it can be seen until all of it is gone (or the list
//! is), nobody who begins refers to anything on it: a writer reads all lists after its lease can be
//! seen, and treats what is on them as not there. So once every lease that was there *before* the
//! list has ended, nothing new can come to need what is on it, whoever looks and whenever; see
//! `care/prune` for what is decided then, and format §11 for why it is safe.

mod record;

pub(crate) use record::{
    Beside, BoundaryRecord, CondemnedRecord, OpenList, VerdictRecord, list_beside, read_all,
};

use crate::context::RepoContext;
use crate::{ObjectId, RepoError, Result};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// Everything that is condemned, as it was at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Condemned {
    /// A list could not be read: everything may be on it.
    everything: bool,
    packs: HashSet<ObjectId>,
    maps: HashSet<ObjectId>,
    forwards: HashSet<ObjectId>,
    /// Packs whose live chunks were moved, and the forwards that say where to.
    moved: BTreeMap<ObjectId, Vec<ObjectId>>,
    /// The lists that this is from.
    pub lists: BTreeSet<ObjectId>,
}

impl Condemned {
    /// Reads all lists, for a writer: where one cannot be read, everything counts as condemned, so
    /// that a backup stores all it needs itself instead of failing.
    ///
    /// # Errors
    /// Those of the store other than damage.
    pub fn read(context: &RepoContext) -> Result<Self> {
        #[cfg(feature = "simulation")]
        if crate::simulation::is_weak(crate::simulation::Weakness::CondemnedIgnored) {
            return Ok(Self::default());
        }
        match read_all(context) {
            Ok(lists) => Ok(Self::of(&lists)),
            Err(error @ (RepoError::Damaged { .. } | RepoError::Unsupported { .. })) => {
                tracing::warn!(%error, "what is about to be removed is not known; nothing of what is \
                    stored is referred to, and everything is stored again");
                Ok(Self { everything: true, ..Self::default() })
            }
            Err(error) => Err(error),
        }
    }

    /// All that is on these lists.
    pub fn of(lists: &[OpenList]) -> Self {
        let mut condemned = Self::default();
        for list in lists {
            condemned.lists.insert(list.id);
            condemned.add(&list.record);
        }
        condemned
    }

    /// Adds what is on a list.
    pub fn add(&mut self, record: &CondemnedRecord) {
        self.packs.extend(&record.packs);
        self.maps.extend(&record.maps);
        self.forwards.extend(record.forwards.iter().map(|(_, forward)| forward));
        for (pack, forward) in &record.moved {
            let forwards = self.moved.entry(*pack).or_default();
            if !forwards.contains(forward) {
                forwards.push(*forward);
            }
        }
    }

    /// Whether a pack is.
    pub fn has_pack(&self, id: ObjectId) -> bool {
        self.everything || self.packs.contains(&id)
    }

    /// Whether a map segment is.
    pub fn has_map(&self, id: ObjectId) -> bool {
        self.everything || self.maps.contains(&id)
    }

    /// Whether a forward is.
    pub fn has_forward(&self, id: ObjectId) -> bool {
        self.everything || self.forwards.contains(&id)
    }

    /// Whether any forward or pack is, so that the way through forwards has to be looked at.
    pub fn concerns_packs(&self) -> bool {
        self.everything || !self.packs.is_empty() || !self.forwards.is_empty()
    }

    /// The packs that were moved, with the forwards that say where to.
    pub fn moved(&self) -> impl Iterator<Item = (ObjectId, &[ObjectId])> {
        self.moved.iter().map(|(pack, forwards)| (*pack, forwards.as_slice()))
    }
}
