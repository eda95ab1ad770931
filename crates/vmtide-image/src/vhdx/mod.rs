//! VHDX (MS-VHDX).
//!
//! One noun of the specification per file: [`guid`], [`checksum`], [`header`] (file identifier and
//! the two headers), [`region`] (what is where), [`metadata`] and [`locator`] (what the disk is and
//! who its parent is), [`bat`] (where its blocks are), [`log_entry`] and the log they stand in.

#![allow(dead_code, reason = "the reader and the writer are being built on these")]

pub(crate) mod bat;
pub(crate) mod checksum;
pub(crate) mod guid;
pub(crate) mod header;
pub(crate) mod locator;
pub(crate) mod log_entry;
pub(crate) mod metadata;
pub(crate) mod region;

mod allocate;
mod bits;
mod create;
mod flush;
mod log_write;
mod mapping;
mod pages;
mod resize;
mod scan;
mod write;
mod writer;
mod writer_open;
mod zero;

pub use create::{VhdxCreateOptions, VhdxKind, VhdxParent};
pub use writer::VhdxWriter;

use crate::{DiskImage, Format, ImageInfo, ParentLink, Placement};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, Result};

/// An image that is open for reading.
pub enum VhdxImage {}

pub(crate) fn parent_link(file: &dyn BlockDevice) -> Result<Option<ParentLink>> {
    Err(Format::Vhdx.not_supported(file.name()))
}

pub(crate) fn identity(file: &dyn BlockDevice) -> Result<String> {
    Err(Format::Vhdx.not_supported(file.name()))
}

pub(crate) fn info(file: &dyn BlockDevice) -> Result<ImageInfo> {
    Err(Format::Vhdx.not_supported(file.name()))
}

impl VhdxImage {
    /// Opens an image.
    ///
    /// # Errors
    /// Always.
    pub fn open_device(
        file: Arc<dyn BlockDevice>,
        _parent: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        Err(Format::Vhdx.not_supported(file.name()))
    }
}

impl BlockDevice for VhdxImage {
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

impl DiskImage for VhdxImage {
    fn format(&self) -> Format {
        match *self {}
    }
    fn layout(&self, _range: ByteRange) -> Result<Vec<Placement>> {
        match *self {}
    }
}
