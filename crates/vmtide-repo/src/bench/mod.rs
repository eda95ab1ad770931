//! What this machine and a store can do, stage by stage: the processor's part of a backup on data in
//! memory, the store's part on objects of a pack's size, and both together as a backup and a restore.
//!
//! Everything that is stored for it lies under `bench/` in the store, apart from the repository, and
//! is removed at the end.

mod disk;
mod index;
mod processor;
mod whole;
mod work;

pub use index::{IndexMeasured, measure_index};
pub use processor::measure_processor;
pub use whole::{StoreBench, measure_store};

use serde::Serialize;
use std::time::Duration;

/// How long requests took, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Latency {
    /// Half of them no longer than this.
    pub median_ms: f64,
    /// Nine in ten.
    pub p90_ms: f64,
    /// 99 in a hundred.
    pub p99_ms: f64,
    /// All.
    pub max_ms: f64,
}

impl Latency {
    /// Of these durations; none of none.
    pub fn of(mut times: Vec<Duration>) -> Option<Self> {
        times.sort_unstable();
        let last = times.len().checked_sub(1)?;
        let at = |percent: usize| times[last * percent / 100].as_secs_f64() * 1000.0;
        Some(Self { median_ms: at(50), p90_ms: at(90), p99_ms: at(99), max_ms: at(100) })
    }
}

/// One stage, measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// The stage, e.g. `zstd 3`.
    pub stage: String,
    /// How many threads did it at once.
    pub threads: usize,
    /// The bytes that went through it, before compression.
    pub bytes: u64,
    /// How often it was done: chunks, requests, objects.
    pub operations: u64,
    /// How long all of it took.
    pub seconds: f64,
    /// Bytes for each second.
    pub bytes_per_second: f64,
    /// What was left of the bytes, where the stage makes them fewer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left: Option<f64>,
    /// How long single requests took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency: Option<Latency>,
}

impl Measured {
    #[allow(clippy::cast_precision_loss, reason = "a rate needs no more than 53 bits")]
    /// So many bytes in so many operations and so long, by one thread.
    pub fn new(stage: impl Into<String>, bytes: u64, operations: u64, time: Duration) -> Self {
        // A clock that stood still must not divide by zero.
        let seconds = time.as_secs_f64().max(1e-9);
        Self {
            stage: stage.into(),
            threads: 1,
            bytes,
            operations,
            seconds,
            bytes_per_second: bytes as f64 / seconds,
            left: None,
            latency: None,
        }
    }

    pub(crate) fn by(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    pub(crate) fn with_latency(mut self, times: Vec<Duration>) -> Self {
        self.latency = Latency::of(times);
        self
    }
}

#[cfg(test)]
mod tests;
