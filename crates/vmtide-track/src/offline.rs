//! The tracking of an image that nobody hosts now.
//!
//! Reading takes no lock: the answer is of the moment in which the files were read, also where a host starts
//! meanwhile. What changes the files locks the image against writers, and other changes of the files out.

use crate::changes::ChangePage;
use crate::id::TrackingId;
use crate::image::{image_identity, in_use};
use crate::options::MAX_IDS;
use crate::rct::Saved;
use crate::recover::{Loaded, foreign, load, refuse_foreign};
use crate::store::FileStore;
use crate::tracking::TrackingState;
use crate::{Identity, Options, Result, TrackError, TrackedDisk};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmtide_block::files::open_file;
use vmtide_block::{BlockDevice, BlockError, ByteRange, WritableBlockDevice};
use vmtide_image::{ImageLock, companion_files, image_info};

/// How long another change of the files is waited for; each takes moments.
const LOCK_PATIENCE: Duration = Duration::from_secs(20);

const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// The tracking of an image that nobody hosts now.
pub struct OfflineTracking {
    path: PathBuf,
    identity: Identity,
    size_bytes: u64,
    known: Known,
}

enum Known {
    Off,
    /// Another program's files are in the place of ours.
    Foreign,
    Lost(String),
    On(Box<Saved>),
}

