//! Keeping others off the images that vmtide writes to.
//!
//! The locks are QEMU's (open file description locks on single bytes, `block/file-posix.c` of QEMU):
//! a read lock on byte 100 + n says that permission n is used, on byte 200 + n that it is not shared
//! with others. Both sides lock first and look then, so of two that begin at the same moment at
//! least one gives up: a QEMU, or a second vmtide. They go with the process, however it ends. Where
//! the file system knows no such locks nothing is locked.
//!
//! On Windows one byte behind the end of every file is locked, by a writer for itself alone and by readers
//! together, which keeps a second vmtide off. Other programs need none: Hyper-V and QEMU open an image for
//! writing so that nobody else may, which fails while vmtide has it open for writing, and the other way
//! round; and a reader holds the file open such that nobody can open it for writing. On further systems
//! nothing is locked.

use crate::elsewhere::leads_elsewhere;
use crate::image_info;
use std::fs::File;
use std::path::{Path, PathBuf};
use vmtide_block::{BlockError, Result};

/// What is done with an image, and what nobody else may do meanwhile: numbers of permissions.
struct Needs {
    used: &'static [i64],
    #[cfg_attr(windows, allow(dead_code, reason = "there the sharing of files says it"))]
    not_shared: &'static [i64],
}

impl Needs {
    /// Whether the permission to write is among them.
    #[cfg(windows)]
    fn is_writer(&self) -> bool {
        self.used.contains(&1)
    }
}

/// A writer reads, writes and resizes, and lets nobody else write or resize.
const WRITING: Needs = Needs { used: &[0, 1, 3], not_shared: &[1, 3] };

/// A reader of a moment lets nobody write or resize.
const READING: Needs = Needs { used: &[0], not_shared: &[1, 3] };

/// The byte that says that permission 0 is used.
#[cfg(target_os = "linux")]
const USED_BASE: i64 = 100;

/// The byte that says that permission 0 is not shared.
#[cfg(target_os = "linux")]
const NOT_SHARED_BASE: i64 = 200;

/// The other files that the image at `path` says its data lies in: the extents of a VMDK, the data
/// file of a qcow2 image; empty where it cannot be read. The names are the image's, so they may mean
/// any file: good for comparing, not for opening. On Windows those on other machines and devices are left out, because
/// already to ask for them would log in to a server that the image chose.
pub fn companion_files(path: &Path) -> Vec<PathBuf> {
    let directory = path.parent().unwrap_or(Path::new(""));
    let Ok(info) = image_info(path, None) else {
        return Vec::new();
    };
    let text = directory.to_string_lossy();
    let names = info.extent_files.iter().chain(&info.data_file);
    names
        .filter(|name| !(cfg!(windows) && leads_elsewhere(name, &text)))
        .map(|name| directory.join(name))
        .collect()
}

/// An image that nobody else writes to until this is dropped.
#[derive(Debug)]
pub struct ImageLock {
    _files: Vec<File>,
}

impl ImageLock {
    /// Locks the image at `path`, with the extents and the data file beside it, to be written.
    ///
    /// # Errors
    /// [`BlockError::Io`] of the kind `ResourceBusy` where somebody else uses one of them. What
    /// cannot be opened is left to whoever opens it for writing.
    pub fn take(path: &Path) -> Result<Self> {
        Self::with_needs(path, &WRITING)
    }

    /// Locks the image at `path`, with what is beside it, to be read as it is at this moment. Any number
    /// of readers may do so at once.
    ///
    /// # Errors
    /// As [`take`](Self::take), where somebody writes to it.
    pub fn take_for_reading(path: &Path) -> Result<Self> {
        Self::with_needs(path, &READING)
    }

