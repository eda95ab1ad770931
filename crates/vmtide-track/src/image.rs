//! Images with the files of tracking beside them: hosting one, and asking about one whoever hosts it.

use crate::changes::ChangePage;
#[cfg(unix)]
use crate::control::{ControlServer, RemoteHost};
use crate::offline::OfflineTracking;
use crate::store::FileStore;
use crate::tracking::TrackingState;
use crate::{Identity, Options, Result, TrackError, TrackedDisk};
use parking_lot::{Condvar, Mutex};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};
use vmtide_block::{BlockDevice, BlockError, ByteRange, OpenMode, RawDevice, WritableBlockDevice};
use vmtide_image::{
    Format, ImageLock, ImageWriter, OpenOptions, companion_files, image_info, open_writable,
};

/// What the image at `path` looks like now, for [`TrackedDisk::open`] and
/// [`TrackedDisk::close`]. Meaningful while nobody writes to it.
///
/// # Errors
/// Where the image cannot be read; [`BlockError::Unsupported`] for what is no file, because a block device does
/// not tell that it was written to.
pub fn image_identity(path: &Path, format: Option<Format>) -> vmtide_block::Result<Identity> {
    let metadata = std::fs::metadata(path)
        .map_err(|error| BlockError::io(format!("open {}", path.display()), error))?;
    if !metadata.is_file() {
        return Err(BlockError::unsupported(
            path.display().to_string(),
            "changes can be tracked of image files only: of a block device nobody knows whether it was written to \
             meanwhile",
        ));
    }
    let info = image_info(path, format)?;
    let generation =
        vmtide_image::identity(&RawDevice::open(path, OpenMode::ReadOnly)?, info.format)?;
    let disk_id =
        info.identifiers.get("virtual_disk_id").or_else(|| info.identifiers.get("unique_id"));
    let mut stamp = stamp_of(&metadata);
    for file in companion_files(path) {
        let beside =
            std::fs::metadata(&file).map_or_else(|_| "none".into(), |found| stamp_of(&found));
        stamp = format!("{stamp},{beside}");
    }
    Ok(Identity {
        changed_unix_ms: metadata.modified().ok().map(crate::store::unix_ms),
        disk_id: disk_id.cloned(),
        stamp: Some(stamp),
        file_id: file_id(&metadata),
        generation,
        next_generation: None,
    })
}

/// Times of change count in steps of 100 ns, which is what Windows and SMB tell. With finer ones, Linux and Windows would see
/// different stamps of one image, and each take the other's planned stop for a stranger's write.
const STAMP_NANOS: u32 = 100;

fn stamp_of(metadata: &std::fs::Metadata) -> String {
    let since = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let since = since.unwrap_or_default();
    let subsec_nanos = since.subsec_nanos() / STAMP_NANOS * STAMP_NANOS;
    format!("{}@{}.{subsec_nanos:09}", metadata.len(), since.as_secs())
}

#[cfg(unix)]
#[allow(clippy::unnecessary_wraps, reason = "elsewhere there is none")]
fn file_id(metadata: &std::fs::Metadata) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    // Not the device: its number changes between starts of a machine. Numbers of inodes are used again, times of birth are not.
    let born = metadata.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Some(format!("{}@{}", metadata.ino(), born.map_or(0, |since| since.as_nanos())))
}

#[cfg(not(unix))]
fn file_id(_metadata: &std::fs::Metadata) -> Option<String> {
    None
}

/// How an image is hosted.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// How it is tracked.
    pub tracking: Options,
    /// How often `.rct` is written while the guest writes, in milliseconds; 0 for only when it must be. More often
    /// makes answers after a crash finer, and each time costs the guest's first writes to each region a wait again.
    pub save_interval_ms: u64,
    /// Whether other processes of this host may ask, over a socket beside the image (not on Windows).
    pub socket: bool,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self { tracking: Options::default(), save_interval_ms: 300_000, socket: true }
    }
}

/// An image that this process alone writes to, with its changes tracked. Dropping it closes it in order.
pub struct HostedImage {
    path: PathBuf,
    format: Option<Format>,
    disk: Arc<TrackedDisk>,
    writer: Arc<dyn ImageWriter>,
    #[cfg(unix)]
    control: Mutex<Option<ControlServer>>,
    saver: Mutex<Option<Saver>>,
    _lock: ImageLock,
}

