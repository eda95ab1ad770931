//! Disks of Windows: what `virtdisk.dll` says of them, with Hyper-V's own change tracking.
//!
//! Information and changes are asked through handles that are opened for the question and closed after it. Content
//! goes through attached disks, of which [`Handles`] keeps count.
//!
//! **Moments.** Windows has no call that fixes a moment of a disk that a machine is writing; that is a checkpoint,
//! which Hyper-V makes. What is frozen here are disks that nobody writes, such as the parent of a
//! checkpoint: they are attached for reading, which keeps writers out until the moment ends. The tracking
//! id of the moment is the most recent one the disk has. It may be older than the moment; then the next answer
//! from it is larger than it had to be, and never smaller.

use super::handles::{HandleError, Handles, Held};
use super::windows_place;
use super::{
    ChangePage, DiskInfo, DiskProvider, FrozenDisk, FrozenDisks, NewDisk, OpenDisks, ProviderError,
    Result, TrackingState,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, WritableBlockDevice};
use vmtide_virtdisk_ffi::{
    AttachedDisk, DiskAccess, ErrorKind, Guid, NewVirtualDisk, ParentLocation, TrackingId,
    VirtdiskError, VirtualDisk, read_page,
};

/// How long a disk stays attached after it was last asked for. Requests of one client follow within
/// milliseconds; a machine that waits for its disk waits no longer than this.
const KEEP_ATTACHED: Duration = Duration::from_secs(3);

/// The disks of a Windows host.
pub struct WindowsProvider {
    attached: Handles<AttachedDisk>,
}

impl WindowsProvider {
    /// A provider without open disks.
    pub fn new() -> Self {
        Self { attached: Handles::new(KEEP_ATTACHED) }
    }

    /// How many disks are attached now.
    pub fn attached_count(&self) -> usize {
        self.attached.open_count()
    }

    fn attach(&self, path: &Path) -> Result<Arc<Held<AttachedDisk>>> {
        let open = || VirtualDisk::open(path, DiskAccess::ReadOnly)?.attach();
        self.attached.read(&key(path), open).map_err(|error| held(path, error))
    }
}

impl Default for WindowsProvider {
    fn default() -> Self {
        Self::new()
    }
}

/// The name of a disk among the open ones. Paths come here as Windows itself writes them, links and case resolved, so a
/// file has one; letters that only look alike, and case where a directory tells it, are different files. (As for
/// `Debug`, because that loses nothing of a name that is no Unicode.)
fn key(path: &Path) -> String {
    format!("{path:?}")
}

fn held(path: &Path, error: HandleError<VirtdiskError>) -> ProviderError {
    match error {
        HandleError::Busy(who) => ProviderError::InUse {
            path: path.display().to_string(),
            reason: format!("{who} through this agent"),
        },
        HandleError::Open(error) => failed(path, &error),
    }
}

fn failed(path: &Path, error: &VirtdiskError) -> ProviderError {
    failed_with_id(path, error, "")
}

fn failed_with_id(path: &Path, error: &VirtdiskError, id: &str) -> ProviderError {
    let path = path.display().to_string();
    let reason = error.reason();
    match error.kind() {
        ErrorKind::NotFound => ProviderError::NotFound { path },
        ErrorKind::Exists => ProviderError::Exists { path },
        ErrorKind::Denied => ProviderError::Denied { path, reason },
        ErrorKind::InUse => ProviderError::InUse { path, reason },
        ErrorKind::Damaged | ErrorKind::Parent => ProviderError::NotADisk { path, reason },
        ErrorKind::Unsupported => ProviderError::Unsupported { path, reason },
        ErrorKind::UnknownTrackingId => {
            ProviderError::UnknownTrackingId { path, id: id.chars().take(255).collect() }
        }
        ErrorKind::TrackingDisabled => ProviderError::TrackingDisabled { path },
        ErrorKind::TrackingLost => ProviderError::TrackingLost { path, reason },
        ErrorKind::NoSpace => ProviderError::NoSpace { path, reason },
        ErrorKind::Cancelled => ProviderError::Cancelled { path },
        _ => ProviderError::Failed { path, reason },
    }
}

fn format_name(device_id: u32) -> &'static str {
    match device_id {
        1 => "iso",
        2 => "vhd",
        3 => "vhdx",
        4 => "vhds",
        _ => "unknown",
    }
}

const FIXED: u32 = 2;
const DIFFERENCING: u32 = 4;

fn describe(disk: &VirtualDisk) -> vmtide_virtdisk_ffi::Result<DiskInfo> {
    let size = disk.size()?;
    let device_id = disk.storage_type()?.device_id;
    let provider_sub_type = disk.provider_subtype()?;
    let parents = parents_of(disk, provider_sub_type)?;
    Ok(DiskInfo {
        virtual_size_bytes: size.virtual_bytes,
        physical_size_bytes: size.physical_bytes,
        block_size_bytes: if provider_sub_type == FIXED { 0 } else { size.block_bytes },
        logical_sector_bytes: size.sector_bytes,
        physical_sector_bytes: disk.physical_sector_bytes()?,
        parent_path: parents.first().map(|parent| parent.display().to_string()),
        virtual_storage_type: device_id,
        provider_sub_type,
        format: format_name(device_id).to_owned(),
        disk_id: disk.disk_id()?.map(|id| id.to_string()),
    })
}

/// Where the parent may be. The names come from the file, which anybody may have written.
fn parents_of(
    disk: &VirtualDisk,
    provider_sub_type: u32,
) -> vmtide_virtdisk_ffi::Result<Vec<PathBuf>> {
    if provider_sub_type != DIFFERENCING {
        return Ok(Vec::new());
    }
    let names = match disk.parent()? {
        None => Vec::new(),
        Some(ParentLocation::Resolved(path)) => vec![path],
        Some(ParentLocation::Candidates(names)) => names,
    };
    let directory = Path::new(disk.path()).parent().unwrap_or(Path::new(""));
    Ok(names.iter().filter_map(|name| windows_place::in_full(directory, name)).collect())
}

