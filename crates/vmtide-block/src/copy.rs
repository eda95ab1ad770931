//! Copying one device onto another: the last step of every restore and conversion.
//!
//! Workers claim spans of the disk and deal with each alone: ask the source for extents, read the
//! data, skip what is zero, write the rest. Spans are large enough for a slow medium to see
//! sequential access and small enough to share the tail of a disk between workers. A source that
//! hands over its data in the order of its storage is taken at its word.

use crate::{
    AlignedBuffer, BlockDevice, BlockError, ByteRange, CancelToken, Extent, MAX_PIECE_BYTES,
    Progress, Result, StorageOrder, WritableBlockDevice, for_each_extent, is_zero,
};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What one worker claims at a time. Smaller spans cut sequential access into pieces on spinning
/// disks; much larger ones leave workers idle at the end of small disks.
const SPAN_BYTES: u64 = 32 << 20;

/// The size of one read and one write. Smaller ones cost a round trip each on a network, and cut more of a
/// restore point's frames (2 MiB) in two; larger ones only take memory.
const BUFFER_BYTES: usize = 4 << 20;

/// How much of a disk is asked about at once, so that the answers of a scattered one stay small.
const WINDOW_BYTES: u64 = 1 << 30;

/// The grain at which zeros inside data become holes, and differences are written in place.
const GRAIN_BYTES: usize = 64 << 10;

/// How to copy.
#[derive(Clone, Debug)]
pub struct CopyOptions {
    /// The number of workers; each holds a buffer of 4 MiB, two of them with `differing_only`.
    pub workers: usize,
    /// Whether the target is known to read as zeros (just created), so that zeros need no write.
    pub target_is_zero: bool,
    /// Whether to read the target first and write only the 64 KiB grains that differ.
    pub differing_only: bool,
    /// The size of one read and one write in bytes, from 64 KiB to 4 MiB. Where both ends are in
    /// memory, a piece that stays in the processor's own cache is copied at twice the speed.
    pub piece_bytes: usize,
}

impl Default for CopyOptions {
    fn default() -> Self {
        // Two more than the cores: a worker that waits for the medium leaves its core to another.
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let workers = (cores + 2).min(16);
        Self { workers, target_is_zero: false, differing_only: false, piece_bytes: BUFFER_BYTES }
    }
}

/// What a copy did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopySummary {
    /// The bytes of the source that held data and were read.
    pub read_bytes: u64,
    /// The bytes of data written to the target.
    pub written_bytes: u64,
    /// The bytes of the target that were made zero explicitly.
    pub zeroed_bytes: u64,
}

struct Copier<'a> {
    source: &'a dyn BlockDevice,
    target: &'a dyn WritableBlockDevice,
    options: &'a CopyOptions,
    progress: &'a Progress,
    cancel: &'a CancelToken,
    next_span: AtomicU64,
    failed: AtomicBool,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    zeroed_bytes: AtomicU64,
}

