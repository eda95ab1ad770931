//! The repository: restore points of virtual disks, deduplicated, compressed, encrypted.
//!
//! The format is `docs/repository-format.md`, to the byte. In short: a disk is cut into chunks;
//! new chunks are compressed in frames, sealed and appended to packs; a disk map, kept as a few immutable
//! segments, says where each chunk of the disk is; a restore point names the maps and is the
//! commit. An index segment answers "is this content known?" and nothing else.

/// What is recorded as the writer of an object.
pub(crate) const PROGRAM: &str = concat!("vmtide ", env!("CARGO_PKG_VERSION"));

mod backup;
mod bench;
mod cache;
mod care;
mod condemned;
mod config;
mod context;
mod copy;
mod crypto;
mod disk;
mod document;
mod envelope;
mod error;
mod forget;
#[doc(hidden)]
pub mod fuzzing;
mod hold;
mod id;
mod immutable;
mod index;
mod keys;
mod lease;
mod leb128;
mod map;
mod pack;
mod page_cache;
mod password;
mod point;
mod point_list;
mod record;
mod repository;
mod resolve;
#[cfg(feature = "simulation")]
#[doc(hidden)]
pub mod simulation;
mod store;

pub use backup::{
    BackupOptions, BackupSession, ChangedRanges, DiskDraft, DiskPlan, MAX_COMPRESSION_LEVEL,
    MIN_COMPRESSION_LEVEL, PointDraft, RateLimit, StoredDisk,
};
pub use bench::{
    IndexMeasured, Latency, Measured, StoreBench, measure_index, measure_processor, measure_store,
};
pub use care::{
    Damage, DamagedPlace, Growth, IntegrityReport, PruneOptions, PruneReport, ReadData,
    RepairOptions, RepairReport, SampleReport, UsageReport, VerifyOptions, VerifyReport, VmUsage,
    WaitsFor, check_integrity,
};
pub use config::{Encryption, RepositoryConfig};
pub use copy::CopyOf;
pub use disk::{DamagedPart, PointDisk, SalvagedDisk};
pub use error::{RepoError, Result};
pub use forget::ForgetReport;
pub use hold::{Hold, HoldList, HoldOptions};
pub use id::{BLOCK_BYTES, ChunkId, Location, ObjectId};
pub use immutable::Immutability;
pub use keys::{KdfParameters, KeyList, KeySlotInfo, RecoveryKey, RotatedKey};
pub use lease::{Lease, Purpose};
pub use password::Password;
pub use point::{DiskCounts, DiskRecord, Level, Origin, RestorePoint, TrackingRecord};
pub use repository::{InitOptions, PointList, Repository, RepositoryStats};
pub use store::{
    Corruption, DenyStore, Fault, FaultyStore, LocalStore, MemoryStore, ObjectEntry, ObjectReader,
    ObjectStore, ObjectWriter, Retention, RetentionMode, Step, StepCounts, UNFINISHED_KEPT,
    check_object_name, check_prefix, is_object_name, read_small,
};
