//! A mapping of memory, which ends with its last user.

#[cfg(target_os = "linux")]
pub use linux::Mapping;
#[cfg(not(target_os = "linux"))]
pub use none::Mapping;

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::File;
    use std::io::{Error, ErrorKind, Result};
    use std::os::fd::AsRawFd;
    use std::ptr::NonNull;

    pub struct Mapping {
        address: NonNull<u8>,
        length: usize,
    }

    // SAFETY: an address of bytes that live as long as this value; who may look at them is up to the slots.
    unsafe impl Send for Mapping {}
    // SAFETY: as above.
    unsafe impl Sync for Mapping {}

    impl Mapping {
        pub fn inherited(number: i32, length: usize) -> Result<Self> {
            // A descriptor of our own: nothing is taken over from whoever else may use that number.
            let file =
                File::options().read(true).write(true).open(format!("/proc/self/fd/{number}"))?;
            // SAFETY: the call takes and gives numbers alone.
            let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
            let is_long = usize::try_from(file.metadata()?.len()).is_ok_and(|has| has >= length);
            if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 || !is_long {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "it is no memory of this size that stays so large",
                ));
            }
            let this = Self::map(&file, length)?;
            // Nobody else writes to it from now on. A kernel that does not know the seal is no reason to do without.
            // SAFETY: the calls take and give numbers alone.
            unsafe {
                libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_FUTURE_WRITE);
                libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC);
            }
            Ok(this)
        }

        fn map(file: &File, length: usize) -> Result<Self> {
            // SAFETY: a new mapping at an address of the system's choice; the file is open.
            let address = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    length,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_POPULATE,
                    file.as_raw_fd(),
                    0,
                )
            };
            if address == libc::MAP_FAILED {
                return Err(Error::last_os_error());
            }
            let address = NonNull::new(address.cast::<u8>());
            let address = address.ok_or_else(|| Error::from(ErrorKind::OutOfMemory))?;
            Ok(Self { address, length })
        }

        /// # Safety
        /// The range lies inside the mapping, and nobody writes to it for as long as the answer is used.
        pub unsafe fn slice(&self, offset: usize, length: usize) -> &[u8] {
            debug_assert!(offset + length <= self.length);
            // SAFETY: promised by the caller; the mapping lives as long as this value, and the memory behind it
            // cannot be made shorter.
            unsafe { std::slice::from_raw_parts(self.address.add(offset).as_ptr(), length) }
        }

        /// # Safety
        /// The range lies inside the mapping, and nobody else looks at it for as long as the answer is used.
        #[allow(clippy::mut_from_ref, reason = "whoever calls has the range alone")]
        pub unsafe fn slice_mut(&self, offset: usize, length: usize) -> &mut [u8] {
            debug_assert!(offset + length <= self.length);
            // SAFETY: as above.
            unsafe { std::slice::from_raw_parts_mut(self.address.add(offset).as_ptr(), length) }
        }
    }

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: the mapping was made with this length, and no slot of it is left.
            unsafe { libc::munmap(self.address.as_ptr().cast(), self.length) };
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod none {
    use std::io::{Error, ErrorKind, Result};

    pub enum Mapping {}

    impl Mapping {
        pub fn inherited(_: i32, _: usize) -> Result<Self> {
            Err(Error::from(ErrorKind::Unsupported))
        }

        /// # Safety
        /// There is none to call it on.
        pub unsafe fn slice(&self, _: usize, _: usize) -> &[u8] {
            match *self {}
        }

        /// # Safety
        /// There is none to call it on.
        #[allow(clippy::mut_from_ref, reason = "there is none to call it on")]
        pub unsafe fn slice_mut(&self, _: usize, _: usize) -> &mut [u8] {
            match *self {}
        }
    }
}
