//! What the agent needs of the platform it runs on: virtual disks by path, with their change tracking.
//!
//! One trait, two providers: `virtdisk.dll` on Windows, `vmtide-image` with `vmtide-track` elsewhere. The
//! server knows nothing of either, so one set of tests holds for both. Paths arrive here only after the
//! server has found them inside a configured root. All calls may block; the server runs them on threads
//! made for that. Every method may be called from many threads at once.

mod error;
#[cfg(not(windows))]
mod files;
#[cfg(any(windows, test))]
mod handles;
mod new_disk;
#[cfg(windows)]
mod windows;
#[cfg(any(windows, test))]
mod windows_place;

pub use error::ProviderError;
#[cfg(not(windows))]
pub use files::FilesProvider;
#[cfg(windows)]
pub use windows::WindowsProvider;

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, WritableBlockDevice};

/// The result of a provider's call.
pub type Result<T> = std::result::Result<T, ProviderError>;

/// Virtual disks of this host by path.
pub trait DiskProvider: Send + Sync + 'static {
    /// What the disk is, also where its parent is missing. It is asked before anybody knows where the parent lies,
    /// and so that this can be found out: nothing that the disk names in other directories may be touched for it.
    ///
    /// # Errors
    /// [`NotFound`](ProviderError::NotFound), [`NotADisk`](ProviderError::NotADisk), or as the file system has it.
    fn info(&self, path: &Path) -> Result<DiskInfo>;

    /// The places where the platform may look for the parent of this image, the likeliest first; those that are no full
    /// paths begin at the image's directory. None of an image without a parent. As for [`info`](Self::info), nothing is
    /// touched there.
    ///
    /// # Errors
    /// As [`info`](Self::info).
    fn parents(&self, path: &Path) -> Result<Vec<PathBuf>> {
        Ok(self.info(path)?.parent_path.map(PathBuf::from).into_iter().collect())
    }

    /// The state of its change tracking.
    ///
    /// # Errors
    /// As [`info`](Self::info).
    fn tracking(&self, path: &Path) -> Result<TrackingState>;

    /// Switches change tracking on or off. Switching on what is on changes nothing; switching off forgets all ids.
    ///
    /// # Errors
    /// As [`info`](Self::info); [`InUse`](ProviderError::InUse) while somebody else holds the disk;
    /// [`Unsupported`](ProviderError::Unsupported) where the format cannot be tracked.
    fn set_tracking(&self, path: &Path, enabled: bool) -> Result<()>;

    /// The ranges changed since `id` was sealed, within `range`: as much of it as one page holds.
    ///
    /// # Errors
    /// [`UnknownTrackingId`](ProviderError::UnknownTrackingId),
    /// [`TrackingDisabled`](ProviderError::TrackingDisabled),
    /// [`TrackingLost`](ProviderError::TrackingLost): each means that the disk is to be read in full.
    fn changes(&self, path: &Path, id: &str, range: ByteRange) -> Result<ChangePage>;

    /// The content, for reading. The handle is closed when the last reference is dropped.
    ///
    /// # Errors
    /// As [`info`](Self::info); [`InUse`](ProviderError::InUse).
    fn open(&self, path: &Path) -> Result<Arc<dyn BlockDevice>>;

    /// The content, for writing: a restore. What is written is tracked like any other write.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    fn open_writable(&self, path: &Path) -> Result<Arc<dyn WritableBlockDevice>>;

    /// Makes a new disk, empty. The path must not exist. A fixed one takes as long as writing it, and is given up,
    /// without leaving a file, once `cancel` says so.
    ///
    /// # Errors
    /// [`Exists`](ProviderError::Exists), [`Unsupported`](ProviderError::Unsupported) for a format this
    /// platform does not make, [`Invalid`](ProviderError::Invalid), [`NoSpace`](ProviderError::NoSpace),
    /// [`Cancelled`](ProviderError::Cancelled).
    fn create(&self, path: &Path, disk: &NewDisk, cancel: &CancelToken) -> Result<()>;

    /// Fixes one moment of all of these disks, each readable and unchanging until it is dropped, and seals a
    /// tracking id of that moment where the disk is tracked.
    ///
    /// # Errors
    /// Everything made so far is undone before an error is returned.
    fn freeze(&self, paths: &[PathBuf]) -> Result<Box<dyn FrozenDisks>>;

    /// How many disks are open now. Does not wait for the platform.
    fn open_disks(&self) -> OpenDisks;
}

