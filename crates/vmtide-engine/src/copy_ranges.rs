//! Copying parts of a disk onto another that holds almost the same: an in-place restore that knows what
//! changed.

use crate::Result;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, CopySummary, Progress, RangeSet,
    WritableBlockDevice, is_zero,
};

/// The size of one read; two buffers of it per worker.
const PIECE_BYTES: u64 = 1 << 20;

/// The grain at which differences are written: what file systems write at least.
const GRAIN_BYTES: usize = 4 << 10;

/// Copies what differs within `ranges` from `source` to `target`, and flushes it. Ranges past the end of
/// the source are left alone.
///
/// # Errors
/// The first error of either device, or [`BlockError::Cancelled`]; the target is then in between.
pub(crate) fn copy_ranges(
    source: &dyn BlockDevice,
    target: &dyn WritableBlockDevice,
    ranges: &RangeSet,
    workers: usize,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<CopySummary> {
    let ranges = ranges.clamp(source.size_bytes());
    let copier = Copier {
        source,
        target,
        ranges: ranges.as_slice(),
        next: Mutex::new((0, 0)),
        failed: AtomicBool::new(false),
        read_bytes: AtomicU64::new(0),
        written_bytes: AtomicU64::new(0),
        zeroed_bytes: AtomicU64::new(0),
        progress,
        cancel,
    };
    let panicked = AtomicUsize::new(0);
    let first_error = Mutex::new(None);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers.max(1)).map(|_| scope.spawn(|| copier.work())).collect();
        for worker in workers {
            match worker.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    if let Ok(mut first) = first_error.lock()
                        && first.as_ref().is_none_or(|known| matches!(known, BlockError::Cancelled))
                    {
                        *first = Some(error);
                    }
                }
                Err(_) => {
                    panicked.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    });
    if panicked.into_inner() > 0 {
        return Err(BlockError::damaged(source.name(), "a copy worker ended abnormally").into());
    }
    if let Some(error) = first_error.into_inner().ok().flatten() {
        return Err(error.into());
    }
    target.flush()?;
    Ok(CopySummary {
        read_bytes: copier.read_bytes.into_inner(),
        written_bytes: copier.written_bytes.into_inner(),
        zeroed_bytes: copier.zeroed_bytes.into_inner(),
    })
}

struct Copier<'a> {
    source: &'a dyn BlockDevice,
    target: &'a dyn WritableBlockDevice,
    ranges: &'a [ByteRange],
    /// The range to be claimed from, and how far it is claimed.
    next: Mutex<(usize, u64)>,
    failed: AtomicBool,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    zeroed_bytes: AtomicU64,
    progress: &'a Progress,
    cancel: &'a CancelToken,
}

impl Copier<'_> {
    fn work(&self) -> vmtide_block::Result<()> {
        let outcome = self.work_until_done();
        if outcome.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        outcome
    }

    fn work_until_done(&self) -> vmtide_block::Result<()> {
        let (mut wanted, mut present) = (Vec::new(), Vec::new());
        while let Some(piece) = self.claim() {
            self.cancel.check()?;
            if self.failed.load(Ordering::Relaxed) {
                return Err(BlockError::Cancelled);
            }
            let length = usize::try_from(piece.length).unwrap_or(usize::MAX);
            wanted.resize(length, 0);
            present.resize(length, 0);
            self.source.read_at(&mut wanted, piece.offset)?;
            self.target.read_at(&mut present, piece.offset)?;
            self.read_bytes.fetch_add(piece.length, Ordering::Relaxed);
            self.write_differing(&wanted, &present, piece.offset)?;
            self.progress.add_done(piece.length);
        }
        Ok(())
    }

    /// The next piece: none when all are claimed.
    fn claim(&self) -> Option<ByteRange> {
        let mut next = self.next.lock().ok()?;
        let (index, done) = *next;
        let range = self.ranges.get(index)?;
        let offset = range.offset + done;
        let length = (range.length - done).min(PIECE_BYTES);
        *next = if done + length == range.length { (index + 1, 0) } else { (index, done + length) };
        Some(ByteRange::new(offset, length))
    }

    /// Writes the grains that differ, neighbours of a kind together.
    fn write_differing(
        &self,
        wanted: &[u8],
        present: &[u8],
        offset: u64,
    ) -> vmtide_block::Result<()> {
        let mut pending: Option<(usize, usize, bool)> = None;
        let pairs = wanted.chunks(GRAIN_BYTES).zip(present.chunks(GRAIN_BYTES));
        for (index, (new, old)) in pairs.enumerate() {
            let (start, end) = (index * GRAIN_BYTES, index * GRAIN_BYTES + new.len());
            let zero = is_zero(new);
            pending = match pending {
                Some((from, _, kind)) if new != old && kind == zero => Some((from, end, kind)),
                earlier => {
                    self.write_run(wanted, offset, earlier)?;
                    (new != old).then_some((start, end, zero))
                }
            };
        }
        self.write_run(wanted, offset, pending)
    }

    fn write_run(
        &self,
        wanted: &[u8],
        offset: u64,
        run: Option<(usize, usize, bool)>,
    ) -> vmtide_block::Result<()> {
        let Some((start, end, zero)) = run else { return Ok(()) };
        let (at, length) = (offset + start as u64, (end - start) as u64);
        if zero {
            self.target.write_zeroes(ByteRange::new(at, length))?;
            self.zeroed_bytes.fetch_add(length, Ordering::Relaxed);
        } else {
            self.target.write_at(&wanted[start..end], at)?;
            self.written_bytes.fetch_add(length, Ordering::Relaxed);
            self.progress.add_transferred(length);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::MemoryDevice;

    #[test]
    fn what_differs_within_the_ranges_is_written_and_nothing_else() {
        let size = 5usize << 20;
        let source: Vec<u8> = (0..size).map(|at| u8::try_from(at / 4096 % 251).unwrap()).collect();
        let mut source = source;
        source[3 << 20..(3 << 20) + 8192].fill(0);
        let mut old = source.clone();
        old[10_000..10_010].fill(255);
        old[3 << 20..(3 << 20) + 8192].fill(9);
        old[4 << 20] ^= 1;
        let ranges: RangeSet = [
            ByteRange::new(8192, 4096),
            ByteRange::new(1 << 20, (2 << 20) + 100_000),
            ByteRange::new(u64::MAX - 9, 5),
        ]
        .into_iter()
        .collect();
        let target = MemoryDevice::from_bytes(old.clone());
        let (progress, cancel) = (Progress::new(), CancelToken::new());
        let device = MemoryDevice::from_bytes(source.clone());
        let done = copy_ranges(&device, &target, &ranges, 3, &progress, &cancel).unwrap();
        assert_eq!((done.written_bytes, done.zeroed_bytes), (4096, 8192));
        let got = target.to_bytes();
        // The last difference lies outside of what was said to have changed.
        source[4 << 20] ^= 1;
        assert!(got == source);
        cancel.cancel();
        assert!(copy_ranges(&device, &target, &ranges, 1, &progress, &cancel).is_err());
    }
}
