//! QEMU as a source of backups, through its own interfaces: the machine monitor (QMP), dirty
//! bitmaps, the guest agent and QEMU's NBD server.
//!
//! [`QemuVm`] is one running VM. Freezing it takes, in this order: the guest agent's file system
//! freeze, a pause of milliseconds where several disks must share one moment, new dirty bitmaps
//! and a copy-before-write view of every disk, and the release of the guest; everything slower is
//! done before or after. The disks are then read over NBD while the guest runs on. What is made
//! in QEMU carries our name and the job's id, is written to the journal before, and is removed by
//! [`commit`](vmtide_hypervisor::FrozenVm::commit), [`abort`](vmtide_hypervisor::FrozenVm::abort)
//! or the next job's [`reap`](vmtide_hypervisor::Hypervisor::reap). Only the tracking bitmaps stay.
//!
//! [`OfflineImage`] is a VM that is powered off: the same bitmaps, read from its image.
//!
//! All of it goes over Unix sockets; on Windows the crate is empty.

#![cfg(unix)]

pub mod agent;
mod channel;
mod cleanup;
mod describe;
mod export;
mod freeze;
mod frozen;
pub mod guardian;
mod hold;
mod inventory;
mod moment;
mod names;
mod offline;
mod plan;
mod process;
pub mod qmp;
mod scratch;
mod session;
mod steps;
mod target;
mod vm;
mod watch;

pub use channel::Address;
pub use offline::OfflineImage;
pub use target::{FreezeMethod, QemuTarget};
pub use vm::QemuVm;
