//! The management objects that backup and restore need, as typed records, and the calls on them.

mod changes;
pub(crate) mod codes;
mod disks;
mod points;
mod read;
mod snapshots;
pub mod types;
mod vms;

pub use snapshots::SnapshotRequest;
