//! A bound on the memory of one connection's requests.

use parking_lot::{Condvar, Mutex};

/// Bytes that may be taken while there are some. Only a connection's reader takes, and workers
/// give back without ever taking, so a full budget always empties.
#[derive(Debug)]
pub(super) struct Budget {
    free: Mutex<u64>,
    freed: Condvar,
}

impl Budget {
    pub(super) fn new(bytes: u64) -> Self {
        Self { free: Mutex::new(bytes), freed: Condvar::new() }
    }

    /// Waits until `bytes` are free, and takes them. Never more than the whole budget.
    pub(super) fn take(&self, bytes: u64) {
        let mut free = self.free.lock();
        while *free < bytes {
            self.freed.wait(&mut free);
        }
        *free -= bytes;
    }

    /// Gives back what was taken.
    pub(super) fn give_back(&self, bytes: u64) {
        *self.free.lock() += bytes;
        self.freed.notify_all();
    }
}
