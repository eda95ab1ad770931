//! What all open images have in common, whatever their format.
//!
//! [`DiskImage`] is one layer open for reading: a block device that also says where in its own file
//! the bytes of a range are. [`ImageWriter`] is one open for writing: a block device with an end.
//! [`CompressedWriter`] is the second way into images whose clusters are written once, compressed.

use crate::Format;
use serde::{Deserialize, Serialize};
use std::path::Path;
use vmtide_block::{BlockDevice, ByteRange, ExtentKind, RawDevice, Result, WritableBlockDevice};

/// Where one range of a virtual disk is in one layer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The bytes of the virtual disk.
    #[serde(flatten)]
    pub range: ByteRange,
    /// What this layer holds there; [`ExtentKind::Unallocated`] is the parent's, or zero.
    pub kind: ExtentKind,
    /// Where the range's first byte is in the image's own file, in bytes; none where it is not
    /// stored as it is (zero, unallocated, compressed) or lies in another file of the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_offset: Option<u64>,
    /// Whether the range is stored compressed.
    #[serde(default)]
    pub compressed: bool,
}

/// An image that is open for reading, with the parent it reads through.
///
/// As a [`BlockDevice`] it is the whole chain from here down. Any number of threads may read.
pub trait DiskImage: BlockDevice {
    /// The format of this layer.
    fn format(&self) -> Format;

    /// Where the bytes of `range` are in *this layer*, parents not asked. The answer covers a
    /// prefix of the range, by the rules of [`BlockDevice::extents`].
    ///
    /// # Errors
    /// As [`BlockDevice::extents`].
    fn layout(&self, range: ByteRange) -> Result<Vec<Placement>>;
}

/// An image that is open for writing.
pub trait ImageWriter: WritableBlockDevice {
    /// Ends the writing: everything is flushed and the file is left as its format wants a closed
    /// image to be (VHDX: empty log; streamOptimized VMDK: tables and footer). Without it the image
    /// is what a crash would have left: valid where the format can be, with all that was flushed.
    /// Writes after it are errors or reopen the image, by format.
    ///
    /// # Errors
    /// What the medium says; the image is then as after a crash.
    fn finish(&self) -> Result<()> {
        self.flush()
    }

    /// What the image will say of itself for its children once it is changed
    /// ([`crate::identity`]), where a change makes it say something else and none was made yet.
    /// Children that are told before the change know the image at every moment.
    ///
    /// # Errors
    /// Where no new identity can be made.
    fn next_identity(&self) -> Result<Option<String>> {
        Ok(None)
    }

    /// Makes this new image hold all that the raw file at `source` holds, by sharing its blocks where
    /// this is a raw file as well and the file system can; answers whether that was so.
    ///
    /// # Errors
    /// Where `source` cannot be opened.
    fn share_blocks_of(&self, _source: &Path) -> Result<bool> {
        Ok(false)
    }

    /// The way to write compressed clusters, for images that were created for it.
    fn compressed(&self) -> Option<&dyn CompressedWriter> {
        None
    }
}

/// Writing clusters that are compressed by many threads and appended by one at a time.
pub trait CompressedWriter: Send + Sync {
    /// The bytes of disk that are compressed together; a power of two.
    fn cluster_bytes(&self) -> u64;

    /// Compresses one cluster of data (shorter only at the end of the disk). Takes no lock: called
    /// by many threads at once.
    ///
    /// # Errors
    /// [`vmtide_block::BlockError::Unsupported`] where the compressor refuses.
    fn compress(&self, data: &[u8]) -> Result<CompressedCluster>;

    /// Appends the cluster that begins at byte `offset` of the disk. Each cluster is appended at
    /// most once, in ascending order of offset, by one thread at a time.
    ///
    /// # Errors
    /// As [`WritableBlockDevice::write_at`].
    fn append(&self, offset: u64, cluster: CompressedCluster) -> Result<()>;
}

/// A cluster that is ready to be appended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CompressedCluster {
    /// The compressed bytes.
    Compressed(Vec<u8>),
    /// The bytes as they are: compression would not have made them smaller.
    Plain(Vec<u8>),
}

impl DiskImage for RawDevice {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn layout(&self, range: ByteRange) -> Result<Vec<Placement>> {
        let place = |extent: vmtide_block::Extent| Placement {
            range: extent.range,
            kind: extent.kind,
            file_offset: (extent.kind == ExtentKind::Data).then_some(extent.range.offset),
            compressed: false,
        };
        Ok(self.extents(range)?.into_iter().map(place).collect())
    }
}

impl ImageWriter for RawDevice {
    fn share_blocks_of(&self, source: &Path) -> Result<bool> {
        Self::share_blocks_of(self, source)
    }
}

/// Appends a placement, joining it with the last one where both the disk and the file go on. Empty
/// ones vanish.
pub(crate) fn push_placement(placements: &mut Vec<Placement>, next: Placement) {
    if next.range.is_empty() {
        return;
    }
    if let Some(last) = placements.last_mut()
        && last.kind == next.kind
        && last.compressed == next.compressed
        && last.range.end() == next.range.offset
        && last.file_offset.map(|offset| offset + last.range.length) == next.file_offset
    {
        last.range.length += next.range.length;
    } else {
        placements.push(next);
    }
}
