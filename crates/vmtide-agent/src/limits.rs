//! What one client may use at once, and all of them together.
//!
//! The figures multiply: memory for content is `streams_total × stream.read_ahead × stream.piece_bytes`, 96 MiB
//! as they stand; lists of ranges take at most `range_memory_bytes` on top.

use crate::stream::StreamOptions;
use serde::Serialize;
use std::num::NonZeroU64;
use std::time::Duration;

/// The shortest and the longest time that a freeze may be left alone, in seconds.
pub const FREEZE_TTL_SECONDS: std::ops::RangeInclusive<u64> = 10..=86_400;

/// How long a freeze may be left alone where nobody says, in seconds.
pub const DEFAULT_FREEZE_TTL_SECONDS: u64 = 600;

/// The most ranges of one request or one page of changes.
pub const MAX_RANGES: usize = 1 << 20;

/// The largest body about VMs and their management objects: a freeze names every disk with its tracking id, a call
/// carries instances as text.
pub const VM_JSON_BODY_BYTES: u64 = 4 << 20;

/// The largest file that is given or taken whole. Configurations of VMs are far below it.
pub const MAX_FILE_BYTES: u64 = 64 << 20;

/// The files that are held whole at once, in all.
pub const FILES_AT_ONCE: usize = 4;

/// The calls of management objects of one client at once.
pub const CALLS_PER_CLIENT: usize = 4;

/// The calls of management objects in all: each keeps its answer until its client has taken it.
pub const CALLS_AT_ONCE: usize = 8;

/// The most text of one answer about management objects: what a host of hundreds of VMs says of all of them has tens
/// of megabytes.
#[cfg(windows)]
pub const MAX_CALL_ANSWER_BYTES: u64 = 64 << 20;

/// What one client, that is one key, may use at once, and all of them together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Transfers of content of one client.
    pub streams_per_client: usize,
    /// Transfers of content in all. Each keeps up to `readers` threads.
    pub streams_total: usize,
    /// Lists of changed ranges that one client may be reading at once.
    pub changes_per_client: usize,
    /// Lists of changed ranges in all. Each keeps one thread until its client has taken it.
    pub changes_total: usize,
    /// Bytes a second of all transfers of one client.
    pub bytes_per_second_per_client: Option<NonZeroU64>,
    /// Freezes of one client.
    pub freezes_per_client: usize,
    /// Freezes in all: each may keep old content on disk.
    pub freezes_total: usize,
    /// Disks of one freeze.
    pub disks_per_freeze: usize,
    /// The largest body with ranges. A million of them take some 45 MB.
    pub range_body_bytes: u64,
    /// The most ranges of one request.
    pub ranges_per_request: usize,
    /// The memory of all lists of ranges of all requests.
    pub range_memory_bytes: usize,
    /// The largest other body of JSON.
    pub json_body_bytes: u64,
    /// How long the next part of a request's body may take.
    #[serde(skip)]
    pub body_part_timeout: Duration,
    /// How long all of a body of JSON may take.
    #[serde(skip)]
    pub json_body_timeout: Duration,
    /// How content is read.
    #[serde(skip)]
    pub stream: StreamOptions,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            streams_per_client: 24,
            streams_total: 32,
            changes_per_client: 16,
            changes_total: 32,
            bytes_per_second_per_client: None,
            freezes_per_client: 8,
            freezes_total: 32,
            disks_per_freeze: 64,
            range_body_bytes: 64 << 20,
            ranges_per_request: MAX_RANGES,
            range_memory_bytes: 128 << 20,
            json_body_bytes: 64 << 10,
            body_part_timeout: Duration::from_secs(30),
            json_body_timeout: Duration::from_secs(300),
            stream: StreamOptions::default(),
        }
    }
}
