//! Memory that the backend puts a disk's bytes into, so that they are copied once more and not twice.
//!
//! It holds bytes of disks and nothing else: where they are is said on the pipe, and held against its size here.
//! The backend can neither shorten it, which would end the daemon when it looks there, nor does what it writes
//! too early or too late do more than spoil its own job.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Memory that a backend may inherit.
pub struct Memory {
    file: File,
    address: *const u8,
    length: usize,
}

// SAFETY: an address of bytes that live as long as this value and are only copied from.
unsafe impl Send for Memory {}

impl Memory {
    /// New memory, all of it there.
    ///
    /// # Errors
    /// Where the system has none to give.
    #[cfg(target_os = "linux")]
    pub fn create(length: usize) -> Result<Self> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: a name that ends with a zero; the answer is looked at before it is used.
        let number = unsafe { libc::memfd_create(c"vmtide-bacula".as_ptr(), flags) };
        // Numbers up to 2 would be something else for the backend.
        if number < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: opened above and given to nobody.
        let file = unsafe { File::from_raw_fd(number) };
        if number <= libc::STDERR_FILENO {
            return Err(Error::from(ErrorKind::Unsupported));
        }
        let bytes = i64::try_from(length).map_err(|_| Error::from(ErrorKind::InvalidInput))?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
        // SAFETY: the calls take and give numbers alone.
        unsafe {
            // All of it now: what could not be had later would end the daemon.
            check(libc::fallocate(number, 0, 0, bytes))?;
            check(libc::fcntl(number, libc::F_ADD_SEALS, seals))?;
        }
        let how = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the system's choice; the file is open.
        let address =
            unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, how, number, 0) };
        if address == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        Ok(Self { file, address: address.cast::<u8>(), length })
    }

    /// Only Linux has memory that nobody can shorten.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(target_os = "linux"))]
    pub fn create(_: usize) -> Result<Self> {
        Err(Error::from(ErrorKind::Unsupported))
    }

    /// Has the process that `command` starts inherit it, under the number that it has here.
    #[cfg(target_os = "linux")]
    pub fn hand_over(&self, command: &mut Command) {
        let number = self.descriptor();
        // SAFETY: between fork and exec only this one system call is made. The descriptor is open then, because the
        // caller keeps this value for as long as its backend.
        unsafe {
            command.pre_exec(move || check(libc::fcntl(number, libc::F_SETFD, 0)));
        }
    }

    /// There is none to hand over.
    #[cfg(not(target_os = "linux"))]
    pub fn hand_over(&self, _: &mut Command) {}

    /// The number under which a backend inherits it.
    pub fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Its size in bytes.
    pub const fn length(&self) -> usize {
        self.length
    }

    /// Copies what lies at `offset`; false where that is not all inside.
    #[must_use]
    pub fn copy(&self, offset: usize, buffer: &mut [u8]) -> bool {
        let end = offset.checked_add(buffer.len());
        if end.is_none_or(|end| end > self.length) {
            return false;
        }
        // SAFETY: inside the mapping, which nobody can shorten; the buffer is the caller's alone. The backend may write
        // there at the same time, if it breaks its word, and then these are some bytes or other.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.address.add(offset),
                buffer.as_mut_ptr(),
                buffer.len(),
            );
        }
        true
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this length, and nothing points into it.
        unsafe { libc::munmap(self.address.cast_mut().cast(), self.length) };
    }
}

#[cfg(target_os = "linux")]
fn check(answer: i32) -> Result<()> {
    if answer < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn only_what_lies_inside_is_copied() {
        let memory = Memory::create(100_000).unwrap();
        memory.file.write_all_at(&[7; 100_000], 0).unwrap();
        let mut buffer = [0; 1000];
        assert!(memory.copy(99_000, &mut buffer));
        assert_eq!(buffer, [7; 1000]);
        for offset in [99_001, 100_000, 1 << 40, usize::MAX] {
            assert!(!memory.copy(offset, &mut buffer), "{offset}");
        }
        assert!(!memory.copy(usize::MAX, &mut []));
    }

    #[test]
    fn nobody_can_make_it_shorter() {
        let memory = Memory::create(100_000).unwrap();
        memory.file.set_len(1000).unwrap_err();
        memory.file.set_len(200_000).unwrap_err();
    }
}