fn tracking_state(disk: &VirtualDisk) -> vmtide_virtdisk_ffi::Result<TrackingState> {
    let state = disk.change_tracking()?;
    Ok(TrackingState {
        enabled: state.enabled,
        newer_changes: state.newer_changes,
        most_recent_id: state.most_recent_id.map(|id| id.to_string()).unwrap_or_default(),
    })
}

impl DiskProvider for WindowsProvider {
    fn info(&self, path: &Path) -> Result<DiskInfo> {
        VirtualDisk::open(path, DiskAccess::Info)
            .and_then(|disk| describe(&disk))
            .map_err(|error| failed(path, &error))
    }

    fn parents(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let asked = VirtualDisk::open(path, DiskAccess::Info).and_then(|disk| {
            let kind = disk.provider_subtype()?;
            Ok((kind, parents_of(&disk, kind)?))
        });
        match asked.map_err(|error| failed(path, &error))? {
            // It must not pass for one that has no parent.
            (DIFFERENCING, places) if places.is_empty() => Err(ProviderError::NotADisk {
                path: path.display().to_string(),
                reason: "it has a parent and no place where that could be".into(),
            }),
            (_, places) => Ok(places),
        }
    }

    fn tracking(&self, path: &Path) -> Result<TrackingState> {
        VirtualDisk::open(path, DiskAccess::Info)
            .and_then(|disk| tracking_state(&disk))
            .map_err(|error| failed(path, &error))
    }

    fn set_tracking(&self, path: &Path, enabled: bool) -> Result<()> {
        let info = self.info(path)?;
        if info.format != "vhdx" {
            return Err(ProviderError::Unsupported {
                path: path.display().to_string(),
                reason: format!("only VHDX can be tracked, this is {}", info.format),
            });
        }
        if self.tracking(path)?.enabled == enabled {
            return Ok(());
        }
        let switch =
            || VirtualDisk::open(path, DiskAccess::ReadWrite)?.set_change_tracking(enabled);
        self.attached.while_closed(&key(path), switch).map_err(|error| held(path, error))
    }

    fn changes(&self, path: &Path, id: &str, range: ByteRange) -> Result<ChangePage> {
        let answer = || {
            let disk = VirtualDisk::open(path, DiskAccess::ReadOnly)?;
            let id = TrackingId::new(id, disk.path())?;
            let size = disk.size()?;
            read_page(&disk, &id, range, size.virtual_bytes)
        };
        let page = answer().map_err(|error| failed_with_id(path, &error, id))?;
        Ok(ChangePage { ranges: page.ranges.into(), processed_bytes: page.processed_bytes })
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn BlockDevice>> {
        Ok(self.attach(path)?)
    }

    fn open_writable(&self, path: &Path) -> Result<Arc<dyn WritableBlockDevice>> {
        let open = || VirtualDisk::open(path, DiskAccess::ReadWrite)?.attach();
        match self.attached.write(&key(path), open) {
            Ok(disk) => Ok(Arc::new(disk)),
            Err(error) => Err(held(path, error)),
        }
    }

    fn create(&self, path: &Path, disk: &NewDisk, cancel: &CancelToken) -> Result<()> {
        let vhdx = match disk.format.as_str() {
            "vhdx" => true,
            "vhd" => false,
            other => {
                return Err(ProviderError::Unsupported {
                    path: path.display().to_string(),
                    reason: format!("Windows makes vhdx and vhd, not {other}"),
                });
            }
        };
        let disk_id = disk.disk_id.as_deref().map(|id| {
            Guid::parse(id).ok_or_else(|| ProviderError::Invalid {
                path: path.display().to_string(),
                reason: format!("the disk id {id:?} is no GUID"),
            })
        });
        let disk_id = disk_id.transpose()?;
        let new = NewVirtualDisk {
            vhdx,
            virtual_bytes: disk.virtual_size_bytes,
            fixed: disk.fixed,
            sector_bytes: disk.logical_sector_bytes.unwrap_or(0),
            physical_sector_bytes: disk.physical_sector_bytes.unwrap_or(0),
            block_bytes: disk.block_size_bytes.unwrap_or(0),
            disk_id,
        };
        VirtualDisk::create(path, &new, cancel).map_err(|error| match error.kind() {
            // The parameters do not fit together, or the size is none: what was asked for.
            ErrorKind::Invalid => {
                ProviderError::Invalid { path: path.display().to_string(), reason: error.reason() }
            }
            _ => failed(path, &error),
        })
    }

    fn open_disks(&self) -> OpenDisks {
        let attached = self.attached_count();
        OpenDisks { open: attached, attached }
    }

    fn freeze(&self, paths: &[PathBuf]) -> Result<Box<dyn FrozenDisks>> {
        let mut disks = Vec::with_capacity(paths.len().min(256));
        for path in paths {
            let attached = self.attach(path)?;
            let state = tracking_state(attached.disk()).map_err(|error| failed(path, &error))?;
            let id = Some(state.most_recent_id).filter(|id| state.enabled && !id.is_empty());
            disks.push(FrozenDisk { path: path.clone(), device: attached, tracking_id: id });
        }
        Ok(Box::new(HeldDisks(disks)))
    }
}

/// Disks attached for reading until this is dropped.
struct HeldDisks(Vec<FrozenDisk>);

impl FrozenDisks for HeldDisks {
    fn disks(&self) -> &[FrozenDisk] {
        &self.0
    }
}