/// Copies all of `source` onto `target`, which must be at least as large, and flushes it.
/// Bytes of the target past the source's size are left alone.
///
/// # Errors
/// The first error of either device, [`BlockError::OutOfRange`] where the target is too small, or
/// [`BlockError::Cancelled`]. The target is then incomplete and the caller says so to its user.
pub fn copy_device(
    source: &dyn BlockDevice,
    target: &dyn WritableBlockDevice,
    options: &CopyOptions,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<CopySummary> {
    target.check_range(ByteRange::new(0, source.size_bytes()))?;
    target.expect_bulk_writes();
    let copier = Copier {
        source,
        target,
        options,
        progress,
        cancel,
        next_span: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        read_bytes: AtomicU64::new(0),
        written_bytes: AtomicU64::new(0),
        zeroed_bytes: AtomicU64::new(0),
    };
    match source.storage_order() {
        Some(storage) => copier.copy_in_storage_order(storage)?,
        None => copier.copy_by_offset()?,
    }
    target.flush()?;
    Ok(CopySummary {
        read_bytes: copier.read_bytes.into_inner(),
        written_bytes: copier.written_bytes.into_inner(),
        zeroed_bytes: copier.zeroed_bytes.into_inner(),
    })
}

impl Copier<'_> {
    /// Zeros first, and room for the data; then the data as the source hands it over.
    fn copy_in_storage_order(&self, storage: &dyn StorageOrder) -> Result<()> {
        let spare: Mutex<Vec<Vec<u8>>> = Mutex::default();
        let present_bytes = if self.options.differing_only { MAX_PIECE_BYTES } else { 0 };
        let buffer = || spare.lock().ok().and_then(|mut spare| spare.pop());
        let mut present = vec![0u8; present_bytes];
        let size_bytes = self.source.size_bytes();
        let mut start = 0;
        while start < size_bytes {
            let window = ByteRange::from_bounds(start, (start + WINDOW_BYTES).min(size_bytes));
            for_each_extent(self.source, window, self.cancel, |extent| {
                if extent.kind.reads_as_zero() {
                    self.make_zero(extent.range, &mut present)?;
                    self.progress.add_done(extent.range.length);
                } else if self.options.target_is_zero {
                    self.target.expect_data(extent.range);
                }
                Ok(())
            })?;
            start = window.end();
        }
        storage.read_all(self.options.workers.max(1), self.cancel, &|data, offset| {
            let mut present = buffer().unwrap_or_else(|| vec![0u8; present_bytes]);
            let outcome = self.write_data(data, offset, &mut present);
            if let Ok(mut spare) = spare.lock() {
                spare.push(present);
            }
            self.read_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
            self.progress.add_done(data.len() as u64);
            outcome
        })
    }

    /// Spans of the disk by as many workers as asked for.
    fn copy_by_offset(&self) -> Result<()> {
        let mut result = Ok(());
        std::thread::scope(|scope| {
            let workers: Vec<_> =
                (0..self.options.workers.max(1)).map(|_| scope.spawn(|| self.work())).collect();
            for worker in workers {
                let outcome = worker.join().unwrap_or_else(|_| {
                    Err(BlockError::damaged(self.source.name(), "a copy worker ended abnormally"))
                });
                // A cancelled worker may only echo another one's failure: the real cause wins.
                if matches!(result, Ok(()) | Err(BlockError::Cancelled)) && outcome.is_err() {
                    result = outcome;
                }
            }
        });
        result
    }

    fn work(&self) -> Result<()> {
        let outcome = self.work_until_done();
        if outcome.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        outcome
    }

    fn work_until_done(&self) -> Result<()> {
        let size_bytes = self.source.size_bytes();
        let piece_bytes = self.options.piece_bytes.clamp(GRAIN_BYTES, BUFFER_BYTES);
        let mut buffer = AlignedBuffer::new(piece_bytes);
        let mut present = vec![0u8; if self.options.differing_only { piece_bytes } else { 0 }];
        loop {
            let start = self.next_span.fetch_add(SPAN_BYTES, Ordering::Relaxed);
            if start >= size_bytes {
                return Ok(());
            }
            let span = ByteRange::from_bounds(start, (start + SPAN_BYTES).min(size_bytes));
            for_each_extent(self.source, span, self.cancel, |extent| {
                self.copy_extent(extent, &mut buffer, &mut present)
            })?;
        }
    }

    fn copy_extent(&self, extent: Extent, buffer: &mut [u8], present: &mut [u8]) -> Result<()> {
        if extent.kind.reads_as_zero() {
            self.make_zero(extent.range, present)?;
            self.progress.add_done(extent.range.length);
            return Ok(());
        }
        let mut at = extent.range.offset;
        while at < extent.range.end() {
            self.cancel.check()?;
            if self.failed.load(Ordering::Relaxed) {
                return Err(BlockError::Cancelled);
            }
            // Up to a multiple of the piece, so that no unit of the source is read by two pieces.
            let piece_bytes = buffer.len() as u64;
            let to_multiple = piece_bytes - at % piece_bytes;
            #[allow(clippy::cast_possible_truncation, reason = "at most BUFFER_BYTES")]
            let length = (extent.range.end() - at).min(to_multiple) as usize;
            let data = &mut buffer[..length];
            self.source.read_at(data, at)?;
            self.read_bytes.fetch_add(length as u64, Ordering::Relaxed);
            self.write_data(data, at, present)?;
            at += length as u64;
            self.progress.add_done(length as u64);
        }
        Ok(())
    }

    /// Writes what is worth writing of one buffer, joining neighbouring grains into one write.
    fn write_data(&self, data: &[u8], offset: u64, present: &mut [u8]) -> Result<()> {
        if self.options.differing_only {
            self.target.read_at(&mut present[..data.len()], offset)?;
        }
        let mut pending: Option<(usize, usize, bool)> = None;
        let mut at = 0;
        while at < data.len() {
            let end = (at + GRAIN_BYTES).min(data.len());
            let grain = &data[at..end];
            let same = self.options.differing_only && present[at..end] == *grain;
            let zero = is_zero(grain);
            let skip = same || (zero && self.options.target_is_zero);
            pending = match pending {
                Some((start, _, kind)) if !skip && kind == zero => Some((start, end, kind)),
                earlier => {
                    self.write_run(data, offset, earlier)?;
                    (!skip).then_some((at, end, zero))
                }
            };
            at = end;
        }
        self.write_run(data, offset, pending)
    }

    fn write_run(&self, data: &[u8], offset: u64, run: Option<(usize, usize, bool)>) -> Result<()> {
        let Some((start, end, zero)) = run else {
            return Ok(());
        };
        let at = offset + start as u64;
        let length = (end - start) as u64;
        if zero {
            self.target.write_zeroes(ByteRange::new(at, length))?;
            self.zeroed_bytes.fetch_add(length, Ordering::Relaxed);
        } else {
            self.target.write_at(&data[start..end], at)?;
            self.written_bytes.fetch_add(length, Ordering::Relaxed);
            self.progress.add_transferred(length);
        }
        Ok(())
    }

    fn make_zero(&self, range: ByteRange, present: &mut [u8]) -> Result<()> {
        if self.options.target_is_zero {
            return Ok(());
        }
        if !self.options.differing_only {
            self.zeroed_bytes.fetch_add(range.length, Ordering::Relaxed);
            return self.target.write_zeroes(range);
        }
        // Only what holds something else is touched, so that an in-place restore does not grow
        // a thin target's metadata or wear for ranges that are holes already.
        let zeros =
            vec![0u8; present.len().min(usize::try_from(range.length).unwrap_or(usize::MAX))];
        for_each_extent(&TargetView(self.target), range, self.cancel, |extent| {
            if extent.kind.reads_as_zero() {
                return Ok(());
            }
            let mut at = extent.range.offset;
            while at < extent.range.end() {
                #[allow(clippy::cast_possible_truncation, reason = "at most BUFFER_BYTES")]
                let length = (extent.range.end() - at).min(zeros.len() as u64) as usize;
                self.write_data(&zeros[..length], at, present)?;
                at += length as u64;
            }
            Ok(())
        })
    }
}

