//! The management objects that backup and restore need, as typed records, and the calls on them.

mod changes;
pub(crate) mod codes;
pub(crate) mod disks;
mod points;
pub(crate) mod read;
pub(crate) mod schema;
mod snapshots;
pub mod types;
mod vhd;
pub(crate) mod vms;

pub(crate) use points::point_path;
pub(crate) use snapshots::NotMade;
pub use snapshots::SnapshotRequest;
pub use vhd::VirtualHardDisk;