/// How many disks are open through a provider.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenDisks {
    /// For their content: to read, to write, or frozen.
    pub open: usize,
    /// Attached to the host, which is how some platforms open them.
    pub attached: usize,
}

/// The disks of the host that this runs on.
#[cfg(not(windows))]
pub fn of_this_host() -> Arc<dyn DiskProvider> {
    Arc::new(FilesProvider::default())
}

/// The disks of the host that this runs on.
#[cfg(windows)]
pub fn of_this_host() -> Arc<dyn DiskProvider> {
    Arc::new(WindowsProvider::default())
}

/// Disks at one moment; dropping it ends the moment.
pub trait FrozenDisks: Send + Sync {
    /// The disks, in the order asked for.
    fn disks(&self) -> &[FrozenDisk];
}

/// One disk of a moment.
#[derive(Clone)]
pub struct FrozenDisk {
    /// The path asked for.
    pub path: PathBuf,
    /// Its content at the moment.
    pub device: Arc<dyn BlockDevice>,
    /// The tracking id of the moment; none where the disk is not tracked.
    pub tracking_id: Option<String>,
}

/// What a disk is. Numbers of types are those of `VIRTUAL_STORAGE_TYPE` and of
/// `GET_VIRTUAL_DISK_INFO_PROVIDER_SUBTYPE` (virtdisk.h).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Size that the guest sees, in bytes.
    pub virtual_size_bytes: u64,
    /// Size of the file, in bytes.
    pub physical_size_bytes: u64,
    /// Unit of allocation in bytes; 0 for fixed disks.
    pub block_size_bytes: u32,
    /// Logical sector in bytes: 512 or 4096.
    pub logical_sector_bytes: u32,
    /// Physical sector in bytes: 512 or 4096.
    pub physical_sector_bytes: u32,
    /// The parent of a differencing disk, as it was found, else as it is named in the child.
    pub parent_path: Option<String>,
    /// 0 unknown, 1 ISO, 2 VHD, 3 VHDX, 4 VHD set; formats that Windows does not know are 0.
    pub virtual_storage_type: u32,
    /// 2 fixed, 3 dynamic, 4 differencing.
    pub provider_sub_type: u32,
    /// The name of the format, in lower case: `vhdx`, `vhd`, `vmdk`, `qcow2`, `raw`.
    pub format: String,
    /// The disk's own id, the same through a chain, where the format has one.
    pub disk_id: Option<String>,
}

/// The state of change tracking of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackingState {
    /// Whether writes are tracked.
    pub enabled: bool,
    /// Whether something was written since the most recent id.
    pub newer_changes: bool,
    /// The most recent id; empty where none was sealed.
    pub most_recent_id: String,
}

/// A part of the answer to "what changed?".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangePage {
    /// Changed ranges: sorted, merged, inside the range asked for.
    pub ranges: Vec<ByteRange>,
    /// How many bytes of the range asked for this page speaks for, from its beginning; never 0 for a range that
    /// is not empty.
    pub processed_bytes: u64,
}

/// A disk to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewDisk {
    /// `vhdx`, `vhd`, `qcow2`, `vmdk` or `raw`.
    pub format: String,
    /// Size that the guest will see, in bytes; a multiple of the sector.
    pub virtual_size_bytes: u64,
    /// All space taken at once instead of as it is written.
    pub fixed: bool,
    /// 512 or 4096; none for the format's own.
    pub logical_sector_bytes: Option<u32>,
    /// 512 or 4096; none for the format's own.
    pub physical_sector_bytes: Option<u32>,
    /// The unit of allocation in bytes; none for the format's own.
    #[serde(default)]
    pub block_size_bytes: Option<u32>,
    /// The disk's own id, a GUID: a disk that is restored keeps that of the one it was. None for a new one.
    #[serde(default)]
    pub disk_id: Option<String>,
}
