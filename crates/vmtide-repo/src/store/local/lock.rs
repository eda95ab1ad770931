//! The lock between garbage collection and everybody else (format §11).
//!
//! `flock(2)` on `locks/gc`: the kernel keeps it, so it ends with its process and nothing stale is
//! left. Two guards of one process exclude each other as those of two do.

use super::{LOCK, LOCKS, Root, files};
use crate::store::StoreLock;
use crate::{RepoError, Result};
use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind};

/// Holds the lock; the file is none where there is nothing to lock against.
struct Guard {
    _file: Option<File>,
}

impl StoreLock for Guard {}

/// Takes the lock without waiting.
pub(super) fn take(root: &Root, exclusive: bool) -> Result<Box<dyn StoreLock>> {
    let failed = |error: io::Error| RepoError::io(format!("lock {}", root.path.display()), error);
    let file = match open(root, exclusive) {
        Ok(file) => file,
        // Nobody can write a lock file here, hence nobody who comes this way can collect garbage.
        Err(error) if !exclusive && is_unwritable(&error) && !root.path.join(LOCK).exists() => {
            tracing::warn!(repository = %root.path.display(), "reading without a lock: {error}");
            return Ok(Box::new(Guard { _file: None }));
        }
        Err(error) => return Err(failed(error)),
    };
    let locked = if exclusive { file.try_lock() } else { file.try_lock_shared() };
    match locked {
        Ok(()) => Ok(Box::new(Guard { _file: Some(file) })),
        Err(TryLockError::WouldBlock) => Err(busy(root, exclusive)),
        // Without locks garbage collection always refuses, so that all others need none.
        Err(TryLockError::Error(error)) if !exclusive && is_unsupported(&error) => {
            tracing::warn!(repository = %root.path.display(), "the file system has no locks: {error}");
            Ok(Box::new(Guard { _file: None }))
        }
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// For writing where the lock is exclusive, because NFS asks for that; else for reading, so that it
/// works on media that cannot be written.
fn open(root: &Root, exclusive: bool) -> io::Result<File> {
    let path = root.path.join(LOCK);
    if !exclusive {
        match files::open_regular(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            result => return result.map(|(file, _)| file),
        }
    }
    files::create_directory(&root.path.join(LOCKS))?;
    files::open_or_create(&path)
}

fn is_unwritable(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied)
}

fn is_unsupported(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(Errno::from_io_error(error), Some(Errno::NOTSUP | Errno::NOSYS | Errno::NOLCK))
}

fn busy(root: &Root, exclusive: bool) -> RepoError {
    let others = if exclusive { "a backup, restore or other command" } else { "prune" };
    RepoError::Busy {
        detail: format!(
            "{others} is at work on {}; try again when it has finished",
            root.path.display()
        ),
    }
}
