//! Resilient change tracking of one virtual disk, by a set of written ranges per sealed id.
//!
//! Sealing an id begins a new epoch; what was written since an id is the union of the epochs from it on. An
//! id is known as long as a reference point or a checkpoint stands for it. That is stricter than what others
//! have seen of real hosts, and shows who destroys a base too early.

use crate::random::Random;
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;
use vmtide_block::{ByteRange, RangeSet};

/// `ERROR_VHD_INVALID_CHANGE_TRACKING_ID`.
pub(crate) const INVALID_ID: u32 = 0xC03A_0029;
/// `ERROR_VHD_CHANGE_TRACKING_DISABLED`.
pub(crate) const DISABLED: u32 = 0xC03A_002A;
/// `ERROR_VHD_MISSING_CHANGE_TRACKING_INFORMATION`.
pub(crate) const MISSING: u32 = 0xC03A_0030;

/// The tracking of a disk.
#[derive(Clone, Debug)]
pub(crate) struct Tracking {
    /// Whether writes are recorded: from the first checkpoint for a backup.
    pub(crate) enabled: bool,
    guid: Uuid,
    /// The number of the epoch that is being written.
    counter: u32,
    /// What was written in each epoch.
    epochs: BTreeMap<u32, RangeSet>,
    /// The ids that may be asked about.
    known: BTreeSet<u32>,
    /// Writes are reported in whole multiples of this.
    granularity_bytes: u64,
}

impl Tracking {
    pub(crate) fn new(random: &mut Random, granularity_bytes: u64) -> Self {
        Self {
            enabled: false,
            guid: random.guid(),
            counter: 0,
            epochs: BTreeMap::new(),
            known: BTreeSet::new(),
            granularity_bytes,
        }
    }

    /// The id of an epoch.
    pub(crate) fn id(&self, epoch: u32) -> String {
        let guid = self.guid.hyphenated().to_string().replace('-', ":");
        format!("rctX:{guid}:{epoch:08x}")
    }

    /// The epoch that is being written.
    pub(crate) const fn current(&self) -> u32 {
        self.counter
    }

    /// Ends the epoch and seals the next id; its number.
    pub(crate) fn seal(&mut self) -> u32 {
        self.counter += 1;
        self.epochs.insert(self.counter, RangeSet::new());
        self.known.insert(self.counter);
        self.counter
    }

    /// Records a write.
    pub(crate) fn record(&mut self, range: ByteRange, size_bytes: u64) {
        if self.enabled
            && let Some(epoch) = self.epochs.get_mut(&self.counter)
        {
            epoch.insert(range.align_outward(self.granularity_bytes, size_bytes));
        }
    }

    /// Forgets all ids but those in use. Nothing is lost that another id needs: epochs stay.
    pub(crate) fn keep(&mut self, used: &BTreeSet<u32>) {
        self.known.retain(|epoch| used.contains(epoch));
    }

    /// The ids that are known.
    pub(crate) fn known_ids(&self) -> impl Iterator<Item = String> + '_ {
        self.known.iter().map(|epoch| self.id(*epoch))
    }

    /// Begins anew: no earlier id is known.
    pub(crate) fn reset(&mut self, random: &mut Random) {
        self.guid = random.guid();
        self.epochs.clear();
        self.known.clear();
    }

    /// Goes on from an earlier state of the disk, without knowing of it: ids of later moments stay known, new ones are
    /// counted from then, and what was written in between is forgotten.
    pub(crate) fn go_back(&mut self, earlier: &Self) {
        self.guid = earlier.guid;
        self.counter = earlier.counter;
        self.epochs.clone_from(&earlier.epochs);
    }

    /// The bitmap in memory is lost, and the coarse one of the disk takes its place: what was written since
    /// the last id is reported in multiples of `coarse_bytes`.
    pub(crate) fn coarsen(&mut self, coarse_bytes: u64, size_bytes: u64) {
        if let Some(epoch) = self.epochs.get_mut(&self.counter) {
            *epoch = epoch.align_outward(coarse_bytes, size_bytes);
        }
    }

    /// What was written since `id` up to the moment at which epoch `until` was sealed.
    pub(crate) fn since(&self, id: &str, until: Option<u32>) -> Result<RangeSet, u32> {
        if !self.enabled {
            return Err(DISABLED);
        }
        let since = self.known.iter().copied().find(|epoch| self.id(*epoch) == id);
        let since = since.ok_or(INVALID_ID)?;
        let until = until.unwrap_or(u32::MAX);
        if since > until {
            return Err(INVALID_ID);
        }
        let epochs = self.epochs.range(since..until);
        Ok(epochs.fold(RangeSet::new(), |all, (_, epoch)| all.union(epoch)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_since_an_id_are_those_of_its_epoch_and_later_ones() {
        let mut tracking = Tracking::new(&mut Random::new(1), 512);
        assert_eq!(tracking.since("rctX:", None), Err(DISABLED));
        tracking.enabled = true;
        tracking.record(ByteRange::new(0, 512), 8192);
        let first = tracking.seal();
        tracking.record(ByteRange::new(600, 10), 8192);
        let second = tracking.seal();
        tracking.record(ByteRange::new(4096, 512), 8192);
        let id = tracking.id(first);
        assert!(id.starts_with("rctX:") && id.ends_with(":00000001"), "{id}");
        let ranges = |list: &[(u64, u64)]| {
            list.iter().map(|(offset, length)| ByteRange::new(*offset, *length)).collect()
        };
        assert_eq!(tracking.since(&id, Some(second)), Ok(ranges(&[(512, 512)])));
        assert_eq!(tracking.since(&id, None), Ok(ranges(&[(512, 512), (4096, 512)])));
        tracking.coarsen(8192, 8000);
        assert_eq!(tracking.since(&tracking.id(second), None), Ok(ranges(&[(0, 8000)])));
        let mut reverted = tracking.clone();
        let mut earlier = Tracking::new(&mut Random::new(1), 512);
        earlier.enabled = true;
        assert_eq!(earlier.seal(), first);
        reverted.go_back(&earlier);
        assert_eq!(reverted.seal(), second, "the id is given once more");
        assert_eq!(
            reverted.since(&id, Some(second)),
            Ok(ranges(&[])),
            "what was written is forgotten"
        );
        tracking.keep(&BTreeSet::from([second]));
        assert_eq!(tracking.since(&id, None), Err(INVALID_ID));
        tracking.reset(&mut Random::new(2));
        assert_eq!(tracking.since(&tracking.id(second), None), Err(INVALID_ID));
    }
}
