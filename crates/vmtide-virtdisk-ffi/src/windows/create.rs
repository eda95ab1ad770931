//! New disks.
//!
//! A fixed disk takes as long to make as to write, so Windows makes it while this side looks now and then whether anybody
//! still wants it. The kernel writes into the state of the request until it is over, so that outlives it.

use super::disk::{DiskAccess, VirtualDisk, check, native_path};
use crate::{ErrorKind, Guid, Result, VirtdiskError, error};
use std::mem::ManuallyDrop;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::path::Path;
use std::ptr;
use vmtide_block::CancelToken;
use windows_sys::Win32::Foundation::{ERROR_IO_PENDING, ERROR_SUCCESS, GetLastError, HANDLE};
use windows_sys::Win32::Storage::Vhd;
use windows_sys::Win32::System::IO::{CancelIoEx, OVERLAPPED};
use windows_sys::Win32::System::Threading::{CreateEventW, WaitForSingleObject};

/// How often it is looked whether a disk is made, and whether it is still wanted, in milliseconds.
const LOOK_EVERY_MS: u32 = 100;

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
    /// Makes a disk. The path must not exist. Once `cancel` is cancelled it is given up, and no file is left.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`], [`ErrorKind::Cancelled`], or what Windows says.
    pub fn create(path: &Path, disk: &NewVirtualDisk, cancel: &CancelToken) -> Result<()> {
        make(path, disk, cancel)?;
        let Some(id) = disk.disk_id else { return Ok(()) };
        let given = Self::open(path, DiskAccess::ReadWrite).and_then(|made| made.set_disk_id(id));
        given.inspect_err(|_| {
            // One with another id must not be taken for what was asked for. The first error is the one to tell.
            let _ = std::fs::remove_file(path);
        })
    }
}

/// The same without an id of its own.
fn make(path: &Path, disk: &NewVirtualDisk, cancel: &CancelToken) -> Result<()> {
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
    let shown = path.display().to_string();
    let mut request = Request::new(&shown)?;
    let mut handle: HANDLE = ptr::null_mut();
    // SAFETY: all pointers are to live values or null where that is allowed; the path ends with a zero;
    // version 2 goes with access NONE; the state of the request lives until that is over.
    let code = unsafe {
        Vhd::CreateVirtualDisk(
            &raw const kind,
            wide.as_ptr(),
            Vhd::VIRTUAL_DISK_ACCESS_NONE,
            ptr::null_mut(),
            flags,
            0,
            &raw const parameters,
            request.state,
            &raw mut handle,
        )
    };
    if code != ERROR_IO_PENDING {
        check(WHAT, &shown, code)?;
    }
    // SAFETY: the call succeeded or goes on, so the handle is open and belongs to nobody else.
    let handle = unsafe { OwnedHandle::from_raw_handle(handle) };
    if code != ERROR_IO_PENDING {
        return Ok(());
    }
    let ended = request.wait(&handle, &shown, cancel);
    drop(handle);
    if let Err(error) = &ended
        && error.kind() != ErrorKind::Exists
    {
        // A part must not be taken for the whole. The first error is the one to tell.
        let _ = std::fs::remove_file(path);
    }
    ended
}

/// The operation, for errors.
const WHAT: &str = "create";

/// A request that goes on after its call has returned.
struct Request {
    /// Given to the kernel, which writes there until the request is over; of a [`Box`].
    state: *mut OVERLAPPED,
    event: ManuallyDrop<OwnedHandle>,
    /// Whether nobody tells when the kernel is done with it.
    is_lost: bool,
}

impl Drop for Request {
    fn drop(&mut self) {
        if self.is_lost {
            return;
        }
        // SAFETY: it is dropped once, and the request has not begun or is over.
        unsafe {
            drop(Box::from_raw(self.state));
            ManuallyDrop::drop(&mut self.event);
        }
    }
}

impl Request {
    fn new(path: &str) -> Result<Self> {
        // SAFETY: no attributes, no name; reset by hand.
        let event = unsafe { CreateEventW(ptr::null(), 1, 0, ptr::null()) };
        if event.is_null() {
            // SAFETY: no pointers.
            return Err(VirtdiskError::call(WHAT, path, unsafe { GetLastError() }));
        }
        // SAFETY: the call succeeded, so the handle is open and belongs to nobody else.
        let event = unsafe { OwnedHandle::from_raw_handle(event) };
        let state = Box::new(OVERLAPPED { hEvent: event.as_raw_handle(), ..Default::default() });
        let state = Box::into_raw(state);
        Ok(Self { state, event: ManuallyDrop::new(event), is_lost: false })
    }

    /// Waits until the request on `disk` is over, which is soon once `cancel` is cancelled.
    fn wait(&mut self, disk: &OwnedHandle, path: &str, cancel: &CancelToken) -> Result<()> {
        let mut given_up = false;
        loop {
            // SAFETY: the event is open. Whatever comes of it, the progress tells more.
            unsafe { WaitForSingleObject(self.event.as_raw_handle(), LOOK_EVERY_MS) };
            let mut progress = Vhd::VIRTUAL_DISK_PROGRESS::default();
            // SAFETY: the handle is open, both structures live through the call.
            let code = unsafe {
                Vhd::GetVirtualDiskOperationProgress(
                    disk.as_raw_handle(),
                    self.state,
                    &raw mut progress,
                )
            };
            if code == ERROR_SUCCESS && progress.OperationStatus != ERROR_IO_PENDING {
                let aborted = error::ERROR_OPERATION_ABORTED;
                return match progress.OperationStatus {
                    ERROR_SUCCESS if given_up => Err(VirtdiskError::call(WHAT, path, aborted)),
                    code => check(WHAT, path, code),
                };
            }
            self.is_lost = code != ERROR_SUCCESS;
            if self.is_lost || (cancel.is_cancelled() && !given_up) {
                // SAFETY: the state is that of a request on this handle.
                unsafe { CancelIoEx(disk.as_raw_handle(), self.state) };
                given_up = true;
            }
            if self.is_lost {
                return Err(VirtdiskError::call(WHAT, path, code));
            }
        }
    }
}
