//! Unix, and what only Linux has.

use crate::{ByteRange, Extent};
use rustix::io::Errno;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The permissions of a new file: a disk holds the secrets of its guest.
const NEW_FILE_MODE: u32 = 0o600;

/// "Input/output error", the same number on every Unix.
pub(super) const MEDIA_ERRORS: &[i32] = &[5];

/// Who has what is in use.
pub(crate) const USERS: &str = "mounted, or part of LVM, RAID, swap or a device mapper target";

pub(super) fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> Result<()> {
    FileExt::read_exact_at(file, buffer, offset)
}

pub(super) fn write_all_at(file: &File, data: &[u8], offset: u64) -> Result<()> {
    FileExt::write_all_at(file, data, offset)
}

pub(super) fn sync_directory(path: &Path) -> Result<()> {
    match File::open(path)?.sync_all() {
        Err(error)
            if matches!(
                Errno::from_io_error(&error),
                Some(Errno::INVAL | Errno::NOTSUP | Errno::NOSYS | Errno::BADF)
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

#[cfg(target_os = "linux")]
pub(super) fn rename_new(from: &Path, to: &Path) -> Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system without the flag.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => link_and_unlink(from, to),
        other => Ok(other?),
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn rename_new(from: &Path, to: &Path) -> Result<()> {
    link_and_unlink(from, to)
}

/// Where the kernel names the files that this process has open: opening such a name opens that file again, whatever is
/// at its path now.
#[cfg(target_os = "linux")]
const OPEN_FILES: &str = "/proc/self/fd";

#[cfg(target_os = "linux")]
pub(super) fn open_resolved(path: &Path, options: &OpenOptions, writable: bool) -> Result<File> {
    use rustix::fs::OFlags;
    // A handle that only names the file: nothing happens to what is there, and nothing is waited for.
    let named = walk(path, OFlags::PATH)?;
    match open_named(&named, options, OPEN_FILES) {
        // Most likely there is no /proc. Whoever may not open the file may not here, either.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
            open_again(path, &named, writable)
        }
        opened => opened,
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn open_resolved(path: &Path, options: &OpenOptions, _: bool) -> Result<File> {
    if std::fs::symlink_metadata(path)?.is_symlink() {
        return Err(Errno::LOOP.into());
    }
    options.open(path)
}

#[cfg(target_os = "linux")]
pub(super) fn open_file(path: &Path, options: &OpenOptions) -> Result<File> {
    use rustix::fs::{Mode, OFlags, open};
    let named: File = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?.into();
    match open_named(&named, options, OPEN_FILES) {
        // Most likely there is no /proc, or it may not be used. That it is a file is known.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
            options.open(path)
        }
        opened => opened,
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn open_file(path: &Path, options: &OpenOptions) -> Result<File> {
    let found = std::fs::metadata(path)?;
    if found.is_file() || is_block_device(&found) {
        return options.open(path);
    }
    Err(Error::new(ErrorKind::InvalidInput, NO_FILE))
}

/// What is said of pipes and the like.
const NO_FILE: &str = "is neither a file nor a block device";

/// Opens what is at `path`, of which no part is a link.
#[cfg(target_os = "linux")]
fn walk(path: &Path, flags: rustix::fs::OFlags) -> Result<File> {
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, open, openat2};
    let flags = flags | OFlags::CLOEXEC;
    match openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
        // An old kernel, or a sandbox that does not know the call: the last part at least is no link.
        Err(Errno::NOSYS | Errno::PERM) => {
            Ok(open(path, flags | OFlags::NOFOLLOW, Mode::empty())?.into())
        }
        opened => Ok(opened?.into()),
    }
}

/// Opens the file or block device that `named` names by its name in `open_files`.
#[cfg(target_os = "linux")]
fn open_named(named: &File, options: &OpenOptions, open_files: &str) -> Result<File> {
    use std::os::fd::AsRawFd;
    let found = named.metadata()?;
    if found.is_symlink() {
        return Err(Errno::LOOP.into());
    }
    if !found.is_file() && !is_block_device(&found) {
        return Err(Error::new(ErrorKind::InvalidInput, NO_FILE));
    }
    options.open(format!("{open_files}/{}", named.as_raw_fd()))
}

/// Opens what is at `path` where it still is the file that `named` names. A pipe that came there meanwhile is not waited
/// for, and a device that is written is claimed as by [`claim`].
#[cfg(target_os = "linux")]
fn open_again(path: &Path, named: &File, writable: bool) -> Result<File> {
    use rustix::fs::OFlags;
    let wanted = named.metadata()?;
    let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
    let claim = match writable && is_block_device(&wanted) {
        true => OFlags::EXCL,
        false => OFlags::empty(),
    };
    let opened = walk(path, access | claim | OFlags::NONBLOCK)?;
    let found = opened.metadata()?;
    if (found.dev(), found.ino()) != (wanted.dev(), wanted.ino()) {
        let what = "somebody exchanged it while it was opened";
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    Ok(opened)
}

/// Opens the file that `open` is once more, whatever is at its path now.
///
/// # Errors
/// What the system says; where there is no `/proc`.
#[cfg(target_os = "linux")]
pub(crate) fn reopen(open: &File, options: &OpenOptions) -> Result<File> {
    open_named(open, options, OPEN_FILES)
}

/// Renames without replacing: a link is only made where the name is free.
fn link_and_unlink(from: &Path, to: &Path) -> Result<()> {
    std::fs::hard_link(from, to)?;
    std::fs::remove_file(from)
}

pub(super) fn file_identity(path: &Path) -> Option<String> {
    let found = std::fs::metadata(path).ok()?;
    Some(format!("{}:{}", found.dev(), found.ino()))
}

pub(super) fn allocated_bytes(path: &Path) -> Option<u64> {
    // st_blocks counts 512 bytes whatever the file system's blocks are (stat(2)).
    Some(std::fs::metadata(path).ok()?.blocks() * 512)
}

pub(super) fn free_bytes(directory: &Path) -> Result<u64> {
    let space = rustix::fs::statvfs(directory)?;
    if space.f_blocks == 0 {
        // Some network file systems in user space answer with zeros: that is not "full".
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the file system does not tell how much room it has",
        ));
    }
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

pub(super) fn canonical(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path)
}

pub(super) fn check_writable(directory: &Path) -> Result<()> {
    use rustix::fs::Access;
    Ok(rustix::fs::access(directory, Access::WRITE_OK | Access::EXEC_OK)?)
}

pub(super) fn is_in_use(error: &Error) -> bool {
    error.kind() == ErrorKind::ResourceBusy
}

pub(super) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Gives a file that is made only to its owner.
pub(crate) fn owner_only(options: &mut OpenOptions) {
    options.mode(NEW_FILE_MODE);
}

/// Every file can have holes.
pub(crate) fn make_sparse(_file: &File) {}

/// Opens a block device for nobody else. Linux takes `O_EXCL` without `O_CREAT` on a block device
/// as a claim, which fails with `EBUSY` while a file system, LVM, RAID or another claim holds it or
/// a partition of it (open(2)).
#[cfg(target_os = "linux")]
pub(crate) fn claim(options: &mut OpenOptions) {
    options.custom_flags(rustix::fs::OFlags::EXCL.bits().cast_signed());
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn claim(_options: &mut OpenOptions) {}

pub(crate) fn is_block_device(metadata: &Metadata) -> bool {
    metadata.file_type().is_block_device()
}

/// Devices are files like others here.
pub(crate) fn names_device(_path: &Path) -> bool {
    false
}

#[cfg(target_os = "linux")]
pub(crate) fn logical_block_size(file: &File) -> u32 {
    rustix::fs::ioctl_blksszget(file).ok().filter(|size| *size >= 512).unwrap_or(512)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn logical_block_size(_file: &File) -> u32 {
    512
}

/// Whether the range was turned into a hole that reads as zeros.
#[cfg(target_os = "linux")]
pub(crate) fn punch_hole(file: &File, range: ByteRange) -> bool {
    use rustix::fs::{FallocateFlags, fallocate};
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, flags, range.offset, range.length).is_ok()
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn punch_hole(_file: &File, _range: ByteRange) -> bool {
    false
}

/// Walks data and holes with lseek(2), `max` of them at most. The kernel's file position is shared, but
/// `SEEK_DATA` and `SEEK_HOLE` take absolute offsets and nothing here reads by position, so callers do
/// not mix.
#[cfg(target_os = "linux")]
pub(crate) fn file_extents(
    file: &File,
    range: ByteRange,
    max: usize,
    out: &mut Vec<Extent>,
) -> Result<()> {
    use crate::{ExtentKind, push_extent};
    use rustix::fs::{SeekFrom, seek};
    let mut at = range.offset;
    while at < range.end() && out.len() < max {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.clamp(at, range.end()),
            // No data after here: a hole up to the end of the file.
            Err(Errno::NXIO) => range.end(),
            // The file system cannot tell: all data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        push_extent(out, Extent::new(at, data - at, ExtentKind::Unallocated));
        at = data;
        if at >= range.end() {
            break;
        }
        let hole = match seek(file, SeekFrom::Hole(at)) {
            // A file that was cut or punched in between answers with `at` itself.
            Ok(hole) if hole > at => hole.min(range.end()),
            Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => range.end(),
            Err(error) => return Err(error.into()),
        };
        push_extent(out, Extent::new(at, hole - at, ExtentKind::Data));
        at = hole;
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn file_extents(
    _file: &File,
    range: ByteRange,
    _max: usize,
    out: &mut Vec<Extent>,
) -> Result<()> {
    crate::push_extent(out, Extent { range, kind: crate::ExtentKind::Data });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_never_replaces() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::write(&from, "new").unwrap();
        std::fs::write(&to, "old").unwrap();
        let error = link_and_unlink(&from, &to).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "old");
        std::fs::remove_file(&to).unwrap();
        link_and_unlink(&from, &to).unwrap();
        assert!(!from.exists() && std::fs::read_to_string(&to).unwrap() == "new");
    }
    #[cfg(target_os = "linux")]
    mod resolved {
        use super::super::*;
        use rustix::fs::{CWD, FileType, Mode, OFlags, RenameFlags, mknodat, renameat_with};
        use std::os::unix::fs::symlink;

        fn read_write() -> OpenOptions {
            let mut options = OpenOptions::new();
            options.read(true).write(true);
            options
        }

        fn exchange(one: &Path, other: &Path) {
            renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
        }

        /// A directory with the file `disk`, and `pipe`, `secret` and `link`, which leads to the latter.
        fn place() -> (tempfile::TempDir, PathBuf) {
            let directory = tempfile::tempdir().unwrap();
            let place = std::fs::canonicalize(directory.path()).unwrap();
            std::fs::write(place.join("disk"), "disk").unwrap();
            std::fs::write(place.join("secret"), "secret").unwrap();
            symlink("secret", place.join("link")).unwrap();
            mknodat(CWD, place.join("pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
            (directory, place)
        }

        fn text(mut file: File) -> String {
            let mut text = String::new();
            std::io::Read::read_to_string(&mut file, &mut text).unwrap();
            text
        }

        #[test]
        fn a_pipe_is_refused_and_not_waited_for() {
            let (_directory, place) = place();
            for writable in [false, true] {
                let mut options = OpenOptions::new();
                options.read(true).write(writable);
                let error = open_resolved(&place.join("pipe"), &options, writable).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
                let file = open_resolved(&place.join("disk"), &options, writable).unwrap();
                // No flag that would change how a device or a file under a lease answers.
                let flags = rustix::fs::fcntl_getfl(&file).unwrap();
                assert!(!flags.contains(OFlags::NONBLOCK), "{flags:?}");
                assert_eq!(text(file), "disk");
            }
        }

        #[test]
        fn a_file_is_opened_through_links_and_a_pipe_is_not() {
            let (_directory, place) = place();
            symlink("pipe", place.join("link to the pipe")).unwrap();
            for pipe in ["pipe", "link to the pipe"] {
                let error = open_file(&place.join(pipe), &read_write()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
            }
            assert_eq!(text(open_file(&place.join("link"), &read_write()).unwrap()), "secret");
            let error = open_file(&place.join("none"), &read_write()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound);
        }

        /// As somebody would have it who exchanges it between being looked at and being opened.
        #[test]
        fn the_file_that_was_looked_at_is_opened_whatever_took_its_path() {
            let (_directory, place) = place();
            let disk = place.join("disk");
            for other in ["pipe", "link", "secret"] {
                let named = walk(&disk, OFlags::PATH).unwrap();
                exchange(&disk, &place.join(other));
                let opened = open_named(&named, &read_write(), OPEN_FILES).unwrap();
                assert_eq!(text(opened), "disk");
                // Where there is no /proc it is opened by its path, and found to be another one.
                let missing = open_named(&named, &read_write(), "/proc/none").unwrap_err();
                assert_eq!(missing.kind(), ErrorKind::NotFound);
                for writable in [false, true] {
                    open_again(&disk, &named, writable).unwrap_err();
                }
                exchange(&disk, &place.join(other));
                for writable in [false, true] {
                    assert_eq!(text(open_again(&disk, &named, writable).unwrap()), "disk");
                }
            }
        }

        #[test]
        fn a_link_that_is_named_itself_is_not_followed() {
            let (_directory, place) = place();
            let flags = OFlags::PATH | OFlags::NOFOLLOW;
            let named = rustix::fs::open(place.join("link"), flags, Mode::empty()).unwrap();
            let error = open_named(&named.into(), &read_write(), OPEN_FILES).unwrap_err();
            assert_eq!(Errno::from_io_error(&error), Some(Errno::LOOP));
        }

        #[test]
        fn a_file_is_opened_again_by_what_it_is() {
            let (_directory, place) = place();
            let disk = File::open(place.join("disk")).unwrap();
            for other in ["pipe", "link", "secret"] {
                exchange(&place.join("disk"), &place.join(other));
                assert_eq!(text(reopen(&disk, &read_write()).unwrap()), "disk");
                exchange(&place.join("disk"), &place.join(other));
            }
            std::fs::remove_file(place.join("disk")).unwrap();
            assert_eq!(text(reopen(&disk, &read_write()).unwrap()), "disk");
        }
    }
}
