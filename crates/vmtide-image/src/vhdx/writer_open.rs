//! Opening an existing VHDX for writing.

use super::bat::Geometry;
use super::header::{Headers, read_creator};
use super::log_write::Journal;
use super::metadata::{Metadata, VIRTUAL_DISK_SIZE};
use super::region::Regions;
use super::writer::{Parts, VhdxWriter};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, Result, WritableBlockDevice};

impl VhdxWriter {
    /// Opens an existing image for writing, over any device. A log that is not empty is replayed
    /// into the file first.
    ///
    /// `parent` is the opened parent of a differencing image; others ignore it.
    ///
    /// # Errors
    /// [`BlockError::Damaged`] where a structure breaks the specification;
    /// [`BlockError::Unsupported`] where the image needs what is not known here, or a parent that
    /// was not given.
    pub fn open_device(
        file: Arc<dyn WritableBlockDevice>,
        parent: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        read_creator(&*file)?;
        let headers = Headers::read(&*file)?;
        if headers.current.is_log_dirty() {
            return Err(BlockError::unsupported(file.name(), "its log must be replayed first"));
        }
        let log = headers.current.log;
        let regions = Regions::read(&*file, log)?;
        let (metadata, table) = Metadata::read(&*file, regions.metadata)?;
        let geometry = Geometry::of(&metadata);
        if geometry.table_bytes() > regions.bat.length {
            return Err(BlockError::damaged(
                file.name(),
                format!(
                    "the block table region at {:#x} has {} bytes, a disk of {} bytes needs {}",
                    regions.bat.offset,
                    regions.bat.length,
                    metadata.disk_size_bytes,
                    geometry.table_bytes()
                ),
            ));
        }
        if metadata.has_parent && parent.is_none() {
            return Err(BlockError::unsupported(
                file.name(),
                "is a differencing image whose parent was not opened; allow it or name it",
            ));
        }
        let size_item = table.find(VIRTUAL_DISK_SIZE).map_or(0, |entry| entry.range.offset);
        Ok(Self::assemble(Parts {
            parent: parent.filter(|_| metadata.has_parent),
            geometry,
            keeps_blocks: metadata.leave_blocks_allocated,
            size_item,
            regions: regions.table,
            journal: Journal::new(headers),
            file,
        }))
    }
}
