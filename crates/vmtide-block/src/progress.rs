//! How far long work has come: counters that workers add to and a front end samples.
//!
//! Counters instead of callbacks keep drawing out of the hot path and off the workers' threads:
//! a worker does one relaxed add per mebibyte, a front end looks as often as it draws.

use std::sync::atomic::{AtomicU64, Ordering};

/// Shared counters of one piece of work, in bytes of virtual disk unless named otherwise.
#[derive(Debug, Default)]
pub struct Progress {
    total_bytes: AtomicU64,
    done_bytes: AtomicU64,
    transferred_bytes: AtomicU64,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProgressSnapshot {
    /// The bytes of virtual disk that the work covers, 0 while unknown.
    pub total_bytes: u64,
    /// The bytes of virtual disk dealt with, skipped ones too; reaches `total_bytes`.
    pub done_bytes: u64,
    /// The bytes really moved: read, or written, as the job defines.
    pub transferred_bytes: u64,
}

impl Progress {
    /// Counters at zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds to what the work covers.
    pub fn add_total(&self, bytes: u64) {
        self.total_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds to what has been dealt with.
    pub fn add_done(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds to what has been moved.
    pub fn add_transferred(&self, bytes: u64) {
        self.transferred_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The counters now. They are read one by one: good for drawing, not for accounting.
    pub fn snapshot(&self) -> ProgressSnapshot {
        ProgressSnapshot {
            total_bytes: self.total_bytes.load(Ordering::Relaxed),
            done_bytes: self.done_bytes.load(Ordering::Relaxed),
            transferred_bytes: self.transferred_bytes.load(Ordering::Relaxed),
        }
    }
}
