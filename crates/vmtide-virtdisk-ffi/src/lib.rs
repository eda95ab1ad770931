//! The virtual disk interface of Windows (`virtdisk.dll`) as safe, typed calls.
//!
//! The interface is 25 C functions with unions, buffers of unknown length and error codes of its own. Here a
//! [`VirtualDisk`] is opened by path, says what it is, switches change tracking on and off, answers what
//! changed since a tracking id, and is attached as a [`BlockDevice`](vmtide_block::BlockDevice).
//!
//! What can be decided without Windows is decided in modules that compile and are tested everywhere:
//!
//! * [`error`] every error code of the interface with what it means, what to do, and the class a caller acts on;
//! * [`info`] the answers of `GetVirtualDiskInformation`, which are buffers with strings of any length;
//! * [`changes`] the pages of `QueryChangesVirtualDisk` and everything that can be wrong with them;
//! * [`sectors`] requests of any offset and length over a medium that takes whole sectors only;
//! * [`tracking_id`], [`guid`], [`wide`] the forms of ids, GUIDs and strings.
//!
//! The calls themselves exist on Windows only. Facts come from the public documentation of virtdisk.h and of
//! the service control manager; the layouts are those of `windows-sys`.

pub mod changes;
pub mod error;
#[doc(hidden)]
pub mod fuzzing;
pub mod guid;
pub mod info;
pub mod sectors;
pub mod tracking_id;
pub mod wide;
pub mod zeros;

#[cfg(windows)]
mod windows;

pub use changes::{ChangeQuery, ChangesPage, RawAnswer, RawRange, for_each_change, read_page};
pub use error::{ErrorKind, KnownError, VirtdiskError, known_error};
pub use guid::Guid;
pub use info::{ChangeTracking, ParentLocation, PhysicalSectors, Size, StorageType};
pub use sectors::{SectorDevice, SectorIo};
pub use tracking_id::TrackingId;
#[cfg(windows)]
pub use windows::{AttachedDisk, DiskAccess, NewVirtualDisk, ReadRoute, VirtualDisk};

/// The result of a call.
pub type Result<T, E = VirtdiskError> = std::result::Result<T, E>;
