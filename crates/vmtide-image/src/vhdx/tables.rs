//! Everything of an image but its blocks: what is read, and checked, when it is opened.

use super::bat::Geometry;
use super::header::Headers;
use super::metadata::{Metadata, MetadataTable};
use super::region::Regions;
use super::replay::Replayed;
use crate::ParentLink;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result};

/// The checked structures of an image, the BAT's entries and the blocks left out. Small, whatever
/// the disk: opening reads some 300 KiB.
#[derive(Clone, Debug)]
pub(crate) struct Tables {
    /// The headers.
    pub(crate) headers: Headers,
    /// Where everything is.
    pub(crate) regions: Regions,
    /// What the disk is.
    pub(crate) metadata: Metadata,
    /// All metadata items, the unknown ones, too.
    pub(crate) items: MetadataTable,
    /// The arithmetic of the BAT.
    pub(crate) geometry: Geometry,
}

impl Tables {
    /// Reads the structures of `file`, whose log is empty or laid over it.
    ///
    /// # Errors
    /// As [`Regions::read`] and [`Metadata::read`]; [`BlockError::Damaged`] where the BAT's region
    /// is too small for the disk or not inside the file.
    pub(crate) fn read(file: &dyn BlockDevice, headers: Headers) -> Result<Self> {
        // Where an empty log is does not matter to a reader.
        let is_dirty = headers.current.is_log_dirty();
        let log = if is_dirty { headers.current.log } else { ByteRange::new(0, 0) };
        let regions = Regions::read(file, log)?;
        let (metadata, items) = Metadata::read(file, regions.metadata)?;
        let geometry = Geometry::of(&metadata);
        let tables = Self { headers, regions, metadata, items, geometry };
        let (region, bat) = (tables.regions.bat, tables.bat());
        if bat.length > region.length || bat.end() > file.size_bytes() {
            return Err(BlockError::damaged(
                file.name(),
                format!(
                    "BAT at {:#x}: a disk of {} bytes in blocks of {} needs {} bytes of table, \
                     which must be inside its region of {} bytes and the file of {} bytes",
                    region.offset,
                    geometry.disk_size_bytes,
                    geometry.block_bytes(),
                    bat.length,
                    region.length,
                    file.size_bytes()
                ),
            ));
        }
        Ok(tables)
    }

    /// Reads the structures of a file whose log may hold changes, which are laid over it.
    ///
    /// # Errors
    /// As [`read`](Self::read), and those of replaying the log.
    pub(crate) fn replayed<D: BlockDevice>(file: D) -> Result<(Self, Replayed<D>)> {
        let headers = Headers::read(&file)?;
        let replayed = Replayed::open(file, &headers)?;
        Ok((Self::read(&replayed, headers)?, replayed))
    }

    /// Where the entries of the BAT are; its region may be longer.
    pub(crate) fn bat(&self) -> ByteRange {
        ByteRange::new(self.regions.bat.offset, self.geometry.table_bytes())
    }

    /// How a differencing image names its parent.
    pub(crate) fn parent_link(&self) -> Option<ParentLink> {
        self.metadata.parent_locator.as_ref().map(|locator| locator.link())
    }
}
