//! Storing disks: from changed ranges to packs, maps and a restore point.
//!
//! ```text
//! planner ─► stretches of data ─► workers: read ─► chunks ─► id ─► known? ─► frame ─► pack
//!    └─► zero runs ───────────────────────────────────┴─► runs that differ from the base map
//! commit: finish packs ─► index segment ─► map segments ─► restore point
//! ```
//!
//! One planner asks the source for extents; workers take stretches from it over a bounded channel and
//! work alone, each on a pack of its own, so that no lock is held while anything is hashed,
//! compressed or written. Memory is bounded by the number of workers and by
//! [`fresh::MAX_PENDING`], whatever the size of disk or repository.

mod base;
mod chunk;
mod fill;
mod fresh;
mod heal;
mod limit;
mod mend;
mod options;
mod plan;
mod session;
mod sink;
mod state;
mod work;

pub(crate) use chunk::{Chunker, Cut};
pub(crate) use heal::HealthyDisk;
pub use limit::RateLimit;
pub use options::{BackupOptions, MAX_COMPRESSION_LEVEL, MIN_COMPRESSION_LEVEL};
pub use session::{BackupSession, ChangedRanges, DiskDraft, DiskPlan, PointDraft, StoredDisk};
