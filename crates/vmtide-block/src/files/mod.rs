//! What vmtide asks of files and directories that the standard library has not, or not the same on
//! every system. Each function says what differs; there is one file per system, and no `cfg` at the
//! callers.

use std::fs::File;
use std::io::Result;
use std::path::{Path, PathBuf};

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
use unix as system;
#[cfg(windows)]
use windows as system;

pub(crate) use system::{
    USERS, claim, file_extents, is_block_device, logical_block_size, make_sparse, names_device,
    owner_only, punch_hole,
};

#[cfg(target_os = "linux")]
pub(crate) use unix::reopen;

/// Reads all of `buffer` from `offset` on. Many threads may read one file at once.
///
/// On Windows the position of the file moves, so nobody may rely on it beside this.
///
/// # Errors
/// `UnexpectedEof` where the file ends before.
pub fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> Result<()> {
    system::read_exact_at(file, buffer, offset)
}

/// Writes all of `data` from `offset` on. Many threads may write one file at once.
///
/// On Windows the position of the file moves, so nobody may rely on it beside this.
///
/// # Errors
/// What the system says; how much was written is not known then.
pub fn write_all_at(file: &File, data: &[u8], offset: u64) -> Result<()> {
    system::write_all_at(file, data, offset)
}

/// Makes what was created, renamed or removed in a directory durable, as far as its file system can:
/// some (CIFS, several in user space) cannot and say so, and there the server decides.
///
/// Windows keeps names in the journal of its file system, in order; a flush of the directory brings
/// them to the medium where the user has the right to do that, and where not they follow soon. So a
/// power failure may undo the last names, and never shows a name without what was flushed before it.
///
/// # Errors
/// Where the directory cannot be opened, or the medium fails.
pub fn sync_directory(path: &Path) -> Result<()> {
    system::sync_directory(path)
}

/// The directory that holds the file `path`: for [`sync_directory`].
pub fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."))
}

/// Gives the file `from` the name `to` on the same file system, at once, and only where `to` is not
/// taken.
///
/// `renameat2` on Linux, `MoveFileExW` on Windows, elsewhere and on file systems without the former by
/// a link, which the file has two names in between.
///
/// # Errors
/// `AlreadyExists` where `to` is taken: nothing is changed then. What the file system says.
pub fn rename_new(from: &Path, to: &Path) -> Result<()> {
    system::rename_new(from, to)
}

/// What a file is known by, whatever its path is: equal for two paths of one file. None where there is
/// no such file, or the system does not tell.
pub fn file_identity(path: &Path) -> Option<String> {
    system::file_identity(path)
}

/// The bytes that a file takes on its medium, holes not counted; none where the system does not tell.
pub fn allocated_bytes(path: &Path) -> Option<u64> {
    system::allocated_bytes(path)
}

/// The bytes that this user may still write on the file system of `directory`.
///
/// # Errors
/// Where there is no such directory; what the file system says; `Unsupported` where it does not tell.
pub fn free_bytes(directory: &Path) -> Result<u64> {
    system::free_bytes(directory)
}

/// Whether the medium cannot read its own bytes, and not the way to it is broken: the data is lost, and
/// trying again does not help. On Unix that is `EIO`; Windows tells several cases apart.
pub fn is_media_error(error: &std::io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| system::MEDIA_ERRORS.contains(&code))
}

/// The path of an existing file without links, `.` and `..`. On Windows in the spelling that people and
/// other programs use, without `\\?\`, where that names the same file.
///
/// # Errors
/// Where there is no such file.
pub fn canonical(path: &Path) -> Result<PathBuf> {
    system::canonical(path)
}

/// Opens a file by a path without links, or not at all: see [`RawDevice::open_resolved`](crate::RawDevice::open_resolved).
/// `options` say how, and `writable` whether for writing, too.
pub(crate) fn open_resolved(
    path: &Path,
    options: &std::fs::OpenOptions,
    writable: bool,
) -> Result<File> {
    system::open_resolved(path, options, writable)
}

/// Opens what is at `path`, links followed, as `options` say, if it is a file or a block device. A pipe that somebody has put there is
/// refused; opening it would wait for its other end.
///
/// # Errors
/// `InvalidInput` where it is something else; what the system says.
pub fn open_file(path: &Path, options: &std::fs::OpenOptions) -> Result<File> {
    system::open_file(path, options)
}

/// Succeeds where this user may make files in a directory; asks and writes nothing.
///
/// # Errors
/// `PermissionDenied`; where there is no such directory.
pub fn check_writable(directory: &Path) -> Result<()> {
    system::check_writable(directory)
}

/// Whether a file or device cannot be opened because somebody else has it.
pub fn is_in_use(error: &std::io::Error) -> bool {
    system::is_in_use(error)
}

/// This host, as the operating system names it; may be empty.
pub fn host_name() -> String {
    system::host_name()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;

    #[test]
    fn positions_are_given_with_every_call() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        write_all_at(&file, b"world", 6).unwrap();
        write_all_at(&file, b"hello ", 0).unwrap();
        let mut text = [0; 5];
        read_exact_at(&file, &mut text, 3).unwrap();
        assert_eq!(&text, b"lo wo");
        let error = read_exact_at(&file, &mut text, 7).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_name_that_is_taken_stays() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        std::fs::write(&from, "new").unwrap();
        std::fs::write(&to, "old").unwrap();
        assert_eq!(rename_new(&from, &to).unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "old");
        std::fs::remove_file(&to).unwrap();
        rename_new(&from, &to).unwrap();
        assert!(!from.exists() && std::fs::read_to_string(&to).unwrap() == "new");
        sync_directory(directory_of(&to)).unwrap();
        assert!(sync_directory(&directory.path().join("none")).is_err());
        assert_eq!(directory_of(Path::new("x")), Path::new("."));
    }

    #[test]
    fn a_file_is_itself_by_any_name() {
        let directory = tempfile::tempdir().unwrap();
        let (one, two) = (directory.path().join("one"), directory.path().join("two"));
        std::fs::write(&one, vec![1; 100_000]).unwrap();
        std::fs::hard_link(&one, &two).unwrap();
        assert_eq!(file_identity(&one).unwrap(), file_identity(&two).unwrap());
        let three = directory.path().join("three");
        assert_eq!(file_identity(&three), None);
        std::fs::write(&three, "x").unwrap();
        assert_ne!(file_identity(&one), file_identity(&three));
        assert!(allocated_bytes(&one).unwrap() > 0 && free_bytes(directory.path()).unwrap() > 0);
        assert_eq!(allocated_bytes(&directory.path().join("none")), None);
        let (real, back) = (canonical(&one).unwrap(), directory.path().join("x/../one"));
        std::fs::create_dir(directory.path().join("x")).unwrap();
        assert_eq!(canonical(&back).unwrap(), real);
        assert!(!real.display().to_string().starts_with(r"\\?\"), "{}", real.display());
        check_writable(directory.path()).unwrap();
        assert!(check_writable(&directory.path().join("none")).is_err());
    }

    #[test]
    fn a_medium_that_fails_is_told_from_what_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let missing = File::open(directory.path().join("none")).unwrap_err();
        assert!(!is_media_error(&missing) && !is_media_error(&ErrorKind::Other.into()));
        for code in system::MEDIA_ERRORS {
            assert!(is_media_error(&std::io::Error::from_raw_os_error(*code)));
        }
    }
}
