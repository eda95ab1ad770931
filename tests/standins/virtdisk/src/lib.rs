//! A stand-in for `virtdisk.dll`, for tests only: the documented interface over image files and tracking of
//! our own, with the faults that the documentation names. Empty on systems other than Windows.
//!
//! It lies beside the program under test, which loads it instead of the system's. What is like the real one:
//! functions, structures, error codes, the forms of answers, one attachment per disk, nothing to read before the
//! disk is attached, and reading and writing through the handle itself or through the path of its device.
//!
//! What is not, because a library cannot be a driver:
//!
//! * a handle is that of a file with the content of the disk, filled when it is attached; the path of the
//!   device is the path of that file. So attaching takes as long as reading the disk;
//! * what is written comes into the image when the disk is *detached*, where it differs, in blocks of 64 KiB;
//! * closing an attached handle without detaching it loses what was written;
//! * sectors are not enforced: a request that is not of whole sectors succeeds here. `vmtide-virtdisk-ffi` refuses it
//!   before it comes here;
//! * nothing is frozen or merged, and no machine holds a disk unless a fault says so.
//!
//! `VMTIDE_STANDIN_DIR` names a directory for the files behind handles. Each is there as long as its handle is
//! open, so a test sees by listing it which handles are left. `VMTIDE_STANDIN_FAULTS` names a file of
//! [`faults`], which is read at every call.

#[cfg(windows)]
mod calls;
#[cfg(windows)]
mod content;
#[cfg(windows)]
mod describe;
pub mod faults;
#[cfg(windows)]
mod registry;
#[cfg(windows)]
mod tracking;
