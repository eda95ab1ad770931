//! Hyper-V: backup and restore of whole VMs through its management interface.
//!
//! Control and data are two seams. Control is [`Cim`](vmtide_cim::Cim): the VM is found, its disks are
//! fixed by a recovery checkpoint, and what was backed up is sealed by a reference point. Data is
//! [`HostFiles`]: the frozen files are opened on the host itself or over the network. What is built on the
//! two knows neither, so the same cycle runs on the host, from another machine, and against the stand-in
//! host of the tests.

mod config;
mod cycle;
pub mod doctor;
mod files;
#[doc(hidden)]
pub mod fuzzing;
pub mod gates;
mod host;
mod job;
#[cfg(windows)]
mod local;
mod model;
mod restore;
mod select;

pub use config::{
    CapturedFiles, Configuration, capture_files, configuration_files, decode, native_settings,
};
pub use cycle::{DEFAULT_MERGE_WAIT_MS, HypervHypervisor, HypervOptions};
pub use files::{ChangePage, ChangesError, FileEntry, FrozenFile, HostFiles, NewDisk};
pub use host::{Clock, Host, HostOptions, SystemClock, from_cim};
pub use job::JobOutcome;
#[cfg(windows)]
pub use local::LocalFiles;
pub use model::types::{
    BackupType, ControllerKind, DiskAttachment, DiskLocation, Generation, ReferencePointRecord,
    SnapshotKind, SnapshotRecord, VmRecord, VmSettings, VmState,
};
pub use model::{SnapshotRequest, VirtualHardDisk};
pub use restore::HypervRestorer;
