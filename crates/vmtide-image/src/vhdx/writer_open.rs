//! Opening an existing VHDX for writing.

use super::header::{Headers, read_creator};
use super::log_write::Journal;
use super::metadata::VIRTUAL_DISK_SIZE;
use super::replay::replay_onto;
use super::tables::Tables;
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
    /// [`BlockError::Damaged`] where a structure breaks the specification, or the log is where
    /// writing it would destroy something else;
    /// [`BlockError::Unsupported`] where the image needs what is not known here, or a parent that
    /// was not given.
    pub fn open_device(
        file: Arc<dyn WritableBlockDevice>,
        parent: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self> {
        read_creator(&*file)?;
        let mut headers = Headers::read(&*file)?;
        replay_onto(&*file, &mut headers)?;
        let Tables { headers, regions, metadata, items, geometry } = Tables::read(&*file, headers)?;
        if metadata.has_parent && parent.is_none() {
            return Err(BlockError::unsupported(
                file.name(),
                "is a differencing image whose parent was not opened; allow it (backing policy) \
                 if you trust the image, or give the directory it is in (--search DIR)",
            ));
        }
        let size_item = items.find(VIRTUAL_DISK_SIZE).map_or(0, |entry| entry.range.offset);
        Ok(Self::assemble(Parts {
            parent: parent.filter(|_| metadata.has_parent),
            geometry,
            // The flag means nothing in a differencing image (MS-VHDX 2.6.2.1).
            keeps_blocks: metadata.leave_blocks_allocated && !metadata.has_parent,
            size_item,
            journal: Journal::open(&*file, headers, &regions.table)?,
            regions: regions.table,
            file,
        }))
    }
}
