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
    use std::fs::{File, OpenOptions};
    use std::io;
    use std::os::windows::fs::OpenOptionsExt;
    use vmtide_windows_ffi::files::{FileIdentity, identity};

    /// Rights and flags of `CreateFileW` (winnt.h, winbase.h).
    const FILE_LIST_DIRECTORY: u32 = 0x1;
    const FILE_READ_ATTRIBUTES: u32 = 0x80;
    const FILE_SHARE_READ: u32 = 0x1;
    const FILE_SHARE_WRITE: u32 = 0x2;
    const FILE_SHARE_DELETE: u32 = 0x4;
    /// Without it directories cannot be opened.
    const FILE_FLAG_BACKUP_SEMANTICS: u32 = 0x0200_0000;
    /// The link itself, not where it leads.
    const FILE_FLAG_OPEN_REPARSE_POINT: u32 = 0x0020_0000;

    /// A file, and the directories from the root to it. As long as these are held, none of them can be renamed, removed,
    /// or, as they are not empty, made a link to elsewhere. The file itself is not kept from being exchanged: whoever
    /// opens a disk may want it for himself alone. Its number stays its own.
    #[derive(Debug)]
    pub struct Pin {
        directories: Vec<(File, FileIdentity)>,
        _file: File,
        identity: FileIdentity,
        is_directory: bool,
    }

    impl Pin {
        /// The file at `path`, which is a real one, and was reached from `root`.
        pub fn of(root: &Path, path: &Path) -> Result<Self, Refusal> {
            let depth = root.components().count();
            let above = path.ancestors().skip(1);
            let mut directories = Vec::new();
            for directory in above.take_while(|path| path.components().count() >= depth) {
                directories.push(hold(directory)?);
            }
            let file = OpenOptions::new()
                .access_mode(FILE_READ_ATTRIBUTES)
                .share_mode(FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE)
                .custom_flags(FILE_FLAG_BACKUP_SEMANTICS)
                .open(path)?;
            let is_directory = file.metadata()?.is_dir();
            if is_directory {
                directories.push(hold(path)?);
            }
            // What was made a link before it was held leads elsewhere now.
            let real = super::super::plain(std::fs::canonicalize(path)?);
            let is_below = super::super::is_below;
            if !is_below(&real, path) || !is_below(path, &real) {
                return Err(Refusal::Exchanged);
            }
            Ok(Self { directories, identity: identity(&file)?, _file: file, is_directory })
        }

        pub fn is_disk(&self) -> bool {
            !self.is_directory
        }

        pub fn is_directory(&self) -> bool {
            self.is_directory
        }

        pub fn is_same(&self, other: &Self) -> bool {
            let directories = |pin: &Self| -> Vec<FileIdentity> {
                pin.directories.iter().map(|(_, identity)| *identity).collect()
            };
            self.identity == other.identity
                && self.is_directory == other.is_directory
                && directories(self) == directories(other)
        }
    }

    /// Holds a directory such that nobody can rename or remove it. Where somebody is about to, that fails.
    fn hold(directory: &Path) -> io::Result<(File, FileIdentity)> {
        let held = OpenOptions::new()
            .access_mode(FILE_LIST_DIRECTORY | FILE_READ_ATTRIBUTES)
            .share_mode(FILE_SHARE_READ | FILE_SHARE_WRITE)
            .custom_flags(FILE_FLAG_BACKUP_SEMANTICS | FILE_FLAG_OPEN_REPARSE_POINT)
            .open(directory)?;
        let identity = identity(&held)?;
        Ok((held, identity))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn directories_stay_where_they_are_and_another_file_is_noticed() {
            let place = tempfile::tempdir().unwrap();
            let root = super::super::super::plain(std::fs::canonicalize(place.path()).unwrap());
            let directory = root.join("vm");
            std::fs::create_dir(&directory).unwrap();
            let path = directory.join("a.vhdx");
            std::fs::write(&path, b"x").unwrap();
            let pin = Pin::of(&root, &path).unwrap();
            assert!(pin.is_disk() && !pin.is_directory());
            assert!(pin.is_same(&Pin::of(&root, &path).unwrap()));
            assert!(std::fs::rename(&directory, root.join("old")).is_err());
            // Files come and go.
            std::fs::write(directory.join("b.vhdx"), b"y").unwrap();
            std::fs::rename(directory.join("b.vhdx"), directory.join("c.vhdx")).unwrap();
            std::fs::rename(&path, directory.join("away.vhdx")).unwrap();
            std::fs::rename(directory.join("c.vhdx"), &path).unwrap();
            assert!(!pin.is_same(&Pin::of(&root, &path).unwrap()));
            drop(pin);
            let pin = Pin::of(&root, &directory).unwrap();
            assert!(pin.is_directory() && !pin.is_disk());
            assert!(std::fs::rename(&directory, root.join("old")).is_err());
            drop(pin);
            std::fs::rename(&directory, root.join("old")).unwrap();
            assert!(Pin::of(&root, &path).is_err());
        }
    }
}