impl HostedImage {
    /// Locks and opens the image at `path` for writing, with what lies beside it.
    ///
    /// # Errors
    /// [`TrackError::InUse`] where somebody else has it; those of opening the image and of
    /// [`TrackedDisk::open`].
    pub fn open(path: &Path, open: &OpenOptions, options: &HostOptions) -> Result<Arc<Self>> {
        // One set of files, whatever links lead to the image; none do where its path was resolved before.
        let real = match open.no_links {
            true => path.to_owned(),
            false => path.canonicalize().unwrap_or_else(|_| path.to_owned()),
        };
        let path = real.as_path();
        let lock = ImageLock::take(path).map_err(|error| in_use(path, error))?;
        let mut identity = image_identity(path, open.format)?;
        let writer = open_writable(path, open)?;
        identity.next_generation = writer.next_identity()?;
        let store = Arc::new(FileStore::new(path));
        let device: Arc<dyn WritableBlockDevice> = Arc::new(WriterDevice(Arc::clone(&writer)));
        let disk = Arc::new(TrackedDisk::open(device, store, &identity, options.tracking.clone())?);
        #[cfg(unix)]
        let control = match options.socket {
            true => Some(ControlServer::start(path, &disk)?),
            false => None,
        };
        let saver = Saver::start(&disk, options.save_interval_ms)?;
        Ok(Arc::new(Self {
            path: path.to_owned(),
            format: open.format,
            disk,
            writer,
            #[cfg(unix)]
            control: Mutex::new(control),
            saver: Mutex::new(Some(saver)),
            _lock: lock,
        }))
    }

    /// The disk: every write must go through it.
    pub fn disk(&self) -> &Arc<TrackedDisk> {
        &self.disk
    }

    /// Where the image is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The planned stop: nothing is written any more, the image is finished and the exact state saved. A second
    /// call does nothing.
    ///
    /// # Errors
    /// What the medium says; the next start finds what a crash would have left.
    pub fn close(&self) -> Result<()> {
        drop(self.saver.lock().take());
        #[cfg(unix)]
        drop(self.control.lock().take());
        self.disk.close(|| {
            self.writer.finish()?;
            Ok(image_identity(&self.path, self.format)?.stamp)
        })
    }
}

impl Drop for HostedImage {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(path = %self.path.display(), %error, "a tracked image could not be closed in order");
        }
    }
}

/// What somebody else's lock on an image is.
pub(crate) fn in_use(path: &Path, error: BlockError) -> TrackError {
    match error.io_kind() {
        Some(std::io::ErrorKind::ResourceBusy) => TrackError::InUse {
            disk: path.display().to_string(),
            reason: "a running QEMU or another vmtide uses it: end that first".into(),
        },
        _ => error.into(),
    }
}

/// An image's writer as the device that is tracked.
struct WriterDevice(Arc<dyn ImageWriter>);

