//! Whether two disks hold the same, whatever their formats.
//!
//! Workers claim spans in ascending order and stop at the first difference that lies before theirs,
//! so the answer is exactly the first differing byte. What both disks know to be zero is not read.

use super::open::OpenDisk;
use crate::Result;
use crate::events::{JobContext, Phase};
use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, ExtentKind, Progress, for_each_extent, is_zero,
};

/// What one worker claims at a time.
const SPAN_BYTES: u64 = 16 << 20;

/// The size of one read; both buffers of a worker fit into the processor's cache.
const BUFFER_BYTES: usize = 512 << 10;

/// What a comparison found. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// Whether the disks hold the same; where their sizes differ and strictness was not asked for,
    /// the rest of the larger one must be zero.
    pub identical: bool,
    /// The first byte that differs, where contents do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_difference: Option<u64>,
    /// The sizes in bytes.
    pub size_bytes: [u64; 2],
    /// Whether sizes had to be equal.
    pub strict: bool,
    /// The bytes of disk compared; those after a difference are not.
    pub compared_bytes: u64,
}

/// Compares two disks.
///
/// # Errors
/// Those of reading; [`BlockError::Cancelled`].
pub fn compare(
    left: &OpenDisk,
    right: &OpenDisk,
    strict: bool,
    workers: Option<usize>,
    context: JobContext<'_>,
) -> Result<Comparison> {
    let size_bytes = [left.device.size_bytes(), right.device.size_bytes()];
    let (shorter, longer) = (size_bytes[0].min(size_bytes[1]), size_bytes[0].max(size_bytes[1]));
    if strict && shorter != longer {
        return Ok(Comparison {
            identical: false,
            first_difference: None,
            size_bytes,
            strict,
            compared_bytes: 0,
        });
    }
    context.phase(Phase::Compare, format!("{} with {}", left.name, right.name));
    let (left, right) = (left.device.as_ref(), right.device.as_ref());
    let first = first_difference(left, right, longer, workers, context)?;
    Ok(Comparison {
        identical: first.is_none(),
        first_difference: first,
        size_bytes,
        strict,
        compared_bytes: context.progress.snapshot().done_bytes,
    })
}

/// The first of `size_bytes` bytes at which two devices differ; past the end of either there are zeros.
///
/// # Errors
/// As [`compare`].
pub(crate) fn first_difference(
    left: &dyn BlockDevice,
    right: &dyn BlockDevice,
    size_bytes: u64,
    workers: Option<usize>,
    context: JobContext<'_>,
) -> Result<Option<u64>> {
    context.progress.add_total(size_bytes);
    let comparer = Comparer {
        left,
        right,
        progress: context.progress,
        cancel: context.cancel,
        size_bytes,
        next: AtomicU64::new(0),
        first: AtomicU64::new(u64::MAX),
    };
    let default = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 16);
    comparer.run(workers.unwrap_or(default))?;
    let first = comparer.first.into_inner();
    Ok((first != u64::MAX).then_some(first))
}

struct Comparer<'a> {
    left: &'a dyn BlockDevice,
    right: &'a dyn BlockDevice,
    progress: &'a Progress,
    cancel: &'a CancelToken,
    size_bytes: u64,
    next: AtomicU64,
    /// The first byte known to differ.
    first: AtomicU64,
}

