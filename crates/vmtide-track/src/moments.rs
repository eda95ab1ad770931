//! What happens with the gate closed: sealing, saving, switching on and off, freezing, the planned stop.

use crate::changes::ChangePage;
use crate::disk::TrackedDisk;
use crate::gate::Gate;
use crate::id::TrackingId;
use crate::recover::refuse_foreign;
use crate::store::StoreFile;
use crate::tracking::TrackingState;
use crate::view::{FrozenView, ViewState};
use crate::{Result, TrackError};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange};

/// An id of a moment.
#[derive(Clone, Copy)]
struct Moment {
    id: TrackingId,
    /// It was sealed for this moment, and is to be saved.
    is_new: bool,
}

impl TrackedDisk {
    /// Seals this moment: every write that returned before the call is before it, every one that begins after the
    /// return is after it. The id is durable when it is returned. The oldest ids are retired, as the options say.
    ///
    /// # Errors
    /// [`TrackError::Disabled`], [`TrackError::Lost`]; [`TrackError::Io`] where it could not be saved, and then
    /// there is no new id.
    pub fn checkpoint(&self) -> Result<TrackingId> {
        let _one_at_a_time = self.control.lock();
        let id = {
            let mut gate = self.gate.write();
            gate.check_open(&self.name)?;
            gate.tracking(&self.name)?;
            self.seal(&mut gate)?
        };
        match id {
            Some(id) => self.save_seal().map(|()| id),
            None => Err(TrackError::Disabled { disk: self.name.clone() }),
        }
    }

