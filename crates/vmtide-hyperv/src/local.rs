//! The files of the host that this runs on: disks through `virtdisk.dll`, with Hyper-V's own change tracking, the rest
//! as any program reads and writes it.
//!
//! A frozen disk is the parent of a running VM's live file. It is attached for reading, without a disk device, and
//! detached with the last reference; its tracking is asked through the same handle.

use crate::files::{ChangePage, ChangesError, FileEntry, FrozenFile, HostFiles, NewDisk};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind as IoKind, Read, Write};
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::{ByteRange, CancelToken, WritableBlockDevice};
use vmtide_hypervisor::{HypervisorError, Result};
use vmtide_virtdisk_ffi::{
    DiskAccess, ErrorKind, Guid, NewVirtualDisk, TrackingId, VirtdiskError, VirtualDisk, read_page,
};

/// The files of this host, with the rights of this program.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalFiles;

impl LocalFiles {
    /// Access to the files of this host.
    pub const fn new() -> Self {
        Self
    }
}

fn of_disk(path: &str, error: &VirtdiskError) -> HypervisorError {
    let (what, detail) = (path.to_owned(), error.reason());
    match error.kind() {
        ErrorKind::NotFound => HypervisorError::NotFound { what, detail },
        ErrorKind::Denied => HypervisorError::Denied { what, detail },
        ErrorKind::InUse => HypervisorError::Busy { vm: what, detail },
        ErrorKind::Unsupported => HypervisorError::Unsupported { what, detail },
        _ => HypervisorError::failed(format!("opening {path}"), detail),
    }
}

fn of_file(action: &str, path: &str, error: std::io::Error) -> HypervisorError {
    let (what, detail) = (path.to_owned(), error.to_string());
    match error.kind() {
        IoKind::NotFound => HypervisorError::NotFound { what, detail },
        IoKind::PermissionDenied => HypervisorError::Denied { what, detail },
        _ => HypervisorError::io(format!("{action} {path}"), error),
    }
}

/// None for what is not there.
fn found<T>(action: &str, path: &str, outcome: std::io::Result<T>) -> Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == IoKind::NotFound => Ok(None),
        Err(error) => Err(of_file(action, path, error)),
    }
}

fn open(path: &str) -> vmtide_virtdisk_ffi::Result<FrozenFile> {
    let disk = VirtualDisk::open(Path::new(path), DiskAccess::ReadOnly)?;
    let size = disk.size()?;
    let subtype = match disk.provider_subtype()? {
        2 => "fixed",
        4 => "differencing",
        _ => "dynamic",
    };
    let format = match disk.storage_type()?.device_id {
        2 => "vhd",
        3 => "vhdx",
        4 => "vhds",
        _ => "unknown",
    };
    let tracking = disk.change_tracking()?;
    let disk_id = disk.disk_id()?.and_then(|id| Uuid::parse_str(&id.to_string()).ok());
    let physical_sector_bytes = disk.physical_sector_bytes()?;
    Ok(FrozenFile {
        format: format.to_owned(),
        disk_id,
        most_recent_tracking_id: tracking
            .most_recent_id
            .filter(|_| tracking.enabled)
            .map(|id| id.to_string()),
        subtype: subtype.to_owned(),
        logical_sector_bytes: size.sector_bytes,
        physical_sector_bytes,
        block_bytes: if subtype == "fixed" { 0 } else { size.block_bytes },
        device: Arc::new(disk.attach()?),
    })
}

fn ask(path: &str, id: &str, range: ByteRange) -> vmtide_virtdisk_ffi::Result<ChangePage> {
    let disk = VirtualDisk::open(Path::new(path), DiskAccess::ReadOnly)?;
    let id = TrackingId::new(id, disk.path())?;
    let page = read_page(&disk, &id, range, disk.size()?.virtual_bytes)?;
    Ok(ChangePage { ranges: page.ranges, processed_bytes: page.processed_bytes })
}

impl HostFiles for LocalFiles {
    fn open_disk(&self, path: &str) -> Result<FrozenFile> {
        open(path).map_err(|error| of_disk(path, &error))
    }

    fn changes(
        &self,
        path: &str,
        tracking_id: &str,
        range: ByteRange,
    ) -> Result<ChangePage, ChangesError> {
        ask(path, tracking_id, range).map_err(|error| {
            let reason = error.to_string();
            match error.kind() {
                ErrorKind::UnknownTrackingId => ChangesError::UnknownId(reason),
                ErrorKind::TrackingDisabled => ChangesError::NotTracked(reason),
                _ => ChangesError::Failed(reason),
            }
        })
    }