impl Comparer<'_> {
    fn run(&self, workers: usize) -> Result<()> {
        let mut result = Ok(());
        std::thread::scope(|scope| {
            let workers: Vec<_> =
                (0..workers.max(1)).map(|_| scope.spawn(|| self.work())).collect();
            for worker in workers {
                let outcome = worker.join().unwrap_or_else(|_| {
                    Err(BlockError::damaged(self.left.name(), "a worker ended abnormally"))
                });
                if result.is_ok() {
                    result = outcome;
                }
            }
        });
        Ok(result?)
    }

    fn work(&self) -> vmtide_block::Result<()> {
        let outcome = self.work_until_done();
        if outcome.is_err() {
            // Nobody needs the rest.
            self.next.store(self.size_bytes, Ordering::Relaxed);
        }
        outcome
    }

    fn work_until_done(&self) -> vmtide_block::Result<()> {
        let mut buffers = [vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]];
        loop {
            let start = self.next.fetch_add(SPAN_BYTES, Ordering::Relaxed);
            if start >= self.size_bytes || start > self.first.load(Ordering::Relaxed) {
                return Ok(());
            }
            let end = start.saturating_add(SPAN_BYTES).min(self.size_bytes);
            self.compare_span(ByteRange::from_bounds(start, end), &mut buffers)?;
        }
    }

    fn compare_span(
        &self,
        span: ByteRange,
        buffers: &mut [Vec<u8>; 2],
    ) -> vmtide_block::Result<()> {
        let (left, right) = (self.zeros(self.left, span)?, self.zeros(self.right, span)?);
        let mut at = span.offset;
        while at < span.end() {
            self.cancel.check()?;
            let (left_zero, left_end) = covering(&left, at);
            let (right_zero, right_end) = covering(&right, at);
            let mut end = left_end.min(right_end);
            if !(left_zero && right_zero) {
                end = end.min(at + BUFFER_BYTES as u64);
                let range = ByteRange::from_bounds(at, end);
                if let Some(offset) = self.difference(range, [left_zero, right_zero], buffers)? {
                    self.first.fetch_min(offset, Ordering::Relaxed);
                    return Ok(());
                }
            }
            self.progress.add_done(end - at);
            at = end;
        }
        Ok(())
    }

    /// What the device knows to be zero in `span`, and where each answer ends; past the end of the
    /// device all is zero.
    fn zeros(
        &self,
        device: &dyn BlockDevice,
        span: ByteRange,
    ) -> vmtide_block::Result<Vec<(bool, u64)>> {
        let mut kinds: Vec<(bool, u64)> = Vec::new();
        let inside = ByteRange::from_bounds(span.offset, span.end().min(device.size_bytes()));
        let mut push = |zero: bool, end: u64| match kinds.last_mut() {
            Some((last, until)) if *last == zero => *until = end,
            _ => kinds.push((zero, end)),
        };
        for_each_extent(device, inside, self.cancel, |extent| {
            push(extent.kind != ExtentKind::Data, extent.range.end());
            Ok(())
        })?;
        if inside.offset.max(inside.end()) < span.end() {
            push(true, span.end());
        }
        Ok(kinds)
    }

    /// The first byte of `range`, at most a buffer, that differs.
    fn difference(
        &self,
        range: ByteRange,
        zero: [bool; 2],
        buffers: &mut [Vec<u8>; 2],
    ) -> vmtide_block::Result<Option<u64>> {
        let length = usize::try_from(range.length).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
        let [left, right] = buffers;
        let (left, right) = (&mut left[..length], &mut right[..length]);
        let found = match zero {
            [true, true] => None,
            [true, false] => {
                self.right.read_at(right, range.offset)?;
                first_data(right)
            }
            [false, true] => {
                self.left.read_at(left, range.offset)?;
                first_data(left)
            }
            [false, false] => {
                self.left.read_at(left, range.offset)?;
                self.right.read_at(right, range.offset)?;
                // Slices compare at memory speed; only where they differ is the place looked for.
                if left == right {
                    None
                } else {
                    left.iter().zip(right.iter()).position(|(left, right)| left != right)
                }
            }
        };
        Ok(found.map(|index| range.offset + index as u64))
    }
}

/// Whether the byte at `at` is known to be zero, and the end of the run that says so.
fn covering(kinds: &[(bool, u64)], at: u64) -> (bool, u64) {
    let index = kinds.partition_point(|(_, end)| *end <= at);
    kinds.get(index).copied().unwrap_or((true, u64::MAX))
}

fn first_data(bytes: &[u8]) -> Option<usize> {
    if is_zero(bytes) { None } else { bytes.iter().position(|byte| *byte != 0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Silent;
    use std::sync::Arc;
    use vmtide_block::MemoryDevice;
    use vmtide_image::Format;

    fn disk(bytes: Vec<u8>) -> OpenDisk {
        OpenDisk {
            device: Arc::new(MemoryDevice::from_bytes(bytes)),
            format: Format::Raw,
            layers: Vec::new(),
            name: "memory".into(),
        }
    }

    fn run(left: &[u8], right: &[u8], strict: bool) -> Comparison {
        let (progress, cancel) = (Progress::new(), CancelToken::new());
        let context = JobContext { progress: &progress, cancel: &cancel, observer: &Silent };
        compare(&disk(left.to_vec()), &disk(right.to_vec()), strict, Some(3), context).unwrap()
    }

    #[test]
    fn the_first_differing_byte_is_found_wherever_it_is() {
        let mut left = vec![0u8; 40 << 20];
        left[5 << 20..6 << 20].fill(3);
        assert!(run(&left, &left, true).identical);
        for at in [0, 1, 4095, (5 << 20) + 77, (16 << 20) - 1, 33 << 20, (40 << 20) - 1] {
            let mut right = left.clone();
            right[at] ^= 0x40;
            let last = right.len() - 1;
            right[last] ^= 1;
            let found = run(&left, &right, false);
            assert_eq!(found.first_difference, Some(at.min(last) as u64), "{at}");
            assert!(!found.identical);
        }
    }

    #[test]
    fn a_longer_disk_is_the_same_where_its_rest_is_zero() {
        let short = vec![7u8; 100_000];
        let mut long = short.clone();
        long.resize(20 << 20, 0);
        let loose = run(&short, &long, false);
        assert!(loose.identical && loose.compared_bytes == 20 << 20);
        assert!(run(&long, &short, false).identical);
        assert!(!run(&short, &long, true).identical);
        long[19 << 20] = 1;
        assert_eq!(run(&short, &long, false).first_difference, Some(19 << 20));
        assert!(run(&[], &[], true).identical);
    }
}
