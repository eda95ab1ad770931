//! A limit on how fast a source is read.

use parking_lot::Mutex;
use std::time::{Duration, Instant};
use vmtide_block::{CancelToken, Result};

/// Sleeps are cut into pieces of this length, so that cancelling is not waited for.
const NAP: Duration = Duration::from_millis(100);

/// Lets through at most so many bytes a second, on average over about a second, for all workers
/// together.
#[derive(Debug)]
pub(super) struct RateLimiter {
    bytes_per_second: u64,
    free_at: Mutex<Instant>,
}

impl RateLimiter {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may be read.
    pub(super) fn take(&self, bytes: u64, cancel: &CancelToken) -> Result<()> {
        #[allow(clippy::cast_precision_loss, reason = "a rate needs no more than 53 bits")]
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let start = {
            let mut free_at = self.free_at.lock();
            let start = (*free_at).max(Instant::now());
            *free_at = start + cost;
            start
        };
        loop {
            cancel.check()?;
            match start.checked_duration_since(Instant::now()) {
                None | Some(Duration::ZERO) => return Ok(()),
                Some(wait) => std::thread::sleep(wait.min(NAP)),
            }
        }
    }
}
