//! Doing something many times from several threads, each time measured.

use crate::{RepoError, Result};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vmtide_block::CancelToken;

/// What many repetitions took.
pub(super) struct Done {
    /// How many there were.
    pub count: u64,
    /// From the first to the last.
    pub time: Duration,
    /// Each of them.
    pub times: Vec<Duration>,
}

/// Calls `work` with the numbers from 0 to `count` from `threads` threads, until `limit` has passed:
/// at least once, whatever it takes.
pub(super) fn repeat(
    count: u64,
    threads: usize,
    limit: Duration,
    cancel: &CancelToken,
    work: &(dyn Fn(u64) -> Result<()> + Sync),
) -> Result<Done> {
    let next = AtomicU64::new(0);
    let times = Mutex::new(Vec::new());
    let begun = Instant::now();
    let worker = || -> Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count || (number > 0 && begun.elapsed() > limit) {
                return Ok(());
            }
            cancel.check()?;
            let started = Instant::now();
            work(number)?;
            times.lock().push(started.elapsed());
        }
    };
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(worker)).collect();
        handles.into_iter().try_for_each(|handle| {
            handle.join().unwrap_or_else(|_| {
                Err(RepoError::Invalid("a thread of the benchmark ended abnormally".into()))
            })
        })
    })?;
    let time = begun.elapsed();
    let times = times.into_inner();
    Ok(Done { count: times.len() as u64, time, times })
}
