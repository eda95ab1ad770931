//! What is done with disk images by themselves, without a repository: looking at them, comparing,
//! creating, keeping their chains, and opening them as sources and targets of other jobs.

pub mod chain;
pub mod check;
pub mod compare;
pub mod create;
pub(crate) mod files;
pub mod info;
pub mod map;
pub(crate) mod open;
pub mod resize;
pub(crate) mod staged;
mod writable;

pub use open::{DiskSpec, OpenDisk, OpenDiskOptions, open_disk};
pub use staged::StagedImage;
pub use vmtide_image::format_by_name;
pub use writable::WritableDisk;
