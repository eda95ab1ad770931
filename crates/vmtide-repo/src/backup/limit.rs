//! A limit on how fast sources are read.

use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmtide_block::{CancelToken, Result};

/// Sleeps are cut into pieces of this length, so that cancelling is not waited for.
const NAP: Duration = Duration::from_millis(100);

/// Lets through at most so many bytes a second, on average over about a second. Clones are the same limit: all
/// workers of all jobs that were given one share it. May be used by many threads.
#[derive(Clone, Debug)]
pub struct RateLimit {
    bytes_per_second: u64,
    free_at: Arc<Mutex<Instant>>,
}

impl RateLimit {
    /// A limit of its own; at least one byte a second.
    pub fn new(bytes_per_second: u64) -> Self {
        let free_at = Arc::new(Mutex::new(Instant::now()));
        Self { bytes_per_second: bytes_per_second.max(1), free_at }
    }

    /// Whether what one lets through is taken from the other, too.
    pub fn is_shared_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.free_at, &other.free_at)
    }

    /// Waits until `bytes` more may be read.
    pub(super) fn take(&self, bytes: u64, cancel: &CancelToken) -> Result<()> {
        let start = self.reserve(bytes);
        loop {
            cancel.check()?;
            match start.checked_duration_since(Instant::now()) {
                None | Some(Duration::ZERO) => return Ok(()),
                Some(wait) => std::thread::sleep(wait.min(NAP)),
            }
        }
    }

    /// Takes the next free place for `bytes`; answers with when it begins.
    fn reserve(&self, bytes: u64) -> Instant {
        #[allow(clippy::cast_precision_loss, reason = "a rate needs no more than 53 bits")]
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let mut free_at = self.free_at.lock();
        let start = (*free_at).max(Instant::now());
        *free_at = start + cost;
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_job_reads_another_waits_for() {
        let limit = RateLimit::new(1000);
        let other = limit.clone();
        let first = limit.reserve(3_600_000);
        assert!(other.reserve(1) >= first + Duration::from_secs(3600));
        assert!(other.is_shared_with(&limit));
        let apart = RateLimit::new(1000);
        assert!(!apart.is_shared_with(&limit));
        assert!(apart.reserve(1) < first + Duration::from_secs(3600));
    }
}
