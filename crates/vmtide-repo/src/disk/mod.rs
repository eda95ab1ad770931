//! Disks of restore points, read back.
//!
//! A [`PointDisk`] is a block device like any other: restore copies it, verify reads it, a server
//! exports it. It needs the disk map and packs, never the index.

mod forward;
mod packs;
mod point_disk;

pub(crate) use forward::{Forward, Move, write_forward};
pub(crate) use packs::{PackSet, Place};
pub use point_disk::PointDisk;
