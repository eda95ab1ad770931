//! What is known of a disk that is tracked now, in memory.

use crate::bitmap::{AtomicBitmap, Layer, PagedBitmap};
use crate::changes::{ChangePage, collect};
use crate::id::{MAX_COUNTER, Series, TrackingId};
use crate::identity::StoredIdentity;
use crate::marks::RegionMarks;
use crate::options::{MAX_IDS, Options};
use crate::rct::{Saved, SavedId};
use crate::store::{StoreFile, TrackingStore};
use crate::{Result, TrackError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::{Arc, OnceLock};
use vmtide_block::{BlockError, ByteRange};

/// The state of change tracking of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackingState {
    /// Whether writes are tracked, and what was tracked can be relied on.
    pub enabled: bool,
    /// Whether something was written since the most recent id, or may have been.
    pub newer_changes: bool,
    /// The most recent id; empty where tracking is off.
    pub most_recent_id: String,
}

/// The tracking of one disk.
pub(crate) struct Tracking {
    /// What `.rct` would hold now. The newest id's set is `growing`.
    pub saved: Saved,
    growing: Arc<AtomicBitmap>,
    pub marks: RegionMarks,
    /// Why tracking was given up; the `.rct` is gone then.
    given_up: OnceLock<String>,
    /// The seal whose id no `.rct` on the medium has yet.
    unsaved: Mutex<Option<Unsaved>>,
    /// Held by whoever replaces or removes the `.rct`: it must not come back after tracking was given up.
    pub rct: Mutex<()>,
}

/// A seal that is not durable. Its id is nobody's: a crash would have its number given out again, for another moment.
struct Unsaved {
    /// The newest id that is durable.
    durable: TrackingId,
    /// What the seal retired, the oldest first.
    retired: Vec<SavedId>,
}

impl Tracking {
    /// Goes on from what was saved, under `saved.epoch`.
    pub fn new(mut saved: Saved, marks: RegionMarks) -> Self {
        let growing = match saved.ids.last().map(|id| &id.changed) {
            Some(Layer::Growing(bitmap)) => Arc::clone(bitmap),
            other => {
                let bitmap = AtomicBitmap::new(saved.geometry.blocks());
                if let Some(Layer::Sealed(sealed)) = other {
                    bitmap.add(sealed);
                }
                Arc::new(bitmap)
            }
        };
        if let Some(newest) = saved.ids.last_mut() {
            newest.changed = Layer::Growing(Arc::clone(&growing));
        }
        Self {
            saved,
            growing,
            marks,
            given_up: OnceLock::new(),
            unsaved: Mutex::new(None),
            rct: Mutex::new(()),
        }
    }

    /// Notes a write that is about to happen (steps 2a and 2b of the protocol).
    ///
    /// # Errors
    /// Where the write must not happen: its mark cannot be made, nor can tracking be given up.
    pub fn note(&self, range: ByteRange, store: &dyn TrackingStore) -> io::Result<()> {
        if self.given_up.get().is_some() {
            return Ok(());
        }
        if let Err(error) = self.marks.mark(range, store) {
            return self.give_up(error, store);
        }
        let granularity = u64::from(self.saved.geometry.granularity_bytes);
        self.growing.set_range(range.offset / granularity, range.end().div_ceil(granularity));
        Ok(())
    }

    /// The guest comes first: where marks cannot be written, tracking ends, if that can be made durable.
    fn give_up(&self, error: io::Error, store: &dyn TrackingStore) -> io::Result<()> {
        let reason = format!("marks cannot be written: {error}");
        let _alone = self.rct.lock();
        if let Err(worse) = store.remove(StoreFile::Rct) {
            tracing::error!(%error, %worse, "writes cannot be tracked and are refused");
            return Err(error);
        }
        tracing::error!(%error, "change tracking is given up");
        // Somebody else may have been first.
        let _ = self.given_up.set(reason);
        Ok(())
    }

    /// Why tracking was given up, if it was.
    pub fn given_up(&self) -> Option<&str> {
        self.given_up.get().map(String::as_str)
    }

    /// The newest id, where it is of this moment too: nothing was written since it was sealed. It counts as sealed now,
    /// so that it grows old only from here on. No write is under way.
    pub fn newest_again(&mut self, options: &Options) -> Option<TrackingId> {
        if self.given_up().is_some() || self.growing.is_any() || self.unsaved.get_mut().is_some() {
            return None;
        }
        let newest = self.saved.ids.last_mut()?;
        newest.sealed_unix_ms = newest.sealed_unix_ms.max((options.now_unix_ms)());
        Some(self.newest())
    }

    /// Seals this moment (step 3 of the protocol). No write is under way. Until [`made_durable`](Self::made_durable)
    /// the id is not shown, nor answered.
    ///
    /// # Errors
    /// Where counters are used up.
    pub fn seal(&mut self, disk: &str, options: &Options) -> Result<TrackingId> {
        if let Some(reason) = self.given_up() {
            return Err(TrackError::Lost { disk: disk.to_owned(), reason: reason.to_owned() });
        }
        if self.saved.last_counter >= MAX_COUNTER {
            let reason = "there are no more ids: switch change tracking off and on again";
            return Err(TrackError::unsupported(disk, reason));
        }
        let durable = self.newest();
        let blocks = self.saved.geometry.blocks();
        if let Some(before) = self.saved.ids.last_mut() {
            let sealed = PagedBitmap::of(&[Layer::Growing(Arc::clone(&self.growing))], blocks);
            before.changed = Layer::Sealed(Arc::new(sealed));
        }
        self.saved.last_counter += 1;
        self.growing = Arc::new(AtomicBitmap::new(blocks));
        let now = (options.now_unix_ms)();
        self.saved.ids.push(SavedId {
            counter: self.saved.last_counter,
            sealed_unix_ms: now,
            changed: Layer::Growing(Arc::clone(&self.growing)),
        });
        self.begin_epoch();
        let retired = self.retire(now, options);
        *self.unsaved.get_mut() = Some(Unsaved { durable, retired });
        Ok(self.newest())
    }

