//! A disk whose writes are tracked.

use crate::gate::Gate;
use crate::id::{MAX_COUNTER, Series};
use crate::identity::{Identity, StoredIdentity};
use crate::marks::RegionMarks;
use crate::mrt::Owner;
use crate::options::{Geometry, Options};
use crate::rct::{Saved, SavedId};
use crate::recover::{Loaded, Recovered, foreign, load};
use crate::store::{StoreFile, TrackingStore};
use crate::tracking::Tracking;
use crate::{Result, TrackError};
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, WritableBlockDevice};

/// A disk whose writes are tracked.
///
/// It is the one way to the device: what is written past it is not noticed. See the head of this crate for what
/// is done in which order.
///
/// # Concurrency
/// Reads pass straight through. Any number of writes run at once; sealing a moment waits for those under way, and
/// they for it. Sealing, saving, switching and closing happen one at a time.
///
/// Dropping it without [`close`](Self::close) is a crash: answers are larger afterwards, never smaller.
pub struct TrackedDisk {
    pub(crate) name: String,
    pub(crate) device: Arc<dyn WritableBlockDevice>,
    pub(crate) store: Arc<dyn TrackingStore>,
    pub(crate) options: Options,
    pub(crate) identity: StoredIdentity,
    pub(crate) gate: RwLock<Gate>,
    /// Held by whoever replaces `.rct`.
    pub(crate) control: Mutex<()>,
}

impl std::fmt::Debug for TrackedDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrackedDisk").field("name", &self.name).finish_non_exhaustive()
    }
}

impl TrackedDisk {
    /// Opens the tracking of `device`, whose image looked like `identity` before it was opened.
    ///
    /// Where tracking was lost it begins again under new ids, and the old ones are answered with the reason. Where
    /// there is none, it begins if [`Options::enable`] says so. Files of another program are left alone: the disk is not
    /// tracked then.
    ///
    /// # Errors
    /// [`TrackError::Io`] where the files cannot be read or written; [`TrackError::Unsupported`] for options out
    /// of bounds, and where tracking is to begin and another program's files are in its place.
    pub fn open(
        device: Arc<dyn WritableBlockDevice>,
        store: Arc<dyn TrackingStore>,
        identity: &Identity,
        options: Options,
    ) -> Result<Self> {
        let name = device.name();
        let context = |error| TrackError::io(format!("open the change tracking of {name}"), error);
        let loaded = load(&*store, identity, device.size_bytes()).map_err(context)?;
        let disk = Self {
            name,
            device,
            store,
            options,
            identity: StoredIdentity::of_open(identity),
            gate: RwLock::default(),
            control: Mutex::new(()),
        };
        let tracking = match loaded {
            Loaded::Off if !disk.options.enable => None,
            Loaded::Foreign if !disk.options.enable => None,
            Loaded::Foreign => return Err(foreign(&disk.name)),
            Loaded::Off => Some(disk.begin(Vec::new())?),
            Loaded::Lost { series, reason, mut before } => {
                tracing::warn!(
                    disk = disk.name,
                    reason,
                    "change tracking was lost and begins anew"
                );
                before.push((series, reason));
                Some(disk.begin(before)?)
            }
            Loaded::On(recovered) => Some(disk.resume(recovered)?),
        };
        disk.gate.write().tracking = tracking;
        disk.beat();
        Ok(disk)
    }

    /// Leaves a sign that this host is alive, where the disk is tracked. To be called every few seconds: after a crash an image
    /// that was written to long after the last sign is not believed.
    pub fn beat(&self) {
        if self.gate.read().tracking.is_some()
            && let Err(error) = self.store.beat()
        {
            tracing::debug!(%error, "no sign of life can be left");
        }
    }

