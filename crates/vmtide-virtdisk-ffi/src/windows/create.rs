//! New disks.

use super::disk::{DiskAccess, VirtualDisk, check, native_path};
use crate::{Guid, Result};
use std::os::windows::io::{FromRawHandle, OwnedHandle};
use std::path::Path;
use std::ptr;
use windows_sys::Win32::Foundation::HANDLE;
use windows_sys::Win32::Storage::Vhd;

/// A disk to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewVirtualDisk {
    /// A VHDX, else a VHD.
    pub vhdx: bool,
    /// Size that the guest will see, in bytes: whole sectors.
    pub virtual_bytes: u64,
    /// All space taken at once, which takes as long as writing it.
    pub fixed: bool,
    /// 512 or 4096; 0 for the format's own.
    pub sector_bytes: u32,
    /// 512 or 4096; 0 for the format's own.
    pub physical_sector_bytes: u32,
    /// The unit of allocation; 0 for the format's own.
    pub block_bytes: u32,
    /// The disk's own id; none for a new one. VHDX only.
    pub disk_id: Option<Guid>,
}

impl VirtualDisk {
    /// Makes a disk. The path must not exist.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`](crate::ErrorKind::Exists), or what Windows says.
    pub fn create(path: &Path, disk: &NewVirtualDisk) -> Result<()> {
        let wide = native_path(path)?;
        let kind = Vhd::VIRTUAL_STORAGE_TYPE {
            DeviceId: if disk.vhdx {
                Vhd::VIRTUAL_STORAGE_TYPE_DEVICE_VHDX
            } else {
                Vhd::VIRTUAL_STORAGE_TYPE_DEVICE_VHD
            },
            VendorId: Vhd::VIRTUAL_STORAGE_TYPE_VENDOR_MICROSOFT,
        };
        let parameters = Vhd::CREATE_VIRTUAL_DISK_PARAMETERS {
            Version: Vhd::CREATE_VIRTUAL_DISK_VERSION_2,
            Anonymous: Vhd::CREATE_VIRTUAL_DISK_PARAMETERS_0 {
                // No parent, no source. The id of the content is always a new one.
                Version2: Vhd::CREATE_VIRTUAL_DISK_PARAMETERS_0_1 {
                    MaximumSize: disk.virtual_bytes,
                    BlockSizeInBytes: disk.block_bytes,
                    SectorSizeInBytes: disk.sector_bytes,
                    PhysicalSectorSizeInBytes: disk.physical_sector_bytes,
                    ..Default::default()
                },
            },
        };
        let flags = if disk.fixed {
            Vhd::CREATE_VIRTUAL_DISK_FLAG_FULL_PHYSICAL_ALLOCATION
        } else {
            Vhd::CREATE_VIRTUAL_DISK_FLAG_NONE
        };
        let mut handle: HANDLE = ptr::null_mut();
        // SAFETY: all pointers are to live values or null where that is allowed; the path ends with a zero;
        // version 2 goes with access NONE.
        let code = unsafe {
            Vhd::CreateVirtualDisk(
                &raw const kind,
                wide.as_ptr(),
                Vhd::VIRTUAL_DISK_ACCESS_NONE,
                ptr::null_mut(),
                flags,
                0,
                &raw const parameters,
                ptr::null(),
                &raw mut handle,
            )
        };
        check("create", &path.display().to_string(), code)?;
        // SAFETY: the call succeeded, so the handle is open and belongs to nobody else.
        drop(unsafe { OwnedHandle::from_raw_handle(handle) });
        let Some(id) = disk.disk_id else { return Ok(()) };
        let given = Self::open(path, DiskAccess::ReadWrite).and_then(|made| made.set_disk_id(id));
        given.inspect_err(|_| {
            // One with another id must not be taken for what was asked for. The first error is the one to tell.
            let _ = std::fs::remove_file(path);
        })
    }
}
