//! A part of a disk with a file system in it.

use vmtide_block::{BlockDevice, ByteRange, CancelToken, RangeSet, Result};

/// How much of a long table is read at once, in bytes: a frame of a repository is not much longer.
const PIECE_BYTES: u64 = 1 << 20;

/// A partition, or a whole disk. Offsets are those inside it.
pub(crate) struct Volume<'a> {
    device: &'a dyn BlockDevice,
    area: ByteRange,
}

impl<'a> Volume<'a> {
    /// The part `area` of `device`, as far as that goes; none where it begins behind the end.
    pub(crate) fn new(device: &'a dyn BlockDevice, area: ByteRange) -> Option<Self> {
        let end = area.offset.checked_add(area.length)?.min(device.size_bytes());
        (area.offset < end).then(|| Self { device, area: ByteRange::from_bounds(area.offset, end) })
    }

    /// How long it is.
    pub(crate) const fn size_bytes(&self) -> u64 {
        self.area.length
    }

    /// The part of `length` bytes at `offset` as bytes of the disk; cut at the end, none behind it.
    pub(crate) fn on_disk(&self, offset: u64, length: u64) -> Option<ByteRange> {
        let end = offset.saturating_add(length).min(self.area.length);
        (offset < end)
            .then(|| ByteRange::from_bounds(self.area.offset + offset, self.area.offset + end))
    }

    /// What of `ranges` of the disk lies in the `length` bytes at `offset`.
    pub(crate) fn touched(&self, offset: u64, length: u64, ranges: &RangeSet) -> RangeSet {
        self.on_disk(offset, length).map_or_else(RangeSet::new, |range| ranges.within(range))
    }

    /// Reads at `offset`; answers with whether all of it is inside.
    ///
    /// # Errors
    /// Those of the disk.
    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<bool> {
        let length = buffer.len() as u64;
        let Some(range) = self.on_disk(offset, length).filter(|range| range.length == length)
        else {
            return Ok(false);
        };
        self.device.read_at(buffer, range.offset).map(|()| true)
    }

    /// Hands the entries of a table of `length` bytes at `offset` to `take`, each of `entry_bytes` (at most
    /// [`PIECE_BYTES`]) with its number; stretches that read as zero are left out.
    ///
    /// # Errors
    /// Those of the disk and of `take`; cancelled.
    pub(crate) fn for_each_entry(
        &self,
        (offset, length): (u64, u64),
        entry_bytes: u32,
        cancel: &CancelToken,
        take: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let entry = u64::from(entry_bytes);
        let step = PIECE_BYTES / entry * entry;
        let mut buffer = Vec::new();
        let mut at = 0;
        while step > 0 && at < length {
            cancel.check()?;
            let Some(range) =
                offset.checked_add(at).and_then(|begin| self.on_disk(begin, step.min(length - at)))
            else {
                return Ok(());
            };
            let extents = self.device.extents(range)?;
            if !extents.iter().all(|extent| extent.kind.reads_as_zero()) {
                buffer.resize(usize::try_from(range.length).unwrap_or(0), 0);
                self.device.read_at(&mut buffer, range.offset)?;
                for (number, entry) in
                    (at / entry..).zip(buffer.chunks_exact_mut(crate::bytes::index(entry_bytes)))
                {
                    take(number, entry)?;
                }
            }
            at += step;
        }
        Ok(())
    }
}
