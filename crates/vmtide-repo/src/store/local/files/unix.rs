//! Files and directories of Unix.

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// The mode of files: a repository holds whole disks, so nobody but its owner reads it.
const FILE_MODE: u32 = 0o600;

/// The mode of directories, for the same reason.
const DIRECTORY_MODE: u32 = 0o700;

/// Creates a file that is not there yet, for writing.
pub(in super::super) fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(path)
}

/// Opens a regular file for reading. Never waits, whatever the path is: a named pipe in place of an
/// object is an error, not a hang.
pub(in super::super) fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is not a regular file"));
    }
    Ok((file, metadata.len()))
}

/// Creates one directory; whether it was there is no matter.
pub(in super::super) fn create_directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        result => result,
    }
}

/// Makes what was created, renamed or removed in a directory durable.
///
/// Some file systems (CIFS, several in user space) cannot sync a directory and say so; there the
/// server decides, and there is nothing else to call.
pub(in super::super) fn sync_directory(path: &Path) -> io::Result<()> {
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

/// Gives the file `from` the name `to`, atomically and only where `to` is not taken
/// ([`ErrorKind::AlreadyExists`] otherwise). `from` is gone after success.
pub(in super::super) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // NFS and several file systems in user space do not know the flag; they do know links.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => link_new(from, to),
        result => Ok(result?),
    }
}

/// [`rename_new`] by `link(2)` and `unlink(2)`.
fn link_new(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::linkat(CWD, from, CWD, to, AtFlags::empty()) {
        Ok(()) => {}
        // NFS repeats a request whose answer was lost: then the name that is "taken" is ours.
        Err(Errno::EXIST) if same_file(from, to) => {}
        // SMB shares and FAT have neither. Names are random and nobody else's, so that looking first
        // is enough; only `init` by two at the same moment could replace something.
        Err(Errno::PERM | Errno::NOSYS | Errno::NOTSUP | Errno::MLINK) => {
            return match fs::symlink_metadata(to) {
                Ok(_) => Err(ErrorKind::AlreadyExists.into()),
                Err(error) if error.kind() == ErrorKind::NotFound => fs::rename(from, to),
                Err(error) => Err(error),
            };
        }
        Err(error) => return Err(error.into()),
    }
    // The object is there; a second name left in tmp/ is garbage that prune removes.
    let _ = fs::remove_file(from);
    Ok(())
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}
