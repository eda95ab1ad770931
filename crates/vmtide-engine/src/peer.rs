//! An NBD export as a job sees it: what the other side does wrong is the other side's.
//!
//! The NBD client calls an answer that breaks the protocol damaged, as every reader of foreign
//! bytes does. To a user damage means that data of a backup is lost, which nonsense on a socket is
//! not; so here it becomes an error of the connection, at connecting and in every request after.

use crate::{EngineError, Result};
use std::io::ErrorKind;
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, Extent, Result as BlockResult, WritableBlockDevice,
};
use vmtide_hypervisor::HypervisorError;
use vmtide_nbd::{NbdDevice, NbdOptions, NbdUrl};

/// A connected export.
pub(crate) struct NbdPeer(NbdDevice);

impl NbdPeer {
    /// Connects.
    ///
    /// # Errors
    /// As [`NbdDevice::connect`]; [`HypervisorError::Protocol`] where the server does not speak the
    /// protocol.
    pub fn connect(url: &NbdUrl, options: &NbdOptions) -> Result<Self> {
        match NbdDevice::connect(url, options) {
            Ok(device) => Ok(Self(device)),
            Err(BlockError::Damaged { detail, .. }) => {
                Err(EngineError::Hypervisor(HypervisorError::protocol(url.to_string(), detail)))
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn of_peer(error: BlockError) -> BlockError {
    match error {
        BlockError::Damaged { context, detail } => {
            BlockError::io(context, std::io::Error::new(ErrorKind::InvalidData, detail))
        }
        other => other,
    }
}

impl BlockDevice for NbdPeer {
    fn name(&self) -> String {
        self.0.name()
    }
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn block_size_bytes(&self) -> u32 {
        self.0.block_size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> BlockResult<()> {
        self.0.read_at(buffer, offset).map_err(of_peer)
    }
    fn extents(&self, range: ByteRange) -> BlockResult<Vec<Extent>> {
        self.0.extents(range).map_err(of_peer)
    }
}

impl WritableBlockDevice for NbdPeer {
    fn write_at(&self, data: &[u8], offset: u64) -> BlockResult<()> {
        self.0.write_at(data, offset).map_err(of_peer)
    }
    fn write_zeroes(&self, range: ByteRange) -> BlockResult<()> {
        self.0.write_zeroes(range).map_err(of_peer)
    }
    fn flush(&self) -> BlockResult<()> {
        self.0.flush().map_err(of_peer)
    }
    fn resize(&self, size_bytes: u64) -> BlockResult<()> {
        self.0.resize(size_bytes).map_err(of_peer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_of_a_peer_is_no_damage() {
        let error = of_peer(BlockError::damaged("nbd://host/x", "a reply to no request"));
        assert_eq!(error.io_kind(), Some(ErrorKind::InvalidData));
        assert_eq!(error.to_string(), "nbd://host/x: a reply to no request");
        assert!(matches!(of_peer(BlockError::Cancelled), BlockError::Cancelled));
    }
}