    /// An id of this moment for a reader of it: the newest one again where nothing was written since, so that reading a disk
    /// often does not retire the ids of others; as [`checkpoint`](Self::checkpoint) otherwise.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn moment(&self) -> Result<TrackingId> {
        let _one_at_a_time = self.control.lock();
        let moment = {
            let mut gate = self.gate.write();
            gate.check_open(&self.name)?;
            gate.tracking(&self.name)?;
            self.newest_or_seal(&mut gate)?
        };
        match moment {
            Some(moment) => self.save_moment(moment),
            None => Err(TrackError::Disabled { disk: self.name.clone() }),
        }
    }

    /// The id of this moment, where the disk is tracked.
    fn newest_or_seal(&self, gate: &mut Gate) -> Result<Option<Moment>> {
        // What was written before it was flushed when it was sealed, or before.
        let newest = gate.tracking.as_mut().and_then(|known| known.newest_again(&self.options));
        match newest {
            Some(id) => Ok(Some(Moment { id, is_new: false })),
            None => Ok(self.seal(gate)?.map(|id| Moment { id, is_new: true })),
        }
    }

    /// Makes the id durable where it is not yet.
    fn save_moment(&self, moment: Moment) -> Result<TrackingId> {
        if moment.is_new {
            self.save_seal()?;
        }
        Ok(moment.id)
    }

    /// Seals where the disk is tracked.
    fn seal(&self, gate: &mut Gate) -> Result<Option<TrackingId>> {
        match &mut gate.tracking {
            Some(tracking) if tracking.given_up().is_none() => {
                tracking.seal(&self.name, &self.options).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Makes a sealed id durable, or undoes it. What the guest wrote before the moment goes first: were it lost after the id is
    /// known, the disk would differ from the moment where nothing says so.
    fn save_seal(&self) -> Result<()> {
        let saved = self.device.flush().map_err(TrackError::from);
        saved.and_then(|()| self.replace(false, None)).inspect_err(|_| {
            if let Some(tracking) = &mut self.gate.write().tracking {
                tracking.undo_seal();
            }
        })
    }

    /// The state: whether the disk is tracked, its newest id, and whether it was written since. An id is shown once it is
    /// durable.
    pub fn state(&self) -> TrackingState {
        self.gate.read().tracking.as_ref().map(crate::tracking::Tracking::state).unwrap_or_default()
    }

    /// What was written since `id` was sealed, within `range`: at most `max_ranges` ranges (and never more than
    /// [`MAX_RANGES_PER_PAGE`](crate::MAX_RANGES_PER_PAGE)), rounded out to blocks, inside the range. Writes that happen
    /// meanwhile may be in it or not.
    ///
    /// # Errors
    /// [`TrackError::UnknownId`], [`TrackError::Disabled`], [`TrackError::Lost`]: each means that the disk is to
    /// be read in full.
    pub fn changes_since(
        &self,
        id: &str,
        range: ByteRange,
        max_ranges: usize,
    ) -> Result<ChangePage> {
        let known = {
            let gate = self.gate.read();
            let tracking = gate.tracking(&self.name)?;
            if tracking.is_unsaved(id) {
                return Err(TrackError::unknown_id(&self.name, id));
            }
            tracking.snapshot(false, &self.identity)
        };
        known.changes_since(&self.name, id, range, max_ranges)
    }

    /// Switches tracking on, with an id of this moment; nothing where it is on.
    ///
    /// # Errors
    /// [`TrackError::Io`], and then it stays off; [`TrackError::Unsupported`] where another program tracks the disk.
    pub fn enable(&self) -> Result<()> {
        let _one_at_a_time = self.control.lock();
        let mut gate = self.gate.write();
        gate.check_open(&self.name)?;
        let lost = match &gate.tracking {
            None => {
                refuse_foreign(&*self.store, &self.name)?;
                Vec::new()
            }
            Some(tracking) => {
                let Some(reason) = tracking.given_up() else {
                    return Ok(());
                };
                let mut lost = tracking.saved.lost.clone();
                lost.push((tracking.saved.series, reason.to_owned()));
                lost
            }
        };
        // No write may pass before all of it is on the medium.
        gate.tracking = Some(self.begin(lost)?);
        drop(gate);
        self.beat();
        Ok(())
    }

    /// Switches tracking off. All ids are forgotten, and the files removed.
    ///
    /// # Errors
    /// [`TrackError::Io`], and then it stays on; [`TrackError::Unsupported`] where another program tracks the disk.
    pub fn disable(&self) -> Result<()> {
        let _one_at_a_time = self.control.lock();
        let mut gate = self.gate.write();
        gate.check_open(&self.name)?;
        if gate.tracking.is_none() {
            refuse_foreign(&*self.store, &self.name)?;
        }
        self.store.remove(StoreFile::Rct).map_err(|error| self.io("remove", error))?;
        gate.tracking = None;
        self.store.remove(StoreFile::Mrt).map_err(|error| self.io("remove", error))
    }

    /// Writes `.rct` now, where anything was written since it was: after a crash the answers are as fine as now.
    ///
    /// # Errors
    /// [`TrackError::Io`]; tracking goes on.
    pub fn save(&self) -> Result<()> {
        let _one_at_a_time = self.control.lock();
        {
            let mut gate = self.gate.write();
            gate.drop_ended_views();
            let closed = gate.closed;
            match &mut gate.tracking {
                Some(tracking)
                    if tracking.marks.is_any() && tracking.given_up().is_none() && !closed =>
                {
                    tracking.begin_epoch();
                }
                _ => return Ok(()),
            }
        }
        self.replace(false, None)
    }

    /// The planned stop. No write is let in any more; `finish` ends the image (flushes and closes it) and tells
    /// what it then looks like ([`Identity::stamp`](crate::Identity::stamp)), and that is saved with the exact
    /// bitmaps. Frozen views end. A second call does nothing.
    ///
    /// # Errors
    /// What `finish` or the medium says; the next start then finds what a crash would have left.
    pub fn close(
        &self,
        finish: impl FnOnce() -> vmtide_block::Result<Option<String>>,
    ) -> Result<()> {
        let _one_at_a_time = self.control.lock();
        {
            let mut gate = self.gate.write();
            if std::mem::replace(&mut gate.closed, true) {
                return Ok(());
            }
            for view in gate.views.drain(..) {
                view.fail("the disk was closed");
            }
            if let Some(tracking) = &mut gate.tracking {
                tracking.begin_epoch();
            }
        }
        let stamp = finish()?;
        self.replace(true, stamp)
    }

    /// Replaces `.rct` by what is known now, where the disk is tracked. Writes go on meanwhile.
    fn replace(&self, closed: bool, stamp: Option<String>) -> Result<()> {
        let gate = self.gate.read();
        let Some(tracking) = &gate.tracking else {
            return Ok(());
        };
        let _alone = tracking.rct.lock();
        if tracking.given_up().is_some() {
            return Ok(());
        }
        let mut saved = tracking.snapshot(closed, &self.identity);
        saved.identity.stamp = stamp;
        self.put(StoreFile::Rct, &saved.encode())?;
        tracking.marks.saved(saved.epoch);
        tracking.made_durable();
        Ok(())
    }

    /// The disk as it is at this moment, readable and unchanging while the guest writes on; with an id of the
    /// moment, where the disk is tracked: the newest one again where nothing was written since that.
    ///
    /// # Errors
    /// As [`checkpoint`](Self::checkpoint), but that tracking need not be on; where there is no room for overwritten
    /// blocks.
    pub fn freeze(&self) -> Result<FrozenView> {
        self.freeze_while(|| ()).map(|(view, ())| view)
    }

    /// As [`freeze`](Self::freeze), and calls `held` before writes go on: several disks of one moment are frozen in
    /// each other's `held`.
    ///
    /// # Errors
    /// As [`freeze`](Self::freeze).
    pub fn freeze_while<T>(&self, held: impl FnOnce() -> T) -> Result<(FrozenView, T)> {
        let state = Arc::new(ViewState::new(self.device.size_bytes(), &self.options)?);
        // Ends by itself wherever this function does.
        let mut view = FrozenView::new(Arc::clone(&self.device), Arc::clone(&state), &self.name);
        let _one_at_a_time = self.control.lock();
        let (moment, value) = {
            let mut gate = self.gate.write();
            gate.check_open(&self.name)?;
            gate.drop_ended_views();
            let moment = self.newest_or_seal(&mut gate)?;
            gate.views.push(state);
            (moment, held())
        };
        view.set_id(moment.map(|moment| self.save_moment(moment)).transpose()?);
        Ok((view, value))
    }

    /// See [`WritableBlockDevice::resize`](vmtide_block::WritableBlockDevice::resize).
    pub(crate) fn resize_tracked(&self, size_bytes: u64) -> Result<()> {
        let _one_at_a_time = self.control.lock();
        let mut gate = self.gate.write();
        gate.check_open(&self.name)?;
        if size_bytes == self.device.size_bytes() {
            return Ok(());
        }
        for view in gate.views.drain(..) {
            view.fail("the disk was resized");
        }
        self.device.resize(size_bytes)?;
        let Some(tracking) = gate.tracking.take() else {
            return Ok(());
        };
        let mut lost = tracking.saved.lost.clone();
        lost.push((tracking.saved.series, "the disk was resized".to_owned()));
        match self.begin(lost) {
            Ok(tracking) => {
                gate.tracking = Some(tracking);
                Ok(())
            }
            Err(error) => {
                // An .rct of another size is not believed in any case.
                let _ = self.store.remove(StoreFile::Rct);
                Err(error)
            }
        }
    }
}
