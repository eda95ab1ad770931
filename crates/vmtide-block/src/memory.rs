//! A disk in memory: the model that tests hold real devices against, and a target for small work.

use crate::{
    BlockDevice, BlockError, ByteRange, Extent, ExtentKind, Result, WritableBlockDevice, is_zero,
    push_extent,
};
use parking_lot::RwLock;

/// The unit in which [`MemoryDevice`] reports extents.
const EXTENT_UNIT: usize = 4096;

/// A disk held in memory, all of it.
#[derive(Debug, Default)]
pub struct MemoryDevice {
    bytes: RwLock<Vec<u8>>,
}

impl MemoryDevice {
    /// A disk of `size_bytes` zeros.
    pub fn new(size_bytes: usize) -> Self {
        Self::from_bytes(vec![0; size_bytes])
    }

    /// A disk with this content.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { bytes: RwLock::new(bytes) }
    }

    /// A copy of the content.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.bytes.read().clone()
    }

    fn bounds(&self, range: ByteRange) -> Result<std::ops::Range<usize>> {
        self.check_range(range)?;
        let bound = |value: u64| {
            usize::try_from(value)
                .map_err(|_| BlockError::unsupported(self.name(), "disk larger than memory"))
        };
        Ok(bound(range.offset)?..bound(range.end())?)
    }
}

impl BlockDevice for MemoryDevice {
    fn name(&self) -> String {
        "memory".into()
    }

    fn size_bytes(&self) -> u64 {
        self.bytes.read().len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let bounds = self.bounds(ByteRange::new(offset, buffer.len() as u64))?;
        buffer.copy_from_slice(&self.bytes.read()[bounds]);
        Ok(())
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let bounds = self.bounds(range)?;
        let bytes = self.bytes.read();
        let mut extents = Vec::new();
        let mut at = bounds.start;
        while at < bounds.end {
            let end = (at + EXTENT_UNIT - at % EXTENT_UNIT).min(bounds.end);
            let kind = if is_zero(&bytes[at..end]) { ExtentKind::Zero } else { ExtentKind::Data };
            push_extent(&mut extents, Extent::new(at as u64, (end - at) as u64, kind));
            at = end;
        }
        Ok(extents)
    }
}

impl WritableBlockDevice for MemoryDevice {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        let bounds = self.bounds(ByteRange::new(offset, data.len() as u64))?;
        self.bytes.write()[bounds].copy_from_slice(data);
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        let bounds = self.bounds(range)?;
        self.bytes.write()[bounds].fill(0);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        let size = usize::try_from(size_bytes)
            .map_err(|_| BlockError::unsupported(self.name(), "disk larger than memory"))?;
        self.bytes.write().resize(size, 0);
        Ok(())
    }
}