    /// Begins tracking, with one id, of this moment. No write is under way.
    pub(crate) fn begin(&self, lost: Vec<(Series, String)>) -> Result<Tracking> {
        let series = Series::random().map_err(|error| self.io("begin", error))?;
        let Options { granularity_bytes, region_bytes, now_unix_ms, .. } = self.options;
        let geometry = Geometry::new(self.device.size_bytes(), granularity_bytes, region_bytes)?;
        let owner = Owner { series, geometry };
        let changed = crate::bitmap::PagedBitmap::of(&[], geometry.blocks());
        let changed = crate::bitmap::Layer::Sealed(Arc::new(changed));
        let saved = Saved {
            series,
            geometry,
            epoch: 1,
            closed: false,
            last_counter: 1,
            identity: self.identity.clone(),
            lost,
            ids: vec![SavedId { counter: 1, sealed_unix_ms: now_unix_ms(), changed }],
        };
        // What was written before the moment must not be lost after it.
        self.device.flush()?;
        // The marks first: an .rct without its .mrt would be a lost one.
        self.put(StoreFile::Mrt, &owner.empty_file(0))?;
        self.put(StoreFile::Rct, &saved.encode())?;
        Ok(Tracking::new(saved, RegionMarks::new(owner, 1)))
    }

    /// Goes on under an epoch of its own.
    fn resume(&self, recovered: Recovered) -> Result<Tracking> {
        let Recovered { mut saved, next_epoch, marks_are_sound, was_closed } = recovered;
        saved.epoch = next_epoch;
        saved.closed = false;
        saved.identity = self.identity.clone();
        if !was_closed {
            // The crash may have taken back an .rct that somebody had read: the id it had must not name another moment.
            saved.last_counter = saved.last_counter.saturating_add(1).min(MAX_COUNTER);
        }
        let owner = Owner { series: saved.series, geometry: saved.geometry };
        let marks = owner.empty_file(0);
        // After a planned stop the old marks stand for nothing, and an .rct that says "open" needs its .mrt. After a
        // crash they stand for what no .rct has, until there is one.
        if !marks_are_sound && was_closed {
            self.put(StoreFile::Mrt, &marks)?;
        }
        self.put(StoreFile::Rct, &saved.encode())?;
        if !marks_are_sound && !was_closed {
            self.put(StoreFile::Mrt, &marks)?;
        }
        let marks = RegionMarks::new(owner, saved.epoch);
        Ok(Tracking::new(saved, marks))
    }

    pub(crate) fn put(&self, file: StoreFile, bytes: &[u8]) -> Result<()> {
        self.store.replace(file, bytes).map_err(|error| self.io("save", error))
    }

    pub(crate) fn io(&self, what: &str, error: std::io::Error) -> TrackError {
        TrackError::io(format!("{what} the change tracking of {}", self.name), error)
    }

    /// Does a write as the protocol says (step 2).
    fn write_by(
        &self,
        range: ByteRange,
        write: impl FnOnce() -> vmtide_block::Result<()>,
    ) -> vmtide_block::Result<()> {
        self.check_range(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let gate = self.gate.read();
        if gate.closed {
            return Err(BlockError::ReadOnly { device: self.name() });
        }
        if let Some(tracking) = &gate.tracking {
            tracking.note(range, &*self.store).map_err(|error| {
                BlockError::io(format!("mark a write to {} at {range}", self.name), error)
            })?;
        }
        for view in &gate.views {
            view.preserve(range, &*self.device);
        }
        write()
    }
}

impl BlockDevice for TrackedDisk {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }

    fn block_size_bytes(&self) -> u32 {
        self.device.block_size_bytes()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.device.read_at(buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.device.extents(range)
    }
}

impl WritableBlockDevice for TrackedDisk {
    fn write_at(&self, data: &[u8], offset: u64) -> vmtide_block::Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        self.write_by(range, || self.device.write_at(data, offset))
    }

    fn write_zeroes(&self, range: ByteRange) -> vmtide_block::Result<()> {
        self.write_by(range, || self.device.write_zeroes(range))
    }

    fn flush(&self) -> vmtide_block::Result<()> {
        self.device.flush()
    }

    fn expect_bulk_writes(&self) {
        self.device.expect_bulk_writes();
    }

    /// Tracking begins anew: ids of before name moments of a disk of another size.
    fn resize(&self, size_bytes: u64) -> vmtide_block::Result<()> {
        Ok(self.resize_tracked(size_bytes)?)
    }
}
