//! The disks of the stand-in host as the agent's provider: files are those of this machine, change tracking is the
//! host's.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_agent::provider::{
    ChangePage, DiskInfo, DiskProvider, FrozenDisks, NewDisk, OpenDisks, ProviderError, Result,
    TrackingState, of_this_host,
};
use vmtide_block::{BlockDevice, ByteRange, CancelToken, WritableBlockDevice};
use vmtide_hyperv::{ChangesError, HostFiles};
use vmtide_standin_hyperv_host::World;

pub(crate) struct HostDisks {
    files: Arc<dyn DiskProvider>,
    host: Arc<dyn HostFiles>,
    root: PathBuf,
}

impl HostDisks {
    pub(crate) fn new(world: &World, root: &Path) -> Self {
        // The agent asks for real paths.
        let root = root.canonicalize().unwrap_or_else(|_| root.to_path_buf());
        Self { files: of_this_host(), host: world.files(), root }
    }

    /// How the host names a file of its volumes.
    fn host_path(&self, path: &Path) -> Option<String> {
        let below = path.strip_prefix(&self.root).ok()?;
        let mut parts = below.components().map(|part| part.as_os_str().to_string_lossy());
        let drive = parts.next()?;
        Some(parts.fold(format!("{drive}:"), |at, part| format!(r"{at}\{part}")))
    }
}

impl DiskProvider for HostDisks {
    fn info(&self, path: &Path) -> Result<DiskInfo> {
        self.files.info(path)
    }

    fn tracking(&self, path: &Path) -> Result<TrackingState> {
        let opened = self.host_path(path).and_then(|path| self.host.open_disk(&path).ok());
        let most_recent_id = opened.and_then(|file| file.most_recent_tracking_id);
        Ok(TrackingState {
            enabled: most_recent_id.is_some(),
            newer_changes: false,
            most_recent_id: most_recent_id.unwrap_or_default(),
        })
    }

    fn set_tracking(&self, path: &Path, enabled: bool) -> Result<()> {
        self.files.set_tracking(path, enabled)
    }

    fn changes(&self, path: &Path, id: &str, range: ByteRange) -> Result<ChangePage> {
        let shown = path.display().to_string();
        let Some(host_path) = self.host_path(path) else {
            return Err(ProviderError::TrackingDisabled { path: shown });
        };
        let page = self.host.changes(&host_path, id, range).map_err(|error| match error {
            ChangesError::UnknownId(_) => {
                ProviderError::UnknownTrackingId { path: shown, id: id.to_owned() }
            }
            ChangesError::NotTracked(_) => ProviderError::TrackingDisabled { path: shown },
            other => ProviderError::TrackingLost { path: shown, reason: other.to_string() },
        })?;
        Ok(ChangePage {
            ranges: page.ranges.iter().collect(),
            processed_bytes: page.processed_bytes,
        })
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn BlockDevice>> {
        self.files.open(path)
    }

    fn open_writable(&self, path: &Path) -> Result<Arc<dyn WritableBlockDevice>> {
        self.files.open_writable(path)
    }

    fn create(&self, path: &Path, disk: &NewDisk, cancel: &CancelToken) -> Result<()> {
        self.files.create(path, disk, cancel)
    }

    fn open_disks(&self) -> OpenDisks {
        self.files.open_disks()
    }

    fn freeze(&self, paths: &[PathBuf]) -> Result<Box<dyn FrozenDisks>> {
        self.files.freeze(paths)
    }
}
