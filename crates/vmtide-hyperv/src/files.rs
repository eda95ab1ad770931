//! The files of a host: how a backup reads frozen disks, and a restore writes new ones.
//!
//! Paths are those the host itself uses (`C:\VMs\web\web.vhdx`, `C:\ClusterStorage\Volume1\…`,
//! `\\server\share\…`); whoever implements [`HostFiles`] finds them by its own way: as they are on the host,
//! as a share over SMB, as a directory in the tests.

use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::{BlockDevice, ByteRange, RangeSet, WritableBlockDevice};
use vmtide_hypervisor::{HealthCheck, Result};

/// Access to the files of a Hyper-V host. Calls block; it may be shared by threads.
pub trait HostFiles: Send + Sync {
    /// Opens a virtual disk that nobody writes, with the parents it has, for reading.
    ///
    /// # Errors
    /// [`NotFound`](vmtide_hypervisor::HypervisorError::NotFound),
    /// [`Denied`](vmtide_hypervisor::HypervisorError::Denied),
    /// [`Busy`](vmtide_hypervisor::HypervisorError::Busy) while somebody writes it, or what the way to the
    /// host says.
    fn open_disk(&self, path: &str) -> Result<FrozenFile>;

    /// One page of the bytes of the disk at `path` that changed since `tracking_id` was sealed, within
    /// `range`. The caller asks again behind [`ChangePage::processed_bytes`] until all is covered.
    ///
    /// # Errors
    /// Each means that the disk is read in full, never that nothing changed.
    fn changes(
        &self,
        path: &str,
        tracking_id: &str,
        range: ByteRange,
    ) -> Result<ChangePage, ChangesError>;

    /// A small file (a configuration), whole; none where there is none.
    ///
    /// # Errors
    /// As [`open_disk`](Self::open_disk); a file larger than `limit_bytes` is an error.
    fn read_file(&self, path: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>>;

    /// The files of a directory, without those of its directories; none where there is none.
    ///
    /// # Errors
    /// As [`open_disk`](Self::open_disk).
    fn list(&self, directory: &str) -> Result<Option<Vec<FileEntry>>>;

    /// The bytes free on the volume that holds `directory`; none where it cannot be told.
    ///
    /// # Errors
    /// As [`open_disk`](Self::open_disk).
    fn free_bytes(&self, directory: &str) -> Result<Option<u64>>;

    /// Makes a directory with its parents; one that is there is left as it is.
    ///
    /// # Errors
    /// As [`open_disk`](Self::open_disk), or a target that cannot be written.
    fn create_directory(&self, path: &str) -> Result<()>;

    /// Makes a small file. What is there is never replaced.
    ///
    /// # Errors
    /// As [`create_directory`](Self::create_directory).
    fn write_file(&self, path: &str, content: &[u8]) -> Result<()>;

    /// Makes a new, empty disk and opens it for writing. What is there is never replaced.
    ///
    /// # Errors
    /// As [`create_directory`](Self::create_directory).
    fn create_disk(&self, path: &str, disk: &NewDisk) -> Result<Arc<dyn WritableBlockDevice>>;

    /// Opens the disk of a VM that is off for writing.
    ///
    /// # Errors
    /// As [`open_disk`](Self::open_disk).
    fn open_disk_writable(&self, path: &str) -> Result<Arc<dyn WritableBlockDevice>>;

    /// Removes a file that a failed restore of ours has made; one that is gone is no error.
    ///
    /// # Errors
    /// As [`create_directory`](Self::create_directory).
    fn remove_file(&self, path: &str) -> Result<()>;

    /// Removes a directory that a failed restore of ours has made and that is empty now; one that is gone,
    /// or is not empty, is no error and is left. The default leaves all: an empty directory harms nobody.
    ///
    /// # Errors
    /// As [`create_directory`](Self::create_directory).
    fn remove_directory(&self, path: &str) -> Result<()> {
        let _ = path;
        Ok(())
    }

    /// How the files are reached, for people who look whether that is as it should be: protocol, protection, login. What
    /// cannot be reached is among the answers. The default knows of no network in between.
    fn examine_way(&self) -> Vec<HealthCheck> {
        Vec::new()
    }
}

/// A disk opened for a backup.
#[derive(Clone)]
pub struct FrozenFile {
    /// The content, as the guest sees it. The file is closed with the last reference.
    pub device: Arc<dyn BlockDevice>,
    /// `vhdx`, `vhd` or `vhds`.
    pub format: String,
    /// The GUID of the virtual disk, the same along a chain of differencing files; none for VHD.
    pub disk_id: Option<Uuid>,
    /// The most recent tracking id that the file knows; none where the way to it cannot tell.
    pub most_recent_tracking_id: Option<String>,
    /// `fixed`, `dynamic` or `differencing`.
    pub subtype: String,
    /// The logical sector size in bytes.
    pub logical_sector_bytes: u32,
    /// The physical sector size in bytes.
    pub physical_sector_bytes: u32,
    /// The block size of the file in bytes; 0 where it has none.
    pub block_bytes: u32,
}

/// One answer of the change tracking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangePage {
    /// What changed. Within the range asked for, merged; more than the truth is allowed, less is not.
    pub ranges: RangeSet,
    /// How many bytes of the range, from its beginning, this answer covers. 0 is a broken answer.
    pub processed_bytes: u64,
}

/// Why the changes of a disk cannot be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangesError {
    /// The id is not known (0xC03A0029), or its information is missing (0xC03A0030).
    #[error("the tracking id is not known: {0}")]
    UnknownId(String),
    /// The disk is not tracked (0xC03A002A).
    #[error("changes are not tracked: {0}")]
    NotTracked(String),
    /// The answer is larger than the way to the host takes: asked again for a smaller range it may fit.
    #[error("the list of changes is too large for one answer: {0}")]
    TooLarge(String),
    /// Anything else.
    #[error("changes cannot be told: {0}")]
    Failed(String),
}

/// A file in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    /// The name, without directories.
    pub name: String,
    /// The size in bytes.
    pub size_bytes: u64,
}

/// A disk to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDisk {
    /// The size in bytes, a multiple of the logical sector size.
    pub size_bytes: u64,
    /// The GUID that tracking follows; none makes a new one.
    pub disk_id: Option<Uuid>,
    /// 512 or 4096.
    pub logical_sector_bytes: u32,
    /// 512 or 4096.
    pub physical_sector_bytes: u32,
    /// The block size; 0 takes the format's default.
    pub block_bytes: u32,
    /// Whether all space is taken at once.
    pub fixed: bool,
}
