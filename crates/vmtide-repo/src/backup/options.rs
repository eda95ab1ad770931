//! How a backup uses the machine, and what it takes where nobody says otherwise.

use super::limit::RateLimit;
use crate::immutable::Immutability;

/// How a backup uses the machine.
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// Threads that read, hash and compress. Each has a pack open and some 9 MiB of buffers.
    pub workers: usize,
    /// The zstd level, from [`MIN_COMPRESSION_LEVEL`] to [`MAX_COMPRESSION_LEVEL`]; 0 for no compression.
    pub compression_level: i32,
    /// The bytes of chunks that are compressed together, at least; from 4 KiB to 4 MiB.
    pub frame_bytes: usize,
    /// The size at which a pack is finished, in bytes.
    pub pack_size_bytes: u64,
    /// How many bytes a second are read from sources, by all jobs together that are given the same limit.
    pub limit_rate: Option<RateLimit>,
    /// For how long the restore point is to be immutable; none for not at all. Needs a store that can
    /// keep objects.
    pub immutability: Option<Immutability>,
}

/// Enough for S3's cost of requests to vanish (one PUT per pack) and small enough that half-dead
/// packs are cheap to rewrite.
const PACK_SIZE_BYTES: u64 = 64 << 20;

/// Smaller frames compress worse (zstd sees less); larger ones leave the processor's cache and make
/// reading one block cost more. See `docs/decisions/0003-frames-and-levels.md`.
const FRAME_BYTES: usize = 2 << 20;

/// What the peers take too; the figures are in `docs/decisions/0003-frames-and-levels.md`.
const DEFAULT_COMPRESSION_LEVEL: i32 = 3;

/// The quickest. zstd has more of them, which find hardly anything.
pub const MIN_COMPRESSION_LEVEL: i32 = -7;

/// Higher ones of zstd's take a gigabyte of memory for every worker.
pub const MAX_COMPRESSION_LEVEL: i32 = 19;

impl Default for BackupOptions {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        // Two more than the cores, so that workers that wait for a disk leave no core idle.
        Self {
            workers: (cores + 2).min(16),
            compression_level: DEFAULT_COMPRESSION_LEVEL,
            frame_bytes: FRAME_BYTES,
            pack_size_bytes: PACK_SIZE_BYTES,
            limit_rate: None,
            immutability: None,
        }
    }
}
