//! The disk device that appears where a disk cannot be read through its own handle.

use super::disk::{VirtualDisk, check};
use super::overlapped::OverlappedFile;
use crate::{ErrorKind, Result, VirtdiskError, error, wide};
use std::os::windows::io::{FromRawHandle, OwnedHandle};
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use windows_sys::Win32::Foundation::{
    ERROR_FILE_NOT_FOUND, GENERIC_READ, GENERIC_WRITE, GetLastError, INVALID_HANDLE_VALUE,
};
use windows_sys::Win32::Storage::FileSystem::{
    CreateFileW, FILE_FLAG_OVERLAPPED, FILE_SHARE_DELETE, FILE_SHARE_READ, FILE_SHARE_WRITE,
    OPEN_EXISTING,
};
use windows_sys::Win32::Storage::Vhd;
use windows_sys::Win32::System::Ioctl::{
    DISK_ATTRIBUTE_OFFLINE, IOCTL_DISK_SET_DISK_ATTRIBUTES, SET_DISK_ATTRIBUTES,
};

/// How long the device may take to appear after the disk was attached.
const APPEARS_WITHIN: Duration = Duration::from_secs(10);
/// How often it is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Units for the path of a device; `\\.\PhysicalDrive` and a number take 20.
const PATH_UNITS: usize = 512;
/// The largest buffer for the path of a device, in units: the longest path Windows has.
const MAX_PATH_UNITS: usize = 32 << 10;

/// Where the device of an attached disk is, as in `\\.\PhysicalDrive3`.
fn device_path(disk: &VirtualDisk) -> Result<Vec<u16>> {
    let mut units = PATH_UNITS;
    loop {
        let mut buffer = vec![0_u16; units];
        let mut bytes = u32::try_from(units.saturating_mul(2)).unwrap_or(u32::MAX);
        // SAFETY: the buffer is writable for as many bytes as said.
        let code = unsafe {
            Vhd::GetVirtualDiskPhysicalPath(disk.raw(), &raw mut bytes, buffer.as_mut_ptr())
        };
        if code == error::ERROR_INSUFFICIENT_BUFFER && units < MAX_PATH_UNITS {
            units = (units * 2).min(MAX_PATH_UNITS);
            continue;
        }
        check("find the device of", disk.path(), code)?;
        if wide::until_zero(&buffer).is_none_or(|path| path.is_empty()) {
            return Err(VirtdiskError::Answer {
                operation: "find the device of",
                path: disk.path().to_owned(),
                problem: "its path is empty or has no end".to_owned(),
                kind: ErrorKind::Other,
            });
        }
        return Ok(buffer);
    }
}

/// Opens the device of an attached disk, waiting until it is there.
pub(super) fn open(
    disk: &VirtualDisk,
    writable: bool,
    sector_bytes: u32,
) -> Result<OverlappedFile> {
    let path = device_path(disk)?;
    let access = if writable { GENERIC_READ | GENERIC_WRITE } else { GENERIC_READ };
    let deadline = Instant::now() + APPEARS_WITHIN;
    loop {
        // SAFETY: the path ends with a zero (checked above); no attributes, no template.
        let handle = unsafe {
            CreateFileW(
                path.as_ptr(),
                access,
                FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE,
                ptr::null(),
                OPEN_EXISTING,
                FILE_FLAG_OVERLAPPED,
                ptr::null_mut(),
            )
        };
        if handle != INVALID_HANDLE_VALUE {
            // SAFETY: the call succeeded, so the handle is open and belongs to nobody else.
            let handle = unsafe { OwnedHandle::from_raw_handle(handle) };
            let name = disk.path().to_owned();
            return Ok(OverlappedFile::new(Arc::new(handle), name, sector_bytes));
        }
        // SAFETY: no pointers.
        let code = unsafe { GetLastError() };
        if code != ERROR_FILE_NOT_FOUND || Instant::now() >= deadline {
            return Err(VirtdiskError::call("open the device of", disk.path(), code));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Takes the device offline, so that no volume of it is mounted while it is written.
pub(super) fn take_offline(disk: &VirtualDisk, device: &OverlappedFile) -> Result<()> {
    let attributes = SET_DISK_ATTRIBUTES {
        Version: u32::try_from(size_of::<SET_DISK_ATTRIBUTES>()).unwrap_or_default(),
        // Not after the next start of Windows: the guest decides.
        Persist: false,
        Attributes: DISK_ATTRIBUTE_OFFLINE,
        AttributesMask: DISK_ATTRIBUTE_OFFLINE,
        ..Default::default()
    };
    device
        .control(IOCTL_DISK_SET_DISK_ATTRIBUTES, &attributes)
        .map_err(|code| VirtdiskError::call("take offline the device of", disk.path(), code))
}