/// The target as a plain block device, for asking its extents.
struct TargetView<'a>(&'a dyn WritableBlockDevice);

impl BlockDevice for TargetView<'_> {
    fn name(&self) -> String {
        self.0.name()
    }
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.0.extents(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryDevice;
    use proptest::prelude::*;

    fn disk_of(pattern: &[(bool, u16)], unit: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (index, (data, units)) in pattern.iter().enumerate() {
            let value = if *data { u8::try_from(index % 250).unwrap() + 1 } else { 0 };
            bytes.extend(std::iter::repeat_n(value, usize::from(*units) * unit + index));
        }
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn the_target_equals_the_source_in_every_mode(
            source in prop::collection::vec((any::<bool>(), 0..40u16), 1..12),
            target in prop::collection::vec((any::<bool>(), 0..40u16), 1..12),
            differing_only in any::<bool>(),
            workers in 1..4usize,
            piece_bytes in prop::sample::select(vec![1, 64 << 10, 512 << 10, 4 << 20, usize::MAX]),
        ) {
            let source_bytes = disk_of(&source, 16 << 10);
            let mut target_bytes = disk_of(&target, 16 << 10);
            target_bytes.resize(source_bytes.len() + 100, 7);
            let source = MemoryDevice::from_bytes(source_bytes.clone());
            let target = MemoryDevice::from_bytes(target_bytes.clone());
            let options = CopyOptions { workers, target_is_zero: false, differing_only, piece_bytes };
            let progress = Progress::new();
            let done = copy_device(&source, &target, &options, &progress, &CancelToken::new()).unwrap();
            let got = target.to_bytes();
            prop_assert_eq!(&got[..source_bytes.len()], &source_bytes[..]);
            prop_assert_eq!(&got[source_bytes.len()..], &target_bytes[source_bytes.len()..]);
            prop_assert_eq!(progress.snapshot().done_bytes, source_bytes.len() as u64);
            if differing_only {
                let again = copy_device(&source, &target, &options, &progress, &CancelToken::new()).unwrap();
                prop_assert_eq!((again.written_bytes, again.zeroed_bytes), (0, 0));
            }
            prop_assert!(done.read_bytes <= source_bytes.len() as u64);
        }
    }

    #[test]
    fn a_new_target_gets_no_zeros() {
        let source = MemoryDevice::from_bytes([vec![0; 1 << 20], vec![3; 1 << 16]].concat());
        let target = MemoryDevice::new(source.to_bytes().len());
        let options = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
        let done =
            copy_device(&source, &target, &options, &Progress::new(), &CancelToken::new()).unwrap();
        assert_eq!(
            done,
            CopySummary { read_bytes: 1 << 16, written_bytes: 1 << 16, zeroed_bytes: 0 }
        );
        assert_eq!(target.to_bytes(), source.to_bytes());
    }

    #[test]
    fn a_cancelled_copy_and_a_small_target_are_errors() {
        let (source, target) = (MemoryDevice::from_bytes(vec![1; 100]), MemoryDevice::new(99));
        let run = |target: &MemoryDevice, cancel: &CancelToken| {
            copy_device(&source, target, &CopyOptions::default(), &Progress::new(), cancel)
        };
        assert!(matches!(run(&target, &CancelToken::new()), Err(BlockError::OutOfRange { .. })));
        let cancel = CancelToken::new();
        cancel.cancel();
        assert!(matches!(run(&MemoryDevice::new(100), &cancel), Err(BlockError::Cancelled)));
    }
}
