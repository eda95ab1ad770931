//! A disk on a share that is whole whenever it was flushed.

use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange, Extent, Result, WritableBlockDevice};
use vmtide_image::ImageWriter;

/// An image that each flush leaves as its format wants a closed one to be: a VHDX with an empty log. Whoever writes a
/// disk of a host flushes it at the end and drops it, and the host may open it right after.
pub(crate) struct WholeAtFlush(pub(crate) Arc<dyn ImageWriter>);

impl BlockDevice for WholeAtFlush {
    fn name(&self) -> String {
        self.0.name()
    }
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn block_size_bytes(&self) -> u32 {
        self.0.block_size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.0.extents(range)
    }
}

impl WritableBlockDevice for WholeAtFlush {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(data, offset)
    }
    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.0.write_zeroes(range)
    }
    fn flush(&self) -> Result<()> {
        self.0.finish()
    }
    fn expect_bulk_writes(&self) {
        self.0.expect_bulk_writes();
    }
    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.0.resize(size_bytes)
    }
}