    fn with_needs(path: &Path, needs: &Needs) -> Result<Self> {
        let mut files: Vec<File> = Vec::new();
        let mut seen = Vec::new();
        let mut beside = companion_files(path);
        beside.retain(|file| file.parent() == path.parent() && file.is_file());
        for file in std::iter::once(path).chain(beside.iter().map(PathBuf::as_path)) {
            let Ok(real) = file.canonicalize() else {
                continue;
            };
            if seen.contains(&real) {
                continue;
            }
            match open_to_lock(&real, needs) {
                Ok(open) => {
                    lock(&open, file, needs)?;
                    files.push(open);
                }
                Err(error) if vmtide_block::files::is_in_use(&error) => return Err(busy(file)),
                Err(_) => {}
            }
            seen.push(real);
        }
        Ok(Self { _files: files })
    }
}

fn busy(path: &Path) -> BlockError {
    BlockError::io(format!("lock {}", path.display()), std::io::ErrorKind::ResourceBusy)
}

#[cfg(not(windows))]
fn open_to_lock(path: &Path, _needs: &Needs) -> std::io::Result<File> {
    vmtide_block::files::open_file(path, File::options().read(true))
}

#[cfg(windows)]
fn open_to_lock(path: &Path, needs: &Needs) -> std::io::Result<File> {
    use std::os::windows::fs::OpenOptionsExt;
    /// `FILE_SHARE_READ | FILE_SHARE_DELETE`: others may do anything but write.
    const NO_WRITERS: u32 = 1 | 4;
    /// With `FILE_SHARE_WRITE`.
    const ANYBODY: u32 = 7;
    let share = if needs.is_writer() { ANYBODY } else { NO_WRITERS };
    File::options().read(true).share_mode(share).open(path)
}

#[cfg(target_os = "linux")]
fn lock(file: &File, path: &Path, needs: &Needs) -> Result<()> {
    use nix::errno::Errno;
    use nix::fcntl::{FcntlArg, fcntl};
    let refused = || busy(path);
    let bytes = |base: i64, permissions: &'static [i64]| permissions.iter().map(move |n| base + n);
    let mine = bytes(USED_BASE, needs.used).chain(bytes(NOT_SHARED_BASE, needs.not_shared));
    for byte in mine {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(libc::F_RDLCK, byte))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(refused()),
            // No such locks here.
            Err(_) => return Ok(()),
        }
    }
    // Whoever does not share what is used, or uses what is not shared.
    let theirs = bytes(NOT_SHARED_BASE, needs.used).chain(bytes(USED_BASE, needs.not_shared));
    for byte in theirs {
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

/// The byte that says on Windows that a vmtide reads or writes: no file reaches so far, so nobody meets the
/// lock who reads or writes content.
#[cfg(windows)]
const LOCKED_BYTE: u64 = 0x7fff_ffff_ffff_0000;

#[cfg(windows)]
fn lock(file: &File, path: &Path, needs: &Needs) -> Result<()> {
    match vmtide_windows_ffi::files::try_lock_byte(file, LOCKED_BYTE, needs.is_writer()) {
        Ok(false) => Err(busy(path)),
        // Or there are no such locks here.
        Ok(true) | Err(_) => Ok(()),
    }
}

#[cfg(not(any(target_os = "linux", windows)))]
fn lock(_file: &File, _path: &Path, needs: &Needs) -> Result<()> {
    debug_assert!(!needs.used.is_empty() && !needs.not_shared.is_empty());
    Ok(())
}

#[cfg(all(test, any(target_os = "linux", windows)))]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_one_writer_or_many_readers() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        std::fs::write(&path, [0; 512]).unwrap();
        let busy = |result: Result<ImageLock>| {
            let error = result.unwrap_err();
            assert_eq!(error.io_kind(), Some(std::io::ErrorKind::ResourceBusy), "{error}");
        };
        let writer = ImageLock::take(&path).unwrap();
        busy(ImageLock::take(&path));
        busy(ImageLock::take_for_reading(&path));
        drop(writer);
        let readers = [ImageLock::take_for_reading(&path), ImageLock::take_for_reading(&path)];
        busy(ImageLock::take(&path));
        drop(readers);
        drop(ImageLock::take(&path).unwrap());
    }
}
