//! VMDK: VMware's disk format (Virtual Disk Format 5.0), read and written.
//!
//! A disk is described by a **descriptor**, a text that lists **extents**: files that hold the disk
//! one after the other, either as it is (flat) or in **grains** behind tables (sparse). The
//! descriptor is a file of its own, or lies inside the one sparse extent. A child names its parent
//! in the descriptor and knows it again by its **content id** (CID).
//!
//! | module | noun |
//! |---|---|
//! | `descriptor` | the text |
//! | `hosted`, `cowd`, `sesparse` | the headers of the three kinds of sparse extents |
//! | `layout`, `map`, `sparse` | from directory and table entries to runs of bytes |
//! | `compressed`, `scan` | stream-optimized grains, and finding them by their markers |
//! | `head`, `disk`, `read`, `image` | opening all files of an image, and reading it |

#![allow(dead_code, reason = "for the writer, which follows")]

mod compressed;
mod cowd;
mod descriptor;
mod disk;
mod head;
mod hosted;
mod image;
mod info;
mod layout;
mod map;
mod read;
mod scan;
mod sesparse;
mod sparse;

use crate::{Format, ImageWriter};
use std::sync::Arc;
use vmtide_block::{BlockDevice, Result, WritableBlockDevice};

pub use image::VmdkImage;
pub use info::{identity, info, parent_link};

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
}

/// An image that is open for writing.
pub enum VmdkWriter {}

impl VmdkWriter {
    /// Opens an image.
    ///
    /// # Errors
    /// Always.
    pub fn open_device(
        file: Arc<dyn WritableBlockDevice>,
        _files: &dyn ExtentFiles,
        _parent: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        Err(Format::Vmdk.not_supported(file.name()))
    }
}

impl BlockDevice for VmdkWriter {
    fn name(&self) -> String {
        match *self {}
    }
    fn size_bytes(&self) -> u64 {
        match *self {}
    }
    fn read_at(&self, _buffer: &mut [u8], _offset: u64) -> Result<()> {
        match *self {}
    }
}

impl WritableBlockDevice for VmdkWriter {
    fn write_at(&self, _data: &[u8], _offset: u64) -> Result<()> {
        match *self {}
    }
    fn write_zeroes(&self, _range: vmtide_block::ByteRange) -> Result<()> {
        match *self {}
    }
    fn flush(&self) -> Result<()> {
        match *self {}
    }
}

impl ImageWriter for VmdkWriter {}
