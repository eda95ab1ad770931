//! The fingerprint of a whole disk: certainty about a base, for the price of reading it.

use crate::Result;
use vmtide_block::{
    AlignedBuffer, BlockDevice, ByteRange, CancelToken, ExtentKind, Progress, for_each_extent,
};

/// The size of one read, in bytes.
const BUFFER_BYTES: usize = 1 << 20;

/// BLAKE3 of all bytes of a disk of `size_bytes`, of which `device` has as many or, where its format
/// rounds up, some more. Progress counts bytes of disk.
///
/// # Errors
/// Those of reading; [`vmtide_block::BlockError::OutOfRange`] where the device is smaller.
pub fn fingerprint(
    device: &dyn BlockDevice,
    size_bytes: u64,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<[u8; 32]> {
    let whole = ByteRange::new(0, size_bytes);
    device.check_range(whole)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = AlignedBuffer::new(BUFFER_BYTES);
    let zeros = vec![0; BUFFER_BYTES];
    for_each_extent(device, whole, cancel, |extent| {
        let mut at = extent.range.offset;
        while at < extent.range.end() {
            cancel.check()?;
            let length =
                usize::try_from(extent.range.end() - at).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
            if extent.kind == ExtentKind::Data {
                device.read_at(&mut buffer[..length], at)?;
                hasher.update(&buffer[..length]);
            } else {
                hasher.update(&zeros[..length]);
            }
            at += length as u64;
            progress.add_done(length as u64);
        }
        Ok(())
    })?;
    Ok(*hasher.finalize().as_bytes())
}
