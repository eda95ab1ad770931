//! Files and directories of Windows. A new one gets the access list of the directory above it: whoever
//! makes the repository's directory says who may read it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::windows::fs::OpenOptionsExt;
use std::path::Path;
pub(in super::super) use vmtide_block::files::{rename_new, sync_directory};

/// `FILE_FLAG_BACKUP_SEMANTICS`: without it a directory cannot be opened, and so not be told from a file
/// that this user may not read.
const OPEN_DIRECTORY: u32 = 0x0200_0000;

/// Creates a file that is not there yet, for writing.
pub(in super::super) fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path)
}

/// Opens a regular file for reading, others may write, rename and remove it meanwhile.
pub(in super::super) fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().read(true).custom_flags(OPEN_DIRECTORY).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is not a regular file"));
    }
    Ok((file, metadata.len()))
}

/// Creates one directory; whether it was there is no matter.
pub(in super::super) fn create_directory(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        result => result,
    }
}
