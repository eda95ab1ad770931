//! Whether a running VM has an image file open.
//!
//! QEMU marks its images by read locks on single bytes of the file (open file description locks,
//! `block/file-posix.c` of QEMU): byte 100 + n says that it uses permission n, byte 200 + n that it
//! does not share permission n with others; permission 1 is writing. Linux lists all locks of the
//! machine in `/proc/locks` (proc(5)), where they are looked for here. What another host holds over
//! a network file system is not in it, nor is a file that its file system lists under another
//! device number than stat(2) gives (Btrfs does).
//!
//! On Windows every program says when it opens a file what others may do with it meanwhile: whoever has
//! it open for writing is found by opening it for reading such that nobody may write, and a QEMU or
//! Hyper-V that uses it at all by opening it for writing, which neither lets others do.

use crate::{EngineError, Result};
use std::ops::RangeInclusive;
use std::path::Path;

/// The bytes that QEMU locks while it writes to the image.
const WRITES: &[RangeInclusive<u64>] = &[101..=101];

/// All bytes that QEMU locks: there are five permissions.
const USES: &[RangeInclusive<u64>] = &[100..=104, 200..=204];

/// What is to be done with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Reading: a copy of what somebody writes to meanwhile is of no moment at all.
    Read,
    /// Writing or replacing: it would destroy the disk of a running VM.
    Write,
}

/// Refuses to use a file so while a running VM has it open. What cannot be found out does not hinder.
///
/// # Errors
/// [`EngineError::Refused`].
pub(crate) fn check_not_in_use(path: &Path, what_for: Use) -> Result<()> {
    let bytes = match what_for {
        Use::Read => WRITES,
        Use::Write => USES,
    };
    if !is_locked(path, bytes, what_for) {
        return Ok(());
    }
    let action = match what_for {
        Use::Read => "read",
        Use::Write => "write to",
    };
    Err(EngineError::refused(
        format!("{action} {}", path.display()),
        if cfg!(windows) {
            "a running VM or another program has it open: back up a checkpoint of the VM, or end that \
             first"
        } else {
            "a running QEMU or another vmtide has it open: name the VM by its monitor (qemu+unix://…), \
             or end that first"
        },
    ))
}

#[cfg(target_os = "linux")]
fn is_locked(path: &Path, bytes: &[RangeInclusive<u64>], _: Use) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = std::fs::metadata(path) else {
        return false;
    };
    let Ok(locks) = std::fs::read_to_string("/proc/locks") else {
        return false;
    };
    let device = metadata.dev();
    let file = format!(
        "{:02x}:{:02x}:{}",
        rustix::fs::major(device),
        rustix::fs::minor(device),
        metadata.ino()
    );
    lists_lock(&locks, &file, bytes)
}

#[cfg(windows)]
fn is_locked(path: &Path, _bytes: &[RangeInclusive<u64>], what_for: Use) -> bool {
    use std::os::windows::fs::OpenOptionsExt;
    /// `FILE_SHARE_READ | FILE_SHARE_DELETE`: others may do anything but write.
    const NO_WRITERS: u32 = 1 | 4;
    let tried = std::fs::OpenOptions::new()
        .read(true)
        .write(what_for == Use::Write)
        .share_mode(NO_WRITERS)
        .open(path);
    tried.is_err_and(|error| vmtide_block::files::is_in_use(&error))
}

#[cfg(not(any(target_os = "linux", windows)))]
fn is_locked(_path: &Path, _bytes: &[RangeInclusive<u64>], _: Use) -> bool {
    false
}

/// Whether the list has an open file description lock of `file` that covers one of `bytes`. A line
/// reads `2: OFDLCK ADVISORY  READ -1 fe:00:10431071 100 101`; one that waits has `->` after the
/// number and holds nothing.
#[cfg(any(target_os = "linux", test))]
fn lists_lock(locks: &str, file: &str, bytes: &[RangeInclusive<u64>]) -> bool {
    locks.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, "OFDLCK", _, _, _, locked, start, end] = fields[..] else {
            return false;
        };
        let Ok(start) = start.parse::<u64>() else {
            return false;
        };
        // EOF: to the end of the file.
        let end = end.parse().unwrap_or(u64::MAX);
        locked == file && bytes.iter().any(|range| *range.start() <= end && start <= *range.end())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_of_qemu_are_told_from_others() {
        let locks = "\
1: FLOCK  ADVISORY  READ 4468 fe:00:1 0 EOF
1: POSIX  ADVISORY  WRITE 4468 fe:00:1 0 EOF
2: OFDLCK ADVISORY  READ -1 fe:00:2 201 201
3: OFDLCK ADVISORY  READ -1 fe:00:2 100 101
4: OFDLCK ADVISORY  READ -1 fe:00:3 100 100
4: -> OFDLCK ADVISORY  WRITE -1 fe:00:4 101 101
5: OFDLCK ADVISORY  WRITE -1 fe:00:5 0 EOF
nonsense
6: OFDLCK";
        let locked = |file: &str, bytes| lists_lock(locks, file, bytes);
        for (file, writes, uses) in [
            ("fe:00:1", false, false),
            ("fe:00:2", true, true),
            ("fe:00:3", false, true),
            ("fe:00:4", false, false),
            ("fe:00:5", true, true),
            ("fe:01:2", false, false),
        ] {
            assert_eq!((locked(file, WRITES), locked(file, USES)), (writes, uses), "{file}");
        }
    }
}
