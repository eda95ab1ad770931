//! Unix, and what only Linux has.

use crate::{ByteRange, Extent};
use rustix::io::Errno;
use std::fs::{File, Metadata, OpenOptions};
use std::io::Result;
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

#[cfg(target_os = "linux")]
pub(super) fn open_resolved(path: &Path, options: &OpenOptions, writable: bool) -> Result<File> {
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
    let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
    // Nothing to regular files, and a pipe that came there meanwhile is not waited for.
    let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let no_links = ResolveFlags::NO_SYMLINKS;
    let opened = match openat2(CWD, path, flags, Mode::empty(), no_links) {
        Ok(handle) => File::from(handle),
        // An old kernel, or a sandbox that does not know the call.
        Err(Errno::NOSYS | Errno::PERM) => return open_unless_link(path, options),
        Err(error) => return Err(error.into()),
    };
    // A device may be claimed by how it is opened.
    if opened.metadata()?.is_file() { Ok(opened) } else { open_unless_link(path, options) }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn open_resolved(path: &Path, options: &OpenOptions, _: bool) -> Result<File> {
    open_unless_link(path, options)
}

fn open_unless_link(path: &Path, options: &OpenOptions) -> Result<File> {
    if std::fs::symlink_metadata(path)?.is_symlink() {
        return Err(Errno::LOOP.into());
    }
    options.open(path)
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
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

pub(super) fn canonical(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path)
}

pub(super) fn check_writable(directory: &Path) -> Result<()> {
    use rustix::fs::Access;
    Ok(rustix::fs::access(directory, Access::WRITE_OK | Access::EXEC_OK)?)
}

pub(super) fn is_in_use(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::ResourceBusy
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
        assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "old");
        std::fs::remove_file(&to).unwrap();
        link_and_unlink(&from, &to).unwrap();
        assert!(!from.exists() && std::fs::read_to_string(&to).unwrap() == "new");
    }
}
