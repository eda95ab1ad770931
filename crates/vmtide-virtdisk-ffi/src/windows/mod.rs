//! The calls themselves.
//!
//! Handles are owned ([`std::os::windows::io::OwnedHandle`]) and closed once. No call keeps a pointer after it
//! returned but overlapped input and output, which [`overlapped`] waits for before it gives a buffer back.

mod attach;
mod create;
mod disk;
mod overlapped;
mod physical_drive;
mod privilege;

pub use attach::{AttachedDisk, ReadRoute};
pub use create::NewVirtualDisk;
pub use disk::{DiskAccess, VirtualDisk};
