//! One job at a time on one VM of one host.
//!
//! The lock is the operating system's advisory lock on a small file: it ends with the process,
//! however the process ends, so a killed job never blocks the next one.

use crate::{HypervisorError, JobId, Result};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;

/// Holds a VM for one job until dropped.
#[derive(Debug)]
pub struct VmLock {
    file: File,
}

impl Drop for VmLock {
    /// Unlocks by name: closing the file alone would leave the lock with a child process that
    /// another thread is just starting.
    fn drop(&mut self) {
        // Closing the file comes next and unlocks it in all other cases.
        let _ = self.file.unlock();
    }
}

impl VmLock {
    /// Takes the lock of the VM that `key` names (a socket path, a GUID) in `state_directory`,
    /// without waiting.
    ///
    /// # Errors
    /// [`HypervisorError::Busy`] with the holder where another process has it;
    /// [`HypervisorError::Io`] where the state directory cannot be used.
    pub fn acquire(state_directory: &Path, vm: &str, key: &str, job: &JobId) -> Result<Self> {
        let directory = state_directory.join("locks");
        let io = |what: &str, error| {
            HypervisorError::io(format!("{what} {}", directory.display()), error)
        };
        std::fs::create_dir_all(&directory).map_err(|error| io("create", error))?;
        let path = directory.join(format!("{}.lock", file_name_of(key)));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| io("open a lock in", error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // The holder is a courtesy to the reader; the lock itself is what counts.
                let _ = file.read_to_string(&mut holder);
                return Err(HypervisorError::Busy { vm: vm.into(), detail: holder.trim().into() });
            }
            Err(std::fs::TryLockError::Error(error)) => return Err(io("lock a file in", error)),
        }
        file.set_len(0).map_err(|error| io("write a lock in", error))?;
        writeln!(file, "job {job}, process {}", std::process::id())
            .map_err(|error| io("write a lock in", error))?;
        Ok(Self { file })
    }
}

/// A file name for any key: readable where it can be, always different for different keys.
fn file_name_of(key: &str) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325u64; // FNV-1a, for uniqueness and not for security.
    for byte in key.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let tail: String = key
        .chars()
        .rev()
        .take(48)
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    format!("{}-{hash:016x}", tail.chars().rev().collect::<String>().trim_matches('-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_held_once_and_free_after_drop() {
        let directory = tempfile::tempdir().unwrap();
        let take = || VmLock::acquire(directory.path(), "vm1", "/run/vm1.qmp", &JobId::random());
        let held = take().unwrap();
        let error = take().unwrap_err().to_string();
        assert!(error.contains("vm1") && error.contains("process"), "{error}");
        assert!(VmLock::acquire(directory.path(), "vm2", "/run/vm2.qmp", &JobId::random()).is_ok());
        drop(held);
        assert!(take().is_ok());
    }
}
