//! Holding on to a file from before it is opened until after, to notice one that was exchanged.

use super::Refusal;
use std::path::Path;

#[cfg(unix)]
pub use unix::Pin;
#[cfg(not(unix))]
pub use windows::Pin;

/// The part of `path` below `root`.
#[cfg(unix)]
fn below<'a>(root: &Path, path: &'a Path) -> Result<&'a Path, Refusal> {
    path.strip_prefix(root).map_err(|_| Refusal::LeadsOutside)
}

#[cfg(unix)]
mod unix {
    use super::{Path, Refusal, below};
    use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, open};
    use rustix::io::Errno;
    use std::io;
    use std::os::fd::OwnedFd;

    /// A file, held by a handle that can do nothing but name it.
    #[derive(Debug)]
    pub struct Pin {
        /// Keeps the file's number from being given to another file.
        _handle: OwnedFd,
        device: u64,
        number: u64,
        kind: FileType,
    }

    impl Pin {
        /// The file at `path`, reached from `root` without leaving it.
        pub fn of(root: &Path, path: &Path) -> Result<Self, Refusal> {
            let handle = walk(root, path)?;
            let stat = fstat(&handle).map_err(io::Error::from)?;
            Ok(Self::new(handle, &stat))
        }

        #[allow(
            clippy::unnecessary_cast,
            clippy::useless_conversion,
            reason = "the fields' types differ between platforms"
        )]
        fn new(handle: OwnedFd, stat: &Stat) -> Self {
            Self {
                _handle: handle,
                device: stat.st_dev as u64,
                number: stat.st_ino as u64,
                kind: FileType::from_raw_mode(stat.st_mode.into()),
            }
        }

        pub fn is_disk(&self) -> bool {
            matches!(self.kind, FileType::RegularFile | FileType::BlockDevice)
        }

        pub fn is_directory(&self) -> bool {
            self.kind == FileType::Directory
        }

        pub fn is_same(&self, other: &Self) -> bool {
            (self.device, self.number, self.kind) == (other.device, other.number, other.kind)
        }
    }

    /// Walks from `root` to `path`, of which no part is a link: links were followed before. On Linux the kernel
    /// sees to it, for all parts at once; elsewhere only for the last one.
    #[cfg(target_os = "linux")]
    fn walk(root: &Path, path: &Path) -> Result<OwnedFd, Refusal> {
        use rustix::fs::{ResolveFlags, openat2};
        let inside = below(root, path)?;
        let inside = if inside.as_os_str().is_empty() { Path::new(".") } else { inside };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let base = open(root, flags | OFlags::DIRECTORY, Mode::empty()).map_err(io::Error::from)?;
        let stay = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match openat2(&base, inside, flags, Mode::empty(), stay) {
            Ok(handle) => Ok(handle),
            // An old kernel, or a sandbox that does not know the call.
            Err(Errno::NOSYS | Errno::PERM) => plain_walk(path),
            Err(Errno::XDEV | Errno::LOOP) => Err(Refusal::Exchanged),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn walk(root: &Path, path: &Path) -> Result<OwnedFd, Refusal> {
        below(root, path)?;
        plain_walk(path)
    }

    fn plain_walk(path: &Path) -> Result<OwnedFd, Refusal> {
        #[cfg(target_os = "linux")]
        let flags = OFlags::PATH;
        #[cfg(not(target_os = "linux"))]
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(open(path, flags, Mode::empty()).map_err(io::Error::from)?)
    }
}

#[cfg(not(unix))]
mod windows {
    use super::{Path, Refusal};
    use std::path::PathBuf;
    use std::time::SystemTime;

    /// What a file was when it was looked at. Windows' numbers of files cannot be asked for without foreign
    /// functions; its creation time and real path come near.
    #[derive(Debug)]
    pub struct Pin {
        real: PathBuf,
        created: Option<SystemTime>,
        is_file: bool,
        is_directory: bool,
    }

    impl Pin {
        /// The file at `path`.
        pub fn of(_root: &Path, path: &Path) -> Result<Self, Refusal> {
            let metadata = std::fs::metadata(path)?;
            Ok(Self {
                real: std::fs::canonicalize(path)?,
                created: metadata.created().ok(),
                is_file: metadata.is_file(),
                is_directory: metadata.is_dir(),
            })
        }

        pub fn is_disk(&self) -> bool {
            self.is_file
        }

        pub fn is_directory(&self) -> bool {
            self.is_directory
        }

        pub fn is_same(&self, other: &Self) -> bool {
            // Some file systems change the time of a directory with what is made in it.
            let is_created_then = self.is_directory || self.created == other.created;
            self.real == other.real && is_created_then
        }
    }
}
