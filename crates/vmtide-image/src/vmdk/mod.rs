//! VMDK: VMware's disk format (Virtual Disk Format 5.0), read and written.
//!
//! A disk is described by a **descriptor**, a text that lists **extents**: files that hold the disk
//! one after the other, either as it is (flat) or in **grains** behind tables (sparse). The
//! descriptor is a file of its own, or lies inside the one sparse extent. A child names its parent
//! in the descriptor and knows it again by its **content id** (CID).
//!
//! | module | noun |
//! |---|---|
//! | `descriptor`, `recognise` | the text, and whether a file is one |
//! | `hosted`, `cowd`, `sesparse` | the headers of the three kinds of sparse extents |
//! | `layout`, `map`, `sparse` | from directory and table entries to runs of bytes |
//! | `compressed`, `scan` | stream-optimized grains, and finding them by their markers |
//! | `head`, `disk`, `read`, `image` | opening all files of an image, and reading it |
//! | `describe`, `create` | new descriptors and images |
//! | `check`, `grains` | what is wrong, and repairing it |
//! | `tables`, `sparse_writer`, `stream`, `writer` | writing |
//! | `set_parent` | naming another parent |

mod check;
mod compressed;
mod cowd;
mod create;
mod describe;
mod descriptor;
mod disk;
mod grains;
mod head;
mod hosted;
mod image;
mod info;
mod layout;
mod map;
mod read;
mod recognise;
mod scan;
mod sesparse;
mod set_parent;
mod sparse;
mod sparse_writer;
mod stream;
mod tables;
mod writer;

use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, Result, WritableBlockDevice};

pub(crate) use check::{check, repair};
pub use create::{VmdkCreateOptions, VmdkParent};
pub use describe::VmdkKind;
pub use image::VmdkImage;
pub use info::{identity, info, parent_link};
pub(crate) use recognise::is_descriptor;
#[cfg(test)]
pub(crate) use set_parent::change_parent_in;
pub(crate) use set_parent::{can_set_parent, set_parent};
pub use writer::VmdkWriter;

/// The most sectors of a disk: what a file offset can count.
const MAX_SECTORS: u64 = (i64::MAX as u64) / 512;

/// The other files of an image, opened by whoever may decide which.
pub trait ExtentFiles {
    /// Opens the extent file that the descriptor calls `name`, for reading.
    ///
    /// # Errors
    /// Where it is not there or may not be opened.
    fn open(&self, name: &str) -> Result<Arc<dyn BlockDevice>>;

    /// As [`open`](Self::open), for writing.
    ///
    /// # Errors
    /// As there.
    fn open_writable(&self, name: &str) -> Result<Arc<dyn WritableBlockDevice>>;

    /// What the file `name` is known by, the same for all names of one file; for none, the file that
    /// the image is opened by. `None` where that is not known.
    fn place(&self, name: Option<&str>) -> Option<String> {
        name.map(str::to_owned)
    }
}

/// For images that consist of one file.
struct NoFiles;

impl ExtentFiles for NoFiles {
    fn open(&self, name: &str) -> Result<Arc<dyn BlockDevice>> {
        Err(BlockError::io(name, std::io::ErrorKind::NotFound))
    }

    fn open_writable(&self, name: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        Err(BlockError::io(name, std::io::ErrorKind::NotFound))
    }
}