impl BlockDevice for WriterDevice {
    fn name(&self) -> String {
        self.0.name()
    }
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn block_size_bytes(&self) -> u32 {
        self.0.block_size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.0.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<vmtide_block::Extent>> {
        self.0.extents(range)
    }
}

impl WritableBlockDevice for WriterDevice {
    fn write_at(&self, data: &[u8], offset: u64) -> vmtide_block::Result<()> {
        self.0.write_at(data, offset)
    }
    fn write_zeroes(&self, range: ByteRange) -> vmtide_block::Result<()> {
        self.0.write_zeroes(range)
    }
    fn flush(&self) -> vmtide_block::Result<()> {
        self.0.flush()
    }
    fn expect_bulk_writes(&self) {
        self.0.expect_bulk_writes();
    }
    fn resize(&self, size_bytes: u64) -> vmtide_block::Result<()> {
        self.0.resize(size_bytes)
    }
}

/// How often a host leaves a sign of life.
const BEAT_INTERVAL: Duration = Duration::from_secs(10);

/// Leaves signs of life, and writes `.rct` now and then. Dropping it ends that.
struct Saver {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Saver {
    fn start(disk: &Arc<TrackedDisk>, interval_ms: u64) -> Result<Self> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let (disk, stopped) = (Arc::clone(disk), Arc::clone(&stop));
        let interval = Duration::from_millis(interval_ms);
        let mut saved = Instant::now();
        let run = move || {
            let (flag, changed) = &*stopped;
            loop {
                {
                    let mut flag = flag.lock();
                    if !*flag {
                        changed.wait_for(
                            &mut flag,
                            if interval.is_zero() {
                                BEAT_INTERVAL
                            } else {
                                BEAT_INTERVAL.min(interval)
                            },
                        );
                    }
                    if *flag {
                        return;
                    }
                }
                disk.beat();
                if interval.is_zero() || saved.elapsed() < interval {
                    continue;
                }
                saved = Instant::now();
                if let Err(error) = disk.save() {
                    tracing::warn!(%error, "the state of change tracking is saved later");
                }
            }
        };
        let thread = std::thread::Builder::new().name("track-save".to_owned()).spawn(run);
        let thread = thread.map_err(|error| TrackError::io("start a thread", error))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        *self.stop.0.lock() = true;
        self.stop.1.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic in it was its own.
            let _ = thread.join();
        }
    }
}

/// The tracking of an image, whoever hosts it.
pub enum TrackedImage {
    /// A process of this host has it open and is asked.
    #[cfg(unix)]
    Hosted(RemoteHost),
    /// Nobody has; its files are read.
    Offline(OfflineTracking),
}

impl TrackedImage {
    /// Finds out who hosts the image at `path`.
    ///
    /// # Errors
    /// Where the image or the socket of its host cannot be opened.
    pub fn connect_or_open(path: &Path) -> Result<Self> {
        #[cfg(unix)]
        if let Some(host) = RemoteHost::connect(path)? {
            return Ok(Self::Hosted(host));
        }
        Ok(Self::Offline(OfflineTracking::open(path)?))
    }

    /// As [`TrackedDisk::state`]. Lost tracking is not enabled.
    ///
    /// # Errors
    /// Where the host or a file fails.
    pub fn state(&self) -> Result<TrackingState> {
        match self {
            #[cfg(unix)]
            Self::Hosted(host) => host.state(),
            Self::Offline(offline) => Ok(offline.state()),
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
        match self {
            #[cfg(unix)]
            Self::Hosted(host) => host.changes_since(id, range, max_ranges),
            Self::Offline(offline) => offline.changes_since(id, range, max_ranges),
        }
    }

    /// As [`TrackedDisk::checkpoint`].
    ///
    /// # Errors
    /// As there; [`TrackError::InUse`] where an image is open elsewhere without tracking.
    pub fn checkpoint(&mut self) -> Result<String> {
        match self {
            #[cfg(unix)]
            Self::Hosted(host) => host.checkpoint(),
            Self::Offline(offline) => offline.checkpoint().map(|id| id.to_string()),
        }
    }

    /// As [`TrackedDisk::enable`] and [`TrackedDisk::disable`].
    ///
    /// # Errors
    /// As there; [`TrackError::InUse`] where an image is open elsewhere without tracking.
    pub fn set_enabled(&mut self, enabled: bool) -> Result<()> {
        match self {
            #[cfg(unix)]
            Self::Hosted(host) => host.set_enabled(enabled),
            Self::Offline(offline) => offline.set_enabled(enabled),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    /// Linux tells an image's time of change in nanoseconds, Windows the same one in steps of 100.
    #[test]
    fn stamps_are_the_same_on_every_system() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        let stamp_at = |nanos: u64| {
            let file = File::create(&path).unwrap();
            file.set_len(512).unwrap();
            file.set_modified(
                UNIX_EPOCH + Duration::new(1_795_259_064, 0) + Duration::from_nanos(nanos),
            )
            .unwrap();
            stamp_of(&file.metadata().unwrap())
        };
        assert_eq!(stamp_at(94_043_950), stamp_at(94_043_900));
        assert_ne!(stamp_at(94_043_900), stamp_at(94_044_000));
        assert!(stamp_at(94_043_950).ends_with("@1795259064.094043900"));
    }
}
