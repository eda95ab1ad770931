//! VMDK (Virtual Disk Format 5.0).

use crate::{DiskImage, Format, ImageInfo, ImageWriter, ParentLink, Placement};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, Result, WritableBlockDevice};

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

/// An image that is open for reading.
pub enum VmdkImage {}

/// An image that is open for writing.
pub enum VmdkWriter {}

pub(crate) fn parent_link(file: &dyn BlockDevice) -> Result<Option<ParentLink>> {
    Err(Format::Vmdk.not_supported(file.name()))
}

pub(crate) fn identity(file: &dyn BlockDevice) -> Result<String> {
    Err(Format::Vmdk.not_supported(file.name()))
}

pub(crate) fn info(file: &dyn BlockDevice) -> Result<ImageInfo> {
    Err(Format::Vmdk.not_supported(file.name()))
}

impl VmdkImage {
    /// Opens an image.
    ///
    /// # Errors
    /// Always.
    pub fn open_device(
        file: Arc<dyn BlockDevice>,
        _files: &dyn ExtentFiles,
        _parent: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        Err(Format::Vmdk.not_supported(file.name()))
    }
}

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

impl BlockDevice for VmdkImage {
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

impl DiskImage for VmdkImage {
    fn format(&self) -> Format {
        match *self {}
    }
    fn layout(&self, _range: ByteRange) -> Result<Vec<Placement>> {
        match *self {}
    }
}

impl WritableBlockDevice for VmdkWriter {
    fn write_at(&self, _data: &[u8], _offset: u64) -> Result<()> {
        match *self {}
    }
    fn write_zeroes(&self, _range: ByteRange) -> Result<()> {
        match *self {}
    }
    fn flush(&self) -> Result<()> {
        match *self {}
    }
}

impl ImageWriter for VmdkWriter {}
