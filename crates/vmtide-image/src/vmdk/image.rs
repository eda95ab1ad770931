//! A VMDK that is open for reading.

use super::ExtentFiles;
use super::disk::{Disk, Handle};
use crate::{DiskImage, Format, Placement};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, Extent, Result};

/// A VMDK that is open for reading, with all its extent files.
///
/// Any number of threads may read at once, and none waits for another: directories and grain tables
/// come from caches that are arrays of atomic pointers (32 MiB for all extents together), grains
/// are read or decompressed straight into the caller's buffer. The files must not be written by
/// anybody while they are open here.
pub struct VmdkImage {
    disk: Disk,
}

impl VmdkImage {
    /// Opens an image by its descriptor, or by the extent that has the descriptor inside. A sparse
    /// extent without any descriptor is opened as a disk of its own.
    ///
    /// # Errors
    /// [`vmtide_block::BlockError::Damaged`] naming the structure, its offset and the value found;
    /// [`vmtide_block::BlockError::Unsupported`] for raw device mappings, a dirty seSparse journal,
    /// unknown versions, and where a parent is needed and not given; what `files` says.
    pub fn open_device(
        file: Arc<dyn BlockDevice>,
        files: &dyn ExtentFiles,
        parent: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        Ok(Self { disk: Disk::open(Handle::reading(file), files, parent)? })
    }
}

impl BlockDevice for VmdkImage {
    fn name(&self) -> String {
        self.disk.name.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        self.disk.read(buffer, offset)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.check_range(range)?;
        self.disk.extents(range)
    }
}

impl DiskImage for VmdkImage {
    fn format(&self) -> Format {
        Format::Vmdk
    }

    fn layout(&self, range: ByteRange) -> Result<Vec<Placement>> {
        self.check_range(range)?;
        self.disk.layout(range)
    }
}