impl OfflineTracking {
    /// Reads what is known of the image at `path`.
    ///
    /// # Errors
    /// Where the image or the files cannot be read. Lost tracking is no error here but an answer.
    pub fn open(path: &Path) -> Result<Self> {
        // One set of files, whatever links lead to the image.
        let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let path = real.as_path();
        let size_bytes = image_info(path, None)?.size_bytes;
        let identity = image_identity(path, None)?;
        let loaded = load(&FileStore::new(path), &identity, size_bytes)
            .map_err(|error| TrackError::io("read change tracking", error))?;
        let known = match loaded {
            Loaded::Off => Known::Off,
            Loaded::Foreign => Known::Foreign,
            Loaded::Lost { reason, .. } => Known::Lost(reason),
            Loaded::On(recovered) => Known::On(Box::new(recovered.saved)),
        };
        Ok(Self { path: path.to_owned(), identity, size_bytes, known })
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// The state; tracking that was lost is not enabled.
    pub fn state(&self) -> TrackingState {
        match &self.known {
            Known::On(saved) => saved.state(),
            Known::Off | Known::Foreign | Known::Lost(_) => TrackingState::default(),
        }
    }

    /// As [`TrackedDisk::changes_since`].
    ///
    /// # Errors
    /// As there.
    pub fn changes_since(
        &self,
        id: &str,
        range: ByteRange,
        max_ranges: usize,
    ) -> Result<ChangePage> {
        match &self.known {
            Known::On(saved) => saved.changes_since(&self.name(), id, range, max_ranges),
            // Not tracked by vmtide, as the state says.
            Known::Off | Known::Foreign => Err(TrackError::Disabled { disk: self.name() }),
            Known::Lost(reason) => {
                Err(TrackError::Lost { disk: self.name(), reason: reason.clone() })
            }
        }
    }

    /// As [`TrackedDisk::checkpoint`].
    ///
    /// # Errors
    /// As there; [`TrackError::InUse`] where somebody writes to the image; [`TrackError::Unsupported`] where another program
    /// tracks it.
    pub fn checkpoint(&mut self) -> Result<TrackingId> {
        let _lock = keep_writers_off(&self.path, matches!(self.known, Known::On(_)))?;
        match &self.known {
            Known::Foreign => return Err(foreign(&self.name())),
            Known::Off => return Err(TrackError::Disabled { disk: self.name() }),
            Known::Lost(reason) => {
                return Err(TrackError::Lost { disk: self.name(), reason: reason.clone() });
            }
            Known::On(_) => {}
        }
        let id = self.change(false, TrackedDisk::checkpoint)?;
        *self = Self::open(&self.path)?;
        Ok(id)
    }

    /// The id of the moment that begins with `lock`, as [`TrackedDisk::moment`]; none where the image is not tracked.
    pub(crate) fn moment(&self, _lock: &ImageLock) -> Result<Option<TrackingId>> {
        if !matches!(self.known, Known::On(_)) {
            return Ok(None);
        }
        match self.change(false, TrackedDisk::moment) {
            Ok(id) => Ok(Some(id)),
            Err(TrackError::Disabled { .. } | TrackError::Lost { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Switches tracking on or off, as [`TrackedDisk::enable`] and [`TrackedDisk::disable`]. Lost tracking is
    /// switched on anew.
    ///
    /// # Errors
    /// As there; [`TrackError::InUse`] where somebody writes to the image; [`TrackError::Unsupported`] where another program
    /// tracks it.
    pub fn set_enabled(&mut self, enabled: bool) -> Result<()> {
        let begins = enabled && !matches!(self.known, Known::On(_));
        let _lock = keep_writers_off(&self.path, begins)?;
        match (&self.known, enabled) {
            (Known::Foreign, _) => return Err(foreign(&self.name())),
            (Known::On(_), true) => {}
            (_, true) => self.change(true, |_| Ok(()))?,
            // Not by opening it, which would begin lost tracking anew first.
            (_, false) => self.remove_files()?,
        }
        *self = Self::open(&self.path)?;
        Ok(())
    }

    /// Opens the tracking as a host does, over a device that cannot be written, does `change` and closes it in
    /// order. The image is the same before and after, so it looks as it did.
    fn change<T>(&self, enable: bool, change: impl FnOnce(&TrackedDisk) -> Result<T>) -> Result<T> {
        let _alone = self.alone()?;
        // Somebody may have written before the lock was had.
        let identity = image_identity(&self.path, None)?;
        let stamp = identity.stamp.clone();
        if stamp != self.identity.stamp {
            return Err(changed_meanwhile(&self.path));
        }
        let device = Arc::new(NoWrites { path: self.path.clone(), size_bytes: self.size_bytes });
        let store = Arc::new(FileStore::new(&self.path));
        // How long ids are retained is for the image's host to say, at its next seal.
        let options = Options { enable, max_ids: MAX_IDS, max_age_ms: None, ..Options::default() };
        let disk = TrackedDisk::open(device, store, &identity, options)?;
        let done = change(&disk)?;
        disk.close(|| Ok(stamp))?;
        Ok(done)
    }

    fn remove_files(&self) -> Result<()> {
        use crate::store::{StoreFile, TrackingStore};
        let _alone = self.alone()?;
        let store = FileStore::new(&self.path);
        refuse_foreign(&store, &self.name())?;
        let removed = store.remove(StoreFile::Rct).and_then(|()| store.remove(StoreFile::Mrt));
        removed.map_err(|error| TrackError::io("remove change tracking", error))
    }

    /// Waits until nobody else changes the files this way. (Hosts are kept off by the lock on the image.)
    fn alone(&self) -> Result<File> {
        let failed = |error| TrackError::io(format!("lock {}", self.path.display()), error);
        let file = open_file(&self.path, OpenOptions::new().read(true)).map_err(failed)?;
        // There, a lock would keep this process itself from reading the image.
        if cfg!(windows) {
            return Ok(file);
        }
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if begun.elapsed() < LOCK_PATIENCE => {
                    std::thread::sleep(LOCK_PAUSE);
                }
                Err(TryLockError::WouldBlock) => {
                    let reason = "another program has locked it".into();
                    return Err(TrackError::InUse { disk: self.name(), reason });
                }
                // A file system without such locks.
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {
                    return Ok(file);
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
    }
}

/// Says that the image at `path` is about to be written without tracking, by who has its lock. Tracking that was closed in order notices
/// by itself; one that a crash left open could not, and is removed.
///
/// # Errors
/// [`TrackError::Io`] where it cannot be removed: then the image must not be written.
pub fn before_untracked_write(path: &Path) -> Result<()> {
    use crate::store::{StoreFile, TrackingStore};
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let store = FileStore::new(real);
    let failed = |error| TrackError::io("read change tracking", error);
    let Some(bytes) = store.read(StoreFile::Rct).map_err(failed)? else {
        return Ok(());
    };
    match Saved::decode(&bytes) {
        Ok(saved) if !saved.closed => {
            tracing::warn!(path = %path.display(), "change tracking that a crash left ends: the image is written without it");
            // The marks too: alone, and torn by the crash, they would look like another program's.
            store.remove(StoreFile::Rct).and_then(|()| store.remove(StoreFile::Mrt)).map_err(failed)
        }
        // Noticed at the next start, in any case.
        _ => Ok(()),
    }
}

/// Stands for the image's disk while nobody writes to it.
struct NoWrites {
    path: PathBuf,
    size_bytes: u64,
}

impl NoWrites {
    fn refuse(&self) -> vmtide_block::Result<()> {
        Err(BlockError::ReadOnly { device: self.name() })
    }
}

impl BlockDevice for NoWrites {
    fn name(&self) -> String {
        self.path.display().to_string()
    }
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    fn read_at(&self, _buffer: &mut [u8], _offset: u64) -> vmtide_block::Result<()> {
        Err(BlockError::unsupported(self.name(), "only its change tracking is open"))
    }
}

impl WritableBlockDevice for NoWrites {
    fn write_at(&self, _data: &[u8], _offset: u64) -> vmtide_block::Result<()> {
        self.refuse()
    }
    fn write_zeroes(&self, _range: ByteRange) -> vmtide_block::Result<()> {
        self.refuse()
    }
    fn flush(&self) -> vmtide_block::Result<()> {
        // There, keep_writers_off has done it: now that writers are kept off, nothing can be flushed any more.
        if cfg!(windows) { Ok(()) } else { flush_image(&self.path) }
    }
}

/// Makes durable what a host that was killed may have left in the system's cache.
fn flush_image(path: &Path) -> vmtide_block::Result<()> {
    let mut files = companion_files(path);
    files.retain(|file| file.is_file());
    files.push(path.to_owned());
    for file in files {
        // Windows flushes only what is open for writing; Unix whatever is open.
        let open = open_file(&file, OpenOptions::new().read(true).write(cfg!(windows)));
        open.and_then(|open| open.sync_all()).map_err(|error| {
            let kind = match vmtide_block::files::is_in_use(&error) {
                true => ErrorKind::ResourceBusy.into(),
                false => error,
            };
            BlockError::io(format!("flush {}", file.display()), kind)
        })?;
    }
    Ok(())
}

/// Locks the image at `path` against writers, to change its tracking. With `durable`, its content can be made
/// durable meanwhile: on Windows that is done before, because a file is flushed through a handle that may write
/// it, and the lock keeps these off. Whatever is written between the two shows.
///
/// # Errors
/// [`TrackError::InUse`] where somebody has the image.
pub(crate) fn keep_writers_off(path: &Path, durable: bool) -> Result<ImageLock> {
    let lock = || ImageLock::take_for_reading(path).map_err(|error| in_use(path, error));
    if !(cfg!(windows) && durable) {
        return lock();
    }
    let stamp = image_identity(path, None)?.stamp;
    flush_image(path).map_err(|error| in_use(path, error))?;
    let lock = lock()?;
    if image_identity(path, None)?.stamp != stamp {
        return Err(changed_meanwhile(path));
    }
    Ok(lock)
}

fn changed_meanwhile(path: &Path) -> TrackError {
    let reason = "it was changed this moment: try again".into();
    TrackError::InUse { disk: path.display().to_string(), reason }
}
