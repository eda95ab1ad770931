//! Keeping others off the images that vmtide writes to.
//!
//! The locks are QEMU's (open file description locks on single bytes, `block/file-posix.c` of QEMU):
//! a read lock on byte 100 + n says that permission n is used, on byte 200 + n that it is not shared
//! with others. Both sides lock first and look then, so of two that begin at the same moment at
//! least one gives up: a QEMU, or a second vmtide. They go with the process, however it ends. Where
//! the file system knows no such locks, and on systems other than Linux, nothing is locked.

use crate::image::files::files_of;
use crate::{EngineError, Result};
use std::fs::File;
use std::path::Path;

/// What a writer uses: consistent reads, writing, resizing.
#[cfg(target_os = "linux")]
const USED: &[i64] = &[0, 1, 3];

/// What a writer lets nobody else do: writing, resizing.
#[cfg(target_os = "linux")]
const NOT_SHARED: &[i64] = &[1, 3];

/// The byte that says that permission 0 is used.
#[cfg(target_os = "linux")]
const USED_BASE: i64 = 100;

/// The byte that says that permission 0 is not shared.
#[cfg(target_os = "linux")]
const NOT_SHARED_BASE: i64 = 200;

/// An image that is written to by nobody else until this is dropped.
#[derive(Debug)]
pub(crate) struct ImageLock {
    _files: Vec<File>,
}

impl ImageLock {
    /// Locks the image at `path` with the extents and the data file beside it.
    ///
    /// # Errors
    /// [`EngineError::Refused`] where somebody else uses one of them. What cannot be opened is left
    /// to whoever opens it for writing.
    pub fn take(path: &Path) -> Result<Self> {
        let mut files: Vec<File> = Vec::new();
        let mut seen = Vec::new();
        let mut beside = files_of(path);
        beside.retain(|file| file.parent() == path.parent() && file.is_file());
        for file in std::iter::once(path).chain(beside.iter().map(std::path::PathBuf::as_path)) {
            let Ok(real) = file.canonicalize() else {
                continue;
            };
            if seen.contains(&real) {
                continue;
            }
            if let Ok(open) = File::open(&real) {
                lock(&open, file)?;
                files.push(open);
            }
            seen.push(real);
        }
        Ok(Self { _files: files })
    }
}

#[cfg(target_os = "linux")]
fn lock(file: &File, path: &Path) -> Result<()> {
    use nix::errno::Errno;
    use nix::fcntl::{FcntlArg, fcntl};
    let refused = || {
        EngineError::refused(
            format!("write to {}", path.display()),
            "a running QEMU or another vmtide uses it: end that first",
        )
    };
    let used = USED.iter().map(|permission| USED_BASE + permission);
    let not_shared = NOT_SHARED.iter().map(|permission| NOT_SHARED_BASE + permission);
    for byte in used.chain(not_shared) {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(libc::F_RDLCK, byte))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(refused()),
            // No such locks here.
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "cannot be locked");
                return Ok(());
            }
        }
    }
    // Whoever does not share what is used, or uses what is not shared.
    let not_shared = USED.iter().map(|permission| NOT_SHARED_BASE + permission);
    let used = NOT_SHARED.iter().map(|permission| USED_BASE + permission);
    for byte in not_shared.chain(used) {
        let mut other = byte_lock(libc::F_WRLCK, byte);
        let looked = fcntl(file, FcntlArg::F_OFD_GETLK(&mut other));
        if looked.is_ok() && i32::from(other.l_type) != libc::F_UNLCK {
            return Err(refused());
        }
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn byte_lock(kind: i32, byte: i64) -> libc::flock {
    // The kinds are 0 to 2 and the whence is 0.
    let short = |value: i32| i16::try_from(value).unwrap_or_default();
    libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(not(target_os = "linux"))]
fn lock(_file: &File, _path: &Path) -> Result<()> {
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_one_writer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        std::fs::write(&path, [0; 512]).unwrap();
        let first = ImageLock::take(&path).unwrap();
        let error = ImageLock::take(&path).unwrap_err();
        assert!(matches!(error, EngineError::Refused { .. }), "{error:?}");
        drop(first);
        drop(ImageLock::take(&path).unwrap());
    }

    #[test]
    fn qemu_keeps_off_while_vmtide_writes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        std::fs::write(&path, [0; 512]).unwrap();
        let writes = || {
            let output = std::process::Command::new("qemu-io")
                .args(["-f", "raw", "-c", "write 0 512"])
                .arg(&path)
                .output()
                .expect("qemu-io is needed: install qemu-utils (scripts/test.sh does)");
            (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
        };
        let held = ImageLock::take(&path).unwrap();
        let (done, error) = writes();
        assert!(!done && error.contains("lock"), "{error}");
        drop(held);
        assert!(writes().0);
    }
}
