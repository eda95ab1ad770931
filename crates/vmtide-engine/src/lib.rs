//! The jobs of vmtide, one file per job: [`backup()`], [`restore()`], [`verify()`],
//! [`retention`], [`prune()`], [`convert()`], [`serve`], [`delta`], [`doctor`]; and what is done with disk
//! [`image`]s by themselves.
//!
//! A job is a function over a repository and a source or target, which it gets as traits and plain
//! structs. It prints nothing and asks nothing: what it does goes to an [`Observer`], how far it
//! is to a [`Progress`](vmtide_block::Progress), and it ends early when its
//! [`CancelToken`](vmtide_block::CancelToken) says so. What it returns serialises to what `--json`
//! shows. Jobs block the calling thread; several may run at once.

pub mod agent;
mod backup;
mod base;
mod bench;
mod changes;
mod compressed;
mod convert;
mod copy;
mod copy_ranges;
pub mod cost;
mod damage;
pub mod delta;
pub mod doctor;
mod error;
mod events;
mod exclusions;
pub mod hyperv;
mod identity;
pub mod image;
mod in_use;
mod located;
mod lock;
mod many;
pub mod partitions;
mod peer;
mod places;
mod points;
mod prune;
mod qemu;
mod repair;
mod restore;
mod restore_target;
mod restore_vm;
mod restore_vm_target;
pub mod retention;
mod sample;
pub mod serve;
pub mod source;
mod target;
pub mod track;
mod verify;

pub use backup::{BackupJob, BackupSummary, DiskSummary, LevelChoice, backup, host_name, lineage};
pub use bench::{BenchJob, BenchSummary, bench};
pub use convert::{ConvertJob, ConvertSummary, convert};
pub use copy::{CopiedDisk, CopiedPoint, CopyJob, CopySummary, PresentPoint, UncopiedPoint, copy};
pub use error::{EngineError, Result};
pub use events::{Event, JobContext, Observer, Phase, Silent};
pub use located::{LocatedDamage, LocatedPartition, LocatedPlace, TouchedParts, locate_damage};
pub use many::{Limits, run_limited};
pub use places::state_directory;
pub use points::{
    DiskChange, DiskDifference, PartitionBytes, damaged_bytes, diff, forget, points, resolve,
};
pub use prune::prune;
pub use repair::repair;
pub use restore::{RestoreJob, RestoreSummary, RestoreTarget, RestoredDisk, restore};
pub use restore_vm::{NewVmOptions, RestoreVmJob, RestoreVmSummary, VmTarget, restore_vm};
pub use restore_vm_target::{OpenVmTarget, VmTargetOptions, is_vm_target, open_vm_target};
pub use target::{Durability, ImageKind};
pub use verify::{check_integrity, verify};
pub use vmtide_guestfs::{FilesAt, FoundFile};
