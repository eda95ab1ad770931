//! What a file is, what it takes, and one lock on it.

use crate::names::wide;
use std::ffi::c_void;
use std::fs::File;
use std::io::{Error, Result};
use std::os::windows::io::AsRawHandle;
use std::path::Path;
use windows_sys::Win32::Foundation::{
    ERROR_IO_PENDING, ERROR_LOCK_VIOLATION, GetLastError, NO_ERROR,
};
use windows_sys::Win32::Storage::FileSystem::{
    BY_HANDLE_FILE_INFORMATION, FILE_ID_INFO, FileIdInfo, GetCompressedFileSizeW,
    GetDiskFreeSpaceExW, GetFileInformationByHandle, GetFileInformationByHandleEx,
    INVALID_FILE_SIZE, LOCKFILE_EXCLUSIVE_LOCK, LOCKFILE_FAIL_IMMEDIATELY, LockFileEx,
};
use windows_sys::Win32::System::IO::{OVERLAPPED, OVERLAPPED_0, OVERLAPPED_0_0};

/// What a file is known by, whatever its names are: two open files with equal values are the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// The serial number of the volume.
    pub volume: u64,
    /// The number of the file on it.
    pub file: u128,
}

/// The identity of an open file.
///
/// # Errors
/// What the file system says, where it has no such numbers.
pub fn identity(file: &File) -> Result<FileIdentity> {
    let mut id = FILE_ID_INFO::default();
    let size = u32::try_from(size_of::<FILE_ID_INFO>()).unwrap_or(0);
    // SAFETY: the handle is open while `file` is borrowed; the pointer is to a structure of the length
    // given, which takes any bytes.
    let done = unsafe {
        let pointer = (&raw mut id).cast::<c_void>();
        GetFileInformationByHandleEx(file.as_raw_handle(), FileIdInfo, pointer, size)
    };
    if done != 0 {
        let file = u128::from_le_bytes(id.FileId.Identifier);
        return Ok(FileIdentity { volume: id.VolumeSerialNumber, file });
    }
    // File systems without 128-bit numbers have these.
    let mut old = BY_HANDLE_FILE_INFORMATION::default();
    // SAFETY: as above.
    super::check(unsafe { GetFileInformationByHandle(file.as_raw_handle(), &raw mut old) })?;
    let file = u128::from(joined(old.nFileIndexHigh, old.nFileIndexLow));
    Ok(FileIdentity { volume: old.dwVolumeSerialNumber.into(), file })
}

/// The bytes that a file takes on its volume, holes and compression counted.
///
/// # Errors
/// What the file system says.
pub fn allocated_bytes(path: &Path) -> Result<u64> {
    let path = wide(path)?;
    let mut high = 0_u32;
    // SAFETY: the path ends in a zero and lives through the call, and the pointer is to a live number.
    let low = unsafe { GetCompressedFileSizeW(path.as_ptr(), &raw mut high) };
    if low == INVALID_FILE_SIZE {
        // SAFETY: takes nothing and touches only this thread's last error.
        let code = unsafe { GetLastError() };
        // A size may end in these 32 ones, too.
        if code != NO_ERROR {
            return Err(Error::from_raw_os_error(code.cast_signed()));
        }
    }
    Ok(joined(high, low))
}

/// The bytes that this user may still write on the volume of `directory`.
///
/// # Errors
/// What the file system says.
pub fn free_bytes(directory: &Path) -> Result<u64> {
    // The root of a share is only taken with a separator at its end; any other directory may have one.
    let path = wide(&directory.join(""))?;
    let mut free = 0_u64;
    let none = std::ptr::null_mut();
    // SAFETY: the path ends in a zero and lives through the call; one pointer is to a live number, the
    // others may be null.
    super::check(unsafe { GetDiskFreeSpaceExW(path.as_ptr(), &raw mut free, none, none) })?;
    Ok(free)
}

/// Locks one byte of a file, without waiting, and answers whether it did: for this handle alone, or
/// together with others that do not want it alone. The byte may lie past the end of the file, and should: reading and writing a locked byte fails for
/// others. The lock goes with the handle, however the process ends.
///
/// # Errors
/// Where the file system knows no locks.
pub fn try_lock_byte(file: &File, offset: u64, alone: bool) -> Result<bool> {
    let low = u32::try_from(offset & u64::from(u32::MAX)).unwrap_or(u32::MAX);
    let high = u32::try_from(offset >> 32).unwrap_or(u32::MAX);
    let mut place = OVERLAPPED {
        Anonymous: OVERLAPPED_0 { Anonymous: OVERLAPPED_0_0 { Offset: low, OffsetHigh: high } },
        ..OVERLAPPED::default()
    };
    let flags = LOCKFILE_FAIL_IMMEDIATELY | if alone { LOCKFILE_EXCLUSIVE_LOCK } else { 0 };
    // SAFETY: the handle is open while `file` is borrowed, and synchronous as std opens it, so the
    // structure is not used after the call.
    let done = unsafe { LockFileEx(file.as_raw_handle(), flags, 0, 1, 0, &raw mut place) };
    match super::check(done) {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error().map(i32::cast_unsigned) {
            Some(ERROR_LOCK_VIOLATION | ERROR_IO_PENDING) => Ok(false),
            _ => Err(error),
        },
    }
}

fn joined(high: u32, low: u32) -> u64 {
    (u64::from(high) << 32) | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_locked_once_and_free_after_closing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        std::fs::write(&path, "content").unwrap();
        let first = File::open(&path).unwrap();
        let far = u64::from(u32::MAX) << 20;
        assert!(try_lock_byte(&first, far, true).unwrap());
        let second = File::open(&path).unwrap();
        for alone in [true, false] {
            assert!(!try_lock_byte(&second, far, alone).unwrap());
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "content");
        drop(first);
        assert!(try_lock_byte(&second, far, false).unwrap());
        let third = File::open(&path).unwrap();
        assert!(!try_lock_byte(&third, far, true).unwrap());
        assert!(try_lock_byte(&third, far, false).unwrap());
    }

    #[test]
    fn a_file_is_itself_by_any_name() {
        let directory = tempfile::tempdir().unwrap();
        let (one, two) = (directory.path().join("one"), directory.path().join("two"));
        std::fs::write(&one, vec![1; 100_000]).unwrap();
        std::fs::hard_link(&one, &two).unwrap();
        let id = |path: &Path| identity(&File::open(path).unwrap()).unwrap();
        assert_eq!(id(&one), id(&two));
        std::fs::write(directory.path().join("three"), "x").unwrap();
        assert_ne!(id(&one), id(&directory.path().join("three")));
        assert!(allocated_bytes(&one).unwrap() > 0);
        assert!(free_bytes(directory.path()).unwrap() > 0);
        assert!(allocated_bytes(&directory.path().join("none")).is_err());
    }
}
