//! The port between vmtide's jobs and a virtualisation platform.
//!
//! A platform (QEMU, Hyper-V, vSphere, or a plain image file) is anything that implements
//! [`Hypervisor`]. A backup asks it to [`freeze`](Hypervisor::freeze) a VM and gets a
//! [`FrozenVm`]: the configuration and all disks at one moment, each disk with what changed since
//! the tracking id it was given. When all is read the job lets it [`seal`](FrozenVm::seal) the moment; when the
//! restore point is committed the job calls
//! [`commit`](FrozenVm::commit), otherwise [`abort`](FrozenVm::abort), exactly one of the two;
//! either leaves nothing behind on the platform but the tracking that the next incremental needs.
//! What a killed process left is removed by [`reap`](Hypervisor::reap), which works from the
//! [`Journal`] written before anything was made.
//!
//! A platform that VMs can be restored to is a [`VmRestorer`] as well.
//!
//! The calls block. A `Hypervisor` may be shared by threads; a `FrozenVm` belongs to one job.

mod config;
mod consistency;
mod error;
mod frozen;
mod health;
mod image_source;
mod journal;
mod lock;
pub mod remote;
mod report;
mod restore;
mod select;
mod tracking;

pub use config::{
    ControllerConfig, DiskBus, DiskConfig, DynamicMemory, Firmware, NativeFile,
    NetworkAdapterConfig, VmConfig,
};
pub use consistency::Consistency;
pub use error::{HypervisorError, Result};
pub use frozen::{
    Base, FreezeRequest, FrozenDisk, FrozenVm, Hypervisor, ReapReport, Seal, VmSummary,
};
pub use health::{HealthCheck, HealthState};
pub use image_source::ImageSource;
pub use journal::{JobId, Journal, JournalEntry};
pub use lock::VmLock;
pub use report::{ErrorCode, ErrorReport};
pub use restore::{
    DiskContent, DiskToRestore, InPlaceRequest, NetworkPlan, NewVmRequest, RestoreRoute,
    RestoredVm, RestoringDisk, RestoringVm, VmIdentity, VmRestorer,
};
pub use select::{VmSelector, volume_of};
pub use tracking::{Changes, DiskId, FullReason, TrackingId};
