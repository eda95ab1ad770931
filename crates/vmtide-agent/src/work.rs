//! What is going on in an agent, beyond single requests: transfers, freezes, disks that are written.

use crate::freezes::Freezes;
use crate::limits::{CALLS_AT_ONCE, CALLS_PER_CLIENT, FILES_AT_ONCE, Limits};
use crate::places::Places;
use crate::stream::RangeMemory;
use crate::transfers::Transfers;
use parking_lot::Mutex;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Semaphore;

/// What is going on; one per agent.
#[derive(Debug)]
pub struct Work {
    /// Content under way.
    pub transfers: Arc<Transfers>,
    /// Lists of changed ranges under way.
    pub changes: Arc<Places>,
    /// Calls of management objects under way.
    pub calls: Arc<Places>,
    /// Moments that are held.
    pub freezes: Arc<Freezes>,
    /// The memory of lists of ranges.
    pub range_memory: RangeMemory,
    /// Files that are held whole.
    pub files: Arc<Semaphore>,
    writing: Arc<Mutex<HashSet<PathBuf>>>,
}

impl Work {
    /// Nothing yet.
    pub fn new(limits: &Limits) -> Self {
        Self {
            transfers: Transfers::new(limits),
            changes: Places::new(limits),
            calls: Places::of(CALLS_PER_CLIENT, CALLS_AT_ONCE),
            freezes: Freezes::new(limits),
            range_memory: RangeMemory::new(limits.range_memory_bytes),
            files: Arc::new(Semaphore::new(FILES_AT_ONCE)),
            writing: Arc::default(),
        }
    }

    /// Takes a disk for writing; none while somebody else has it.
    pub fn claim(&self, path: &Path) -> Option<WriteClaim> {
        let free = self.writing.lock().insert(path.to_path_buf());
        free.then(|| WriteClaim { path: path.to_path_buf(), writing: Arc::clone(&self.writing) })
    }
}

/// A disk that one client writes; given back when it is dropped.
#[derive(Debug)]
pub struct WriteClaim {
    path: PathBuf,
    writing: Arc<Mutex<HashSet<PathBuf>>>,
}

impl Drop for WriteClaim {
    fn drop(&mut self) {
        self.writing.lock().remove(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_at_a_time_writes_a_disk() {
        let work = Work::new(&Limits::default());
        let claim = work.claim(Path::new("/a")).unwrap();
        assert!(work.claim(Path::new("/a")).is_none());
        assert!(work.claim(Path::new("/b")).is_some());
        drop(claim);
        assert!(work.claim(Path::new("/a")).is_some());
    }
}
