//! Setting blocks of a file aside just before they are written, on ext4.
//!
//! ext4 finds the blocks of a new part of a file when that part is written, and pays for it in both kinds of
//! writing. Past the cache it gives the file's lock to one writer alone while a write goes where no blocks are set
//! aside yet (`ext4_dio_write_checks`), so that the device has one request at a time, and none between them. Through
//! the cache it reserves, enters and later replaces a promise of space for every single block of 4 KiB (delayed
//! allocation, `ext4_da_get_block_prep`), under a lock that keeps the other writers waiting: half of all processor
//! time of a conversion. With blocks set aside by one fallocate(2), which takes some 5 microseconds, both go away.
//!
//! Other file systems let writers into holes at once (XFS), make room in a way that costs more than it saves (network
//! file systems), or no longer compress what is written to such blocks (btrfs).

use crate::ByteRange;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether to set blocks of a file aside. May be shared by threads.
#[derive(Debug)]
pub(crate) struct Room(AtomicBool);

impl Room {
    /// For `file`, by the file system that it is on.
    #[cfg(target_os = "linux")]
    pub(crate) fn of(file: &File) -> Self {
        /// `EXT4_SUPER_MAGIC` of statfs(2); ext2 and ext3 have the same and refuse fallocate(2).
        const MAGIC: u64 = 0xEF53;
        let is_ext4 =
            rustix::fs::fstatfs(file).is_ok_and(|found| u64::try_from(found.f_type) == Ok(MAGIC));
        Self(AtomicBool::new(is_ext4))
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn of(_file: &File) -> Self {
        Self(AtomicBool::new(false))
    }

    /// Sets blocks aside for `range` of `file`, the one that this was made for, where that helps. The size of the file
    /// and what it reads as stay the same. What cannot be set aside, e.g. because the disk is full, is left to the
    /// write to tell.
    #[cfg(target_os = "linux")]
    pub(crate) fn set_aside(&self, file: &File, range: ByteRange) {
        use rustix::fs::{FallocateFlags, fallocate};
        if !range.is_empty() && self.0.load(Ordering::Relaxed) {
            let set = fallocate(file, FallocateFlags::KEEP_SIZE, range.offset, range.length);
            if set.is_err() {
                self.0.store(false, Ordering::Relaxed);
            }
        }
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn set_aside(&self, _file: &File, _range: ByteRange) {
        self.0.store(false, Ordering::Relaxed);
    }
}