    fn read_file(&self, path: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>> {
        let Some(file) = found("open", path, File::open(path))? else { return Ok(None) };
        let mut content = Vec::new();
        // A file may grow while it is read.
        let read = file.take(limit_bytes.saturating_add(1)).read_to_end(&mut content);
        let read = read.map_err(|error| of_file("read", path, error))?;
        if read as u64 > limit_bytes {
            let detail = format!("it has more than {limit_bytes} bytes");
            return Err(HypervisorError::failed(format!("reading {path}"), detail));
        }
        Ok(Some(content))
    }

    fn list(&self, directory: &str) -> Result<Option<Vec<FileEntry>>> {
        let Some(entries) = found("list", directory, std::fs::read_dir(directory))? else {
            return Ok(None);
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| of_file("list", directory, error))?;
            let Ok(metadata) = entry.metadata() else { continue };
            if let (true, Ok(name)) = (metadata.is_file(), entry.file_name().into_string()) {
                files.push(FileEntry { name, size_bytes: metadata.len() });
            }
        }
        Ok(Some(files))
    }

    fn free_bytes(&self, directory: &str) -> Result<Option<u64>> {
        Ok(vmtide_block::files::free_bytes(Path::new(directory)).ok())
    }

    fn create_directory(&self, path: &str) -> Result<()> {
        std::fs::create_dir_all(path).map_err(|error| of_file("make the directory", path, error))
    }

    fn write_file(&self, path: &str, content: &[u8]) -> Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|error| of_file("make", path, error))?;
        file.write_all(content).and_then(|()| file.sync_all()).map_err(|error| {
            // A part must not be taken for the whole. The first error is the one to tell.
            let _ = std::fs::remove_file(path);
            of_file("write", path, error)
        })
    }

    fn create_disk(&self, path: &str, disk: &NewDisk) -> Result<Arc<dyn WritableBlockDevice>> {
        let is = |extension: &str| path.to_ascii_lowercase().ends_with(extension);
        if !is(".vhdx") && !is(".vhd") {
            return Err(HypervisorError::Unsupported {
                what: path.to_owned(),
                detail: "Windows makes .vhdx and .vhd".to_owned(),
            });
        }
        let new = NewVirtualDisk {
            vhdx: is(".vhdx"),
            virtual_bytes: disk.size_bytes,
            fixed: disk.fixed,
            sector_bytes: disk.logical_sector_bytes,
            physical_sector_bytes: disk.physical_sector_bytes,
            block_bytes: disk.block_bytes,
            disk_id: disk.disk_id.and_then(|id| Guid::parse(&id.to_string())),
        };
        VirtualDisk::create(Path::new(path), &new, &CancelToken::new())
            .map_err(|error| of_disk(path, &error))?;
        self.open_disk_writable(path)
    }

    fn open_disk_writable(&self, path: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        let disk = VirtualDisk::open(Path::new(path), DiskAccess::ReadWrite);
        let disk = disk.and_then(VirtualDisk::attach).map_err(|error| of_disk(path, &error))?;
        Ok(Arc::new(disk))
    }

    fn remove_file(&self, path: &str) -> Result<()> {
        found("remove", path, std::fs::remove_file(path)).map(drop)
    }

    fn remove_directory(&self, path: &str) -> Result<()> {
        match std::fs::remove_dir(path) {
            Err(error) if error.kind() == IoKind::DirectoryNotEmpty => Ok(()),
            outcome => found("remove the directory", path, outcome).map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    //! What needs no virtual disk, on the Windows, or Wine, that the tests run on.
    use super::*;

    #[test]
    fn files_are_made_once_read_whole_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).display().to_string();
        let files = LocalFiles::new();
        assert!(files.list(&at("vm")).unwrap().is_none());
        files.create_directory(&at("vm\\Virtual Machines")).unwrap();
        files.write_file(&at("vm\\a.vmcx"), b"configuration").unwrap();
        assert!(files.write_file(&at("vm\\a.vmcx"), b"other").is_err());
        assert_eq!(files.read_file(&at("vm\\a.vmcx"), 13).unwrap().unwrap(), b"configuration");
        assert!(files.read_file(&at("vm\\a.vmcx"), 12).is_err());
        assert!(files.read_file(&at("vm\\none"), 12).unwrap().is_none());
        let list = files.list(&at("vm")).unwrap().unwrap();
        assert_eq!(list, [FileEntry { name: "a.vmcx".into(), size_bytes: 13 }]);
        assert!(files.free_bytes(&at("vm")).unwrap().unwrap() > 0);
        files.remove_directory(&at("vm")).unwrap();
        files.remove_file(&at("vm\\a.vmcx")).unwrap();
        files.remove_file(&at("vm\\a.vmcx")).unwrap();
        files.remove_directory(&at("vm\\Virtual Machines")).unwrap();
        files.remove_directory(&at("vm")).unwrap();
        assert!(files.list(&at("vm")).unwrap().is_none());
        let missing = files.open_disk(&at("none.vhdx")).err().unwrap();
        assert!(!matches!(missing, HypervisorError::Busy { .. }), "{missing}");
    }
}
