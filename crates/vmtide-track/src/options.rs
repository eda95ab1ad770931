//! How a disk is tracked.

use crate::{Result, TrackError};
use std::path::PathBuf;

/// The least block: what the smallest write of a guest with 4 KiB pages changes.
const MIN_GRANULARITY_BYTES: u32 = 4 << 10;

/// The largest block. Beyond it every small write costs a backup more than reading it takes.
const MAX_GRANULARITY_BYTES: u32 = 16 << 20;

/// The largest region; twice that no longer fits the page's field of 32 bits.
const MAX_REGION_BYTES: u32 = 1 << 30;

/// The most blocks: 128 TiB at 64 KiB. A bitmap of them takes 256 MiB; more is refused, for a granularity that is
/// too fine for the disk would otherwise take the host's memory.
const MAX_BLOCKS: u64 = 1 << 31;

/// The most ids that are retained, whatever the options say: each costs a bitmap.
pub(crate) const MAX_IDS: usize = 1024;

/// How a disk is tracked. What concerns the files' layout holds for tracking that begins; tracking that is on
/// goes on as it began.
#[derive(Clone, Debug)]
pub struct Options {
    /// The bytes of disk that one bit stands for: a power of two from 4 KiB to 16 MiB. Memory for each
    /// retained id is at most the disk's size / `granularity_bytes` / 8: 2 MiB for each TiB at 64 KiB.
    pub granularity_bytes: u32,
    /// The bytes of disk that one mark of `.mrt` stands for: a power of two, at least the granularity and at most 1 GiB.
    /// Smaller regions make answers after a crash smaller and cost more waits for the medium.
    pub region_bytes: u32,
    /// The most ids that are retained, at least 1; the oldest is retired first.
    pub max_ids: usize,
    /// How long an id is retained, in milliseconds; none: as long as there are not too many. The newest always is.
    pub max_age_ms: Option<u64>,
    /// Begins tracking where it is not on, or was lost, when the disk is opened.
    pub enable: bool,
    /// Where a frozen view keeps the blocks that are overwritten meanwhile; none for `TMPDIR`, where that is set, or
    /// `/var/tmp`; on Windows the user's directory for temporary files.
    pub scratch_directory: Option<PathBuf>,
    /// The most bytes that one frozen view keeps. When the guest overwrites more than that, the view fails and
    /// the guest goes on.
    pub scratch_limit_bytes: u64,
    /// Tells the time in milliseconds since 1970, for the age of ids.
    pub now_unix_ms: fn() -> u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            granularity_bytes: 64 << 10,
            region_bytes: 16 << 20,
            max_ids: 32,
            max_age_ms: None,
            enable: false,
            scratch_directory: None,
            scratch_limit_bytes: 32 << 30,
            now_unix_ms: system_time_ms,
        }
    }
}

fn system_time_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Sizes and what follows from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// The disk's size in bytes.
    pub size_bytes: u64,
    /// A block's.
    pub granularity_bytes: u32,
    /// A region's.
    pub region_bytes: u32,
}

impl Geometry {
    /// Checks the sizes.
    ///
    /// # Errors
    /// [`TrackError::Unsupported`], naming what is out of bounds.
    pub fn new(size_bytes: u64, granularity_bytes: u32, region_bytes: u32) -> Result<Self> {
        let refuse = |reason: String| Err(TrackError::unsupported("change tracking", reason));
        if !granularity_bytes.is_power_of_two()
            || !(MIN_GRANULARITY_BYTES..=MAX_GRANULARITY_BYTES).contains(&granularity_bytes)
        {
            return refuse(format!(
                "a granularity of {granularity_bytes} bytes is not a power of two from 4 KiB to 16 MiB"
            ));
        }
        if !region_bytes.is_power_of_two()
            || !(granularity_bytes..=MAX_REGION_BYTES).contains(&region_bytes)
        {
            return refuse(format!(
                "a region of {region_bytes} bytes is not a power of two from the granularity to 1 GiB"
            ));
        }
        let geometry = Self { size_bytes, granularity_bytes, region_bytes };
        if geometry.blocks() > MAX_BLOCKS {
            return refuse(format!(
                "a disk of {size_bytes} bytes has too many blocks of {granularity_bytes} bytes: choose a larger granularity"
            ));
        }
        Ok(geometry)
    }

    pub const fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(self.granularity_bytes as u64)
    }

    pub const fn regions(&self) -> u64 {
        self.size_bytes.div_ceil(self.region_bytes as u64)
    }

    /// The blocks of a region, those past the disk's end included.
    pub const fn blocks_per_region(&self) -> u64 {
        (self.region_bytes / self.granularity_bytes) as u64
    }
}
