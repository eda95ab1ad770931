//! The block device traits.
//!
//! Positional, `&self`, `Send + Sync`: one big disk is read by many workers at once, so no
//! implementation may hold a lock across a whole read. Implementations that talk to a peer bring
//! as many requests in flight as they have callers.

use crate::{BlockError, ByteRange, CancelToken, Extent, Result};

/// A virtual disk that can be read.
///
/// # Contract for implementations
/// The bytes come from disk images, networks and hypervisors and are hostile: no call may panic,
/// hang for ever, or allocate by a length that was not checked against the device's size.
pub trait BlockDevice: Send + Sync {
    /// The device as a person knows it, a path or a URL without secrets; for errors and logs.
    fn name(&self) -> String;

    /// The size in bytes. Need not be a multiple of any block size.
    fn size_bytes(&self) -> u64;

    /// The smallest unit of writing without read-modify-write, in bytes: 512 or 4096 for most.
    fn block_size_bytes(&self) -> u32 {
        512
    }

    /// Fills `buffer` from `offset`. All of it or an error; never short.
    ///
    /// # Errors
    /// [`BlockError::OutOfRange`] where the range is not inside the device; otherwise what the
    /// medium says.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()>;

    /// What `range` holds, without reading it.
    ///
    /// The answer covers a *prefix* of the range: it starts at `range.offset`, is contiguous, does
    /// not pass the range's end, and is not empty unless the range is. An implementation stops
    /// early to bound its memory (some 64 Ki extents); [`for_each_extent`] asks until the end.
    /// The default knows nothing: all data.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.check_range(range)?;
        let mut extents = Vec::new();
        crate::push_extent(&mut extents, Extent { range, kind: crate::ExtentKind::Data });
        Ok(extents)
    }

    /// The device as one that hands over its data in the order of its storage, where that is
    /// cheaper than reading it from one end to the other.
    fn storage_order(&self) -> Option<&dyn crate::StorageOrder> {
        None
    }

    /// Succeeds where `range` lies inside the device.
    ///
    /// # Errors
    /// [`BlockError::OutOfRange`].
    fn check_range(&self, range: ByteRange) -> Result<()> {
        let size_bytes = self.size_bytes();
        match range.checked_end() {
            Some(end) if end <= size_bytes => Ok(()),
            _ => Err(BlockError::OutOfRange { device: self.name(), range, size_bytes }),
        }
    }
}

/// A virtual disk that can be written.
///
/// A write is on stable storage only after a later [`flush`](Self::flush) has returned. Writes
/// from several threads to ranges that do not overlap may run at once.
pub trait WritableBlockDevice: BlockDevice {
    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    /// [`BlockError::OutOfRange`], [`BlockError::ReadOnly`], or what the medium says.
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()>;

    /// Makes `range` read as zeros, freeing its storage where the medium can.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    fn write_zeroes(&self, range: ByteRange) -> Result<()>;

    /// Puts all writes that have returned on stable storage.
    ///
    /// # Errors
    /// What the medium says. After an error the state of earlier writes is unknown.
    fn flush(&self) -> Result<()>;

    /// Says that much will be written in large pieces and not be read again soon: a restore, a
    /// conversion. A device may then write past the operating system's cache, which saves a copy of
    /// every byte and does not push out what others need. Only a hint; results are the same.
    fn expect_bulk_writes(&self) {}

    /// Says that all of `range`, which reads as zeros now, will be written soon, from several threads. A device
    /// may set aside room for it, so that the writers do not wait for each other while that is done. Called for
    /// many ranges before the first write. Only a hint: what is then not written reads as zeros as before.
    fn expect_data(&self, _range: ByteRange) {}

    /// Changes the size. New bytes read as zeros; bytes past a smaller size are gone.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] where the medium has a fixed size.
    fn resize(&self, size_bytes: u64) -> Result<()> {
        Err(BlockError::unsupported(
            self.name(),
            format!(
                "cannot be resized to {size_bytes} bytes: this kind of device has a fixed size"
            ),
        ))
    }
}

impl<T: BlockDevice + ?Sized> BlockDevice for &T {
    fn name(&self) -> String {
        (**self).name()
    }
    fn size_bytes(&self) -> u64 {
        (**self).size_bytes()
    }
    fn block_size_bytes(&self) -> u32 {
        (**self).block_size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        (**self).read_at(buffer, offset)
    }
    fn storage_order(&self) -> Option<&dyn crate::StorageOrder> {
        (**self).storage_order()
    }
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        (**self).extents(range)
    }
}

impl<T: BlockDevice + ?Sized> BlockDevice for std::sync::Arc<T> {
    fn name(&self) -> String {
        (**self).name()
    }
    fn size_bytes(&self) -> u64 {
        (**self).size_bytes()
    }
    fn block_size_bytes(&self) -> u32 {
        (**self).block_size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        (**self).read_at(buffer, offset)
    }
    fn storage_order(&self) -> Option<&dyn crate::StorageOrder> {
        (**self).storage_order()
    }
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        (**self).extents(range)
    }
}

/// A writable device seen as a read-only one: for handing a target back as a source.
pub struct ReadOnlyView<T>(pub T);

impl<T: BlockDevice> BlockDevice for ReadOnlyView<T> {
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

/// Calls `visit` with every extent of `range`, in order, asking the device as often as needed.
///
/// # Errors
/// Those of [`BlockDevice::extents`] and of `visit`, and [`BlockError::Cancelled`];
/// [`BlockError::Damaged`] where the device answers with extents that are empty, overlap, leave
/// gaps or leave the range, because trusting them would lose data silently.
pub fn for_each_extent(
    device: &dyn BlockDevice,
    range: ByteRange,
    cancel: &CancelToken,
    mut visit: impl FnMut(Extent) -> Result<()>,
) -> Result<()> {
    let mut at = range.offset;
    while at < range.end() {
        cancel.check()?;
        let extents = device.extents(ByteRange::from_bounds(at, range.end()))?;
        let before = at;
        for extent in extents {
            if extent.range.offset != at
                || extent.range.is_empty()
                || extent.range.end() > range.end()
            {
                return Err(BlockError::damaged(
                    device.name(),
                    format!("extent {} does not continue the answer at byte {at}", extent.range),
                ));
            }
            at = extent.range.end();
            visit(extent)?;
        }
        if at == before {
            return Err(BlockError::damaged(
                device.name(),
                format!("no extents reported at byte {at} of {}", range.end()),
            ));
        }
    }
    Ok(())
}

/// All extents of a device, neighbours of one kind joined. For small devices and tests: memory
/// grows with the number of extents.
///
/// # Errors
/// As [`for_each_extent`].
pub fn all_extents(device: &dyn BlockDevice) -> Result<Vec<Extent>> {
    let mut out = Vec::new();
    let whole = ByteRange::new(0, device.size_bytes());
    for_each_extent(device, whole, &CancelToken::new(), |extent| {
        crate::push_extent(&mut out, extent);
        Ok(())
    })?;
    Ok(out)
}
