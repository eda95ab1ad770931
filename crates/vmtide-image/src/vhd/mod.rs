//! VHD (Virtual Hard Disk Image Format Specification 1.0, Microsoft 2006): Virtual PC's, Hyper-V's
//! older and Azure's format.
//!
//! A **fixed** VHD is the bytes of the disk and a footer. A **dynamic** one has a table of blocks
//! of usually 2 MiB that are allocated when they are written; a **differencing** one is dynamic and
//! has, in a bitmap in front of each block, a bit per sector that says whether the sector is its
//! own or the parent's. All numbers are big-endian. The largest disk is 2040 GiB.

mod bitmap;
mod check;
mod create;
mod flush;
mod footer;
mod geometry;
mod grow;
mod header;
mod image;
mod info;
mod parent;
mod read;
mod set_parent;
mod write;
mod writer;

pub(crate) use check::{check, repair};
pub(crate) use create::create;
pub use create::{MAX_DISK_BYTES, VhdCreateOptions, VhdKind, VhdParent};
pub(crate) use footer::checksum;
pub use image::VhdImage;
pub(crate) use info::{identity, info};
pub(crate) use parent::parent_link;
pub(crate) use set_parent::set_parent;
pub use writer::VhdWriter;