    /// What is known now is on the medium.
    pub fn made_durable(&self) {
        *self.unsaved.lock() = None;
    }

    /// Undoes the last [`seal`](Self::seal), whose id nobody has. No write is under way.
    pub fn undo_seal(&mut self) {
        let Some(Unsaved { retired, .. }) = self.unsaved.get_mut().take() else {
            return;
        };
        self.saved.ids.pop();
        self.saved.ids.splice(..0, retired);
        if let Some(newest) = self.saved.ids.last_mut() {
            if let Layer::Sealed(sealed) = &newest.changed {
                self.growing.add(sealed);
            }
            newest.changed = Layer::Growing(Arc::clone(&self.growing));
        }
    }

    /// The next epoch begins. No write is under way.
    pub fn begin_epoch(&mut self) {
        self.saved.epoch = self.saved.epoch.saturating_add(1);
        self.marks.begin_epoch(self.saved.epoch);
    }

    fn retire(&mut self, now: u64, options: &Options) -> Vec<SavedId> {
        let ids = &mut self.saved.ids;
        let most = options.max_ids.clamp(1, MAX_IDS);
        let surplus = ids.len().saturating_sub(most);
        let mut retired: Vec<SavedId> = ids.drain(..surplus).collect();
        if let Some(max_age) = options.max_age_ms {
            let young = |id: &SavedId| id.sealed_unix_ms.saturating_add(max_age) >= now;
            let old = ids.iter().take_while(|id| !young(id)).count();
            retired.extend(ids.drain(..old.min(ids.len().saturating_sub(1))));
        }
        retired
    }

    fn newest(&self) -> TrackingId {
        TrackingId { series: self.saved.series, counter: self.saved.last_counter_kept() }
    }

    pub fn state(&self) -> TrackingState {
        if self.given_up().is_some() {
            return TrackingState::default();
        }
        match &*self.unsaved.lock() {
            Some(unsaved) => TrackingState {
                enabled: true,
                // What is since the id that is not durable is since this one, too.
                newer_changes: true,
                most_recent_id: unsaved.durable.to_string(),
            },
            None => self.saved.state(),
        }
    }

    /// Whether this is the id of a seal that is not durable.
    pub fn is_unsaved(&self, id: &str) -> bool {
        self.unsaved.lock().is_some() && TrackingId::parse(id) == Some(self.newest())
    }

    /// What `.rct` is to hold. Cheap: the sets are shared.
    pub fn snapshot(&self, closed: bool, identity: &StoredIdentity) -> Saved {
        Saved { closed, identity: identity.clone(), ..self.saved.clone() }
    }
}

impl Saved {
    /// The counter of the newest id that is retained.
    fn last_counter_kept(&self) -> u32 {
        self.ids.last().map_or(0, |id| id.counter)
    }

    pub fn state(&self) -> TrackingState {
        let newer_changes = match self.ids.last().map(|id| &id.changed) {
            Some(Layer::Growing(bitmap)) => bitmap.is_any(),
            Some(Layer::Sealed(bitmap)) => !bitmap.is_empty(),
            None => false,
        };
        let id = TrackingId { series: self.series, counter: self.last_counter_kept() };
        TrackingState { enabled: true, newer_changes, most_recent_id: id.to_string() }
    }

    /// What was written since `id`, within `range`.
    ///
    /// # Errors
    /// [`TrackError::UnknownId`], [`TrackError::Lost`]; [`BlockError::OutOfRange`] for a range outside.
    pub fn changes_since(
        &self,
        disk: &str,
        id: &str,
        range: ByteRange,
        max_ranges: usize,
    ) -> Result<ChangePage> {
        let size_bytes = self.geometry.size_bytes;
        if range.checked_end().is_none_or(|end| end > size_bytes) {
            return Err(
                BlockError::OutOfRange { device: disk.to_owned(), range, size_bytes }.into()
            );
        }
        let unknown = || TrackError::unknown_id(disk, id);
        let parsed = TrackingId::parse(id).ok_or_else(unknown)?;
        if parsed.series != self.series {
            let lost = |series| self.lost.iter().rev().find(move |(lost, _)| *lost == series);
            return match lost(parsed.series).or_else(|| lost(Series::ANY)) {
                Some((_, reason)) => {
                    Err(TrackError::Lost { disk: disk.to_owned(), reason: reason.clone() })
                }
                None => Err(unknown()),
            };
        }
        let at = self.ids.iter().position(|id| id.counter == parsed.counter).ok_or_else(unknown)?;
        let since = self.ids.get(at..).unwrap_or_default();
        let layers: Vec<Layer> = since.iter().map(|id| id.changed.clone()).collect();
        Ok(collect(&layers, &self.geometry, range, max_ranges))
    }
}
