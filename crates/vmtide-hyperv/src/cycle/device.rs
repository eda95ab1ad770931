//! A frozen file that can be closed while others still hold it: its handle must be gone before the checkpoint is
//! converted, or the host cannot merge.

use parking_lot::RwLock;
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, Result};

/// The device of a frozen disk.
pub(crate) struct FrozenDevice {
    name: String,
    size_bytes: u64,
    block_size_bytes: u32,
    inner: RwLock<Option<Arc<dyn BlockDevice>>>,
}

impl FrozenDevice {
    /// `device` under the name that people know.
    pub fn new(name: String, device: Arc<dyn BlockDevice>) -> Self {
        Self {
            name,
            size_bytes: device.size_bytes(),
            block_size_bytes: device.block_size_bytes(),
            inner: RwLock::new(Some(device)),
        }
    }

    /// Closes it. Reads that are under way end first; later ones fail.
    pub fn close(&self) {
        *self.inner.write() = None;
    }

    fn with<T>(&self, read: impl FnOnce(&dyn BlockDevice) -> Result<T>) -> Result<T> {
        match &*self.inner.read() {
            Some(device) => read(device.as_ref()),
            None => Err(BlockError::Disconnected {
                context: self.name.clone(),
                detail: "the frozen state has ended".into(),
            }),
        }
    }
}

impl BlockDevice for FrozenDevice {
    fn name(&self) -> String {
        self.name.clone()
    }
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    fn block_size_bytes(&self) -> u32 {
        self.block_size_bytes
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.with(|device| device.read_at(buffer, offset))
    }
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.with(|device| device.extents(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::MemoryDevice;

    #[test]
    fn a_closed_device_lets_go_of_its_file_and_reads_no_more() {
        let file: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(4096));
        let device = FrozenDevice::new("web scsi0:0".into(), Arc::clone(&file));
        device.read_at(&mut [0; 512], 0).unwrap();
        assert_eq!(device.extents(ByteRange::new(0, 4096)).unwrap().len(), 1);
        device.close();
        assert_eq!(Arc::strong_count(&file), 1);
        let error = device.read_at(&mut [0; 512], 0).unwrap_err().to_string();
        assert!(error.contains("web scsi0:0") && error.contains("ended"), "{error}");
        assert_eq!(device.size_bytes(), 4096);
    }
}
