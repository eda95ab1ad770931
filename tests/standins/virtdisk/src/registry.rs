//! The handles that were given out.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use windows_sys::Win32::Foundation::{ERROR_INVALID_HANDLE, ERROR_SHARING_VIOLATION, HANDLE};

/// A disk that is open.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The image.
    pub image: PathBuf,
    /// The file behind the handle.
    pub content: PathBuf,
    /// Whether it was opened with its parents.
    pub with_parents: bool,
    /// Whether it may be written.
    pub writable: bool,
    /// Whether it is attached.
    pub attached: bool,
    /// How often it will be said that its making goes on.
    pub pending: u64,
}

fn open() -> MutexGuard<'static, HashMap<usize, Opened>> {
    static OPEN: OnceLock<Mutex<HashMap<usize, Opened>>> = OnceLock::new();
    OPEN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// Remembers a new handle. A number that Windows gives again belongs to a handle that was closed.
pub fn add(handle: HANDLE, disk: Opened) {
    open().insert(handle.addr(), disk);
}

/// What is behind a handle.
pub fn get(handle: HANDLE) -> Result<Opened, u32> {
    open().get(&handle.addr()).cloned().ok_or(ERROR_INVALID_HANDLE)
}

/// Marks a disk as attached, which can be once at a time. A handle that was closed has no file any more.
pub fn attach(handle: HANDLE) -> Result<(), u32> {
    let mut open = open();
    let image = open.get(&handle.addr()).ok_or(ERROR_INVALID_HANDLE)?.image.clone();
    let taken = |disk: &Opened| disk.attached && same(&disk.image, &image) && disk.content.exists();
    if open.values().any(taken) {
        return Err(ERROR_SHARING_VIOLATION);
    }
    if let Some(disk) = open.get_mut(&handle.addr()) {
        disk.attached = true;
    }
    Ok(())
}

/// Has it said so often that the making of a disk goes on.
pub fn make_pending(handle: HANDLE, looks: u64) {
    if let Some(disk) = open().get_mut(&handle.addr()) {
        disk.pending = looks;
    }
}

/// Whether the making of a disk goes on; once less often each time.
pub fn is_pending(handle: HANDLE) -> Result<bool, u32> {
    let mut open = open();
    let disk = open.get_mut(&handle.addr()).ok_or(ERROR_INVALID_HANDLE)?;
    let is_pending = disk.pending > 0;
    disk.pending = disk.pending.saturating_sub(1);
    Ok(is_pending)
}

/// Marks a disk as not attached.
pub fn detach(handle: HANDLE) {
    if let Some(disk) = open().get_mut(&handle.addr()) {
        disk.attached = false;
    }
}

fn same(one: &Path, other: &Path) -> bool {
    one.to_string_lossy().eq_ignore_ascii_case(&other.to_string_lossy())
}
