//! Copying a disk into an image whose clusters are compressed and written once, in order.
//!
//! Workers claim spans of the disk in ascending order and number them. Each reads its span, leaves
//! out the clusters that are zero and compresses the others, all without a lock; then it waits until
//! every span before its own is in the image, appends its clusters, and lets the next one go. Spans
//! that hold nothing are never claimed, so an empty disk of any size costs only its extents.

use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, CopySummary, Extent, Progress, Result,
    for_each_extent, is_zero,
};
use vmtide_image::{CompressedCluster, CompressedWriter};

/// What a worker compresses before it takes its turn to append: enough that turns are rare, little
/// enough that what it read stays in the processor's cache.
const SPAN_BYTES: u64 = 1 << 20;

/// How many workers more than asked for there are: they compress while another one appends.
const SPARE_WORKERS: usize = 2;

/// How often a worker that waits for its turn looks whether the user wants to end.
const CANCEL_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Copies all of `source` through `target`. Memory: a few MiB for each worker.
///
/// # Errors
/// The first error of either side, or [`BlockError::Cancelled`]. The image is then incomplete.
pub(crate) fn copy_compressed(
    source: &dyn BlockDevice,
    target: &dyn CompressedWriter,
    workers: usize,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<CopySummary> {
    let copier = Copier {
        source,
        target,
        progress,
        cancel,
        claims: Mutex::new(Claims::default()),
        turn: Mutex::new(Turn { next: 0, failed: false }),
        turned: Condvar::new(),
        read_bytes: AtomicU64::new(0),
        written_bytes: AtomicU64::new(0),
    };
    let mut result = Ok(());
    std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..workers.max(1) + SPARE_WORKERS).map(|_| scope.spawn(|| copier.work())).collect();
        for worker in workers {
            let outcome = worker.join().unwrap_or_else(|_| {
                Err(BlockError::damaged(source.name(), "a compressing worker ended abnormally"))
            });
            // A worker that was only told to stop echoes another one's failure: the cause wins.
            if matches!(result, Ok(()) | Err(BlockError::Cancelled)) && outcome.is_err() {
                result = outcome;
            }
        }
    });
    result?;
    Ok(CopySummary {
        read_bytes: copier.read_bytes.into_inner(),
        written_bytes: copier.written_bytes.into_inner(),
        zeroed_bytes: 0,
    })
}

struct Copier<'a> {
    source: &'a dyn BlockDevice,
    target: &'a dyn CompressedWriter,
    progress: &'a Progress,
    cancel: &'a CancelToken,
    claims: Mutex<Claims>,
    turn: Mutex<Turn>,
    turned: Condvar,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

/// What has been given to workers.
#[derive(Default)]
struct Claims {
    /// The number of the next span.
    ticket: u64,
    /// The first byte that nobody has claimed.
    at: u64,
    /// Extents that are known and not used up.
    known: VecDeque<Extent>,
    /// The first byte of which no extent has been asked for.
    known_to: u64,
}

/// Whose turn to append it is.
struct Turn {
    next: u64,
    failed: bool,
}

/// A span of the disk that holds data.
struct Span {
    ticket: u64,
    range: ByteRange,
}

impl Copier<'_> {
    fn work(&self) -> Result<()> {
        let mut end_others = EndOthers { copier: self, is_armed: true };
        let outcome = self.work_until_done();
        end_others.is_armed = outcome.is_err();
        outcome
    }

    fn work_until_done(&self) -> Result<()> {
        let span_bytes = SPAN_BYTES.max(self.target.cluster_bytes());
        let mut buffer = vec![0; usize::try_from(span_bytes).unwrap_or(usize::MAX)];
        while let Some(span) = self.claim(span_bytes)? {
            let clusters = self.compress(&span, &mut buffer)?;
            self.append(&span, clusters)?;
            self.progress.add_done(span.range.length);
        }
        Ok(())
    }

    /// The next span with data: whole clusters, at most `span_bytes`. What is skipped is done.
    fn claim(&self, span_bytes: u64) -> Result<Option<Span>> {
        let size_bytes = self.source.size_bytes();
        let cluster_bytes = self.target.cluster_bytes();
        let mut claims = self.claims.lock();
        loop {
            self.cancel.check()?;
            let Some(extent) = claims.known.pop_front() else {
                if claims.known_to >= size_bytes {
                    return Ok(None);
                }
                let rest = ByteRange::from_bounds(claims.known_to, size_bytes);
                claims.known = self.source.extents(rest)?.into();
                claims.known_to = checked_end(self.source, &claims.known, rest)?;
                continue;
            };
            let unclaimed = ByteRange::from_bounds(claims.at, extent.range.end());
            if unclaimed.is_empty() {
                continue;
            }
            if extent.kind.reads_as_zero() {
                // The cluster in which data begins later is claimed from its start.
                let end = extent.range.end();
                let end = if end < size_bytes { end - end % cluster_bytes } else { end };
                if end > claims.at {
                    self.progress.add_done(end - claims.at);
                    claims.at = end;
                }
                continue;
            }
            // Data may begin inside a cluster whose beginning is zero.
            let first = extent.range.offset.max(claims.at);
            let start = (first - first % cluster_bytes).max(claims.at);
            self.progress.add_done(start - claims.at);
            let end = (start + span_bytes).min(size_bytes);
            let end = end.min(extent.range.end().next_multiple_of(cluster_bytes)).min(size_bytes);
            claims.at = end;
            if extent.range.end() > end {
                claims.known.push_front(extent);
            }
            let ticket = claims.ticket;
            claims.ticket += 1;
            return Ok(Some(Span { ticket, range: ByteRange::from_bounds(start, end) }));
        }
    }

    /// Reads the span and compresses the clusters of it that are not zero.
    fn compress(&self, span: &Span, buffer: &mut [u8]) -> Result<Vec<(u64, CompressedCluster)>> {
        let start = span.range.offset;
        #[allow(clippy::cast_possible_truncation, reason = "inside a span, which is in memory")]
        let place =
            |range: ByteRange| (range.offset - start) as usize..(range.end() - start) as usize;
        for_each_extent(self.source, span.range, self.cancel, |extent| {
            let part = &mut buffer[place(extent.range)];
            if extent.kind.reads_as_zero() {
                part.fill(0);
                return Ok(());
            }
            self.read_bytes.fetch_add(extent.range.length, Ordering::Relaxed);
            self.source.read_at(part, extent.range.offset)
        })?;
        let cluster_bytes = self.target.cluster_bytes();
        let mut clusters = Vec::new();
        let mut at = start;
        while at < span.range.end() {
            let range = ByteRange::from_bounds(at, (at + cluster_bytes).min(span.range.end()));
            let data = &buffer[place(range)];
            if !is_zero(data) {
                clusters.push((at, self.target.compress(data)?));
                self.written_bytes.fetch_add(range.length, Ordering::Relaxed);
                self.progress.add_transferred(range.length);
            }
            at = range.end();
        }
        Ok(clusters)
    }

    /// Waits for its turn, appends, and gives the turn to the next.
    fn append(&self, span: &Span, clusters: Vec<(u64, CompressedCluster)>) -> Result<()> {
        {
            let mut turn = self.turn.lock();
            while turn.next != span.ticket && !turn.failed {
                self.turned.wait_for(&mut turn, CANCEL_POLL_INTERVAL);
                self.cancel.check()?;
            }
            if turn.failed {
                return Err(BlockError::Cancelled);
            }
        }
        for (offset, cluster) in clusters {
            self.target.append(offset, cluster)?;
        }
        self.turn.lock().next += 1;
        self.turned.notify_all();
        Ok(())
    }
}

/// Tells the other workers that there is no turn to wait for any more, when its own worker ends other
/// than by having done all: by an error, or by a panic in a source or a target.
struct EndOthers<'a, 'b> {
    copier: &'a Copier<'b>,
    is_armed: bool,
}

impl Drop for EndOthers<'_, '_> {
    fn drop(&mut self) {
        if self.is_armed {
            self.copier.turn.lock().failed = true;
            self.copier.turned.notify_all();
        }
    }
}

/// Where an answer ends. Extents decide what is left out, so one that is not exactly as the contract
/// says is refused.
fn checked_end(
    device: &dyn BlockDevice,
    extents: &VecDeque<Extent>,
    asked: ByteRange,
) -> Result<u64> {
    let mut at = asked.offset;
    for extent in extents {
        if extent.range.offset != at || extent.range.is_empty() || extent.range.end() > asked.end()
        {
            return Err(BlockError::damaged(
                device.name(),
                format!("extent {} does not continue the answer at byte {at}", extent.range),
            ));
        }
        at = extent.range.end();
    }
    if at == asked.offset {
        return Err(BlockError::damaged(
            device.name(),
            format!("no extents reported at byte {at}"),
        ));
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmtide_block::MemoryDevice;

    /// Keeps what is appended and insists on the order.
    struct Recorder {
        cluster_bytes: u64,
        appended: Mutex<Vec<(u64, Vec<u8>)>>,
        fail_at: Option<u64>,
    }

    impl CompressedWriter for Recorder {
        fn cluster_bytes(&self) -> u64 {
            self.cluster_bytes
        }
        fn compress(&self, data: &[u8]) -> Result<CompressedCluster> {
            Ok(CompressedCluster::Plain(data.to_vec()))
        }
        fn append(&self, offset: u64, cluster: CompressedCluster) -> Result<()> {
            if self.fail_at.is_some_and(|at| offset >= at) {
                return Err(BlockError::io(
                    "append",
                    std::io::Error::from(std::io::ErrorKind::StorageFull),
                ));
            }
            let CompressedCluster::Plain(data) = cluster else {
                return Err(BlockError::damaged("test", "not plain"));
            };
            let mut appended = self.appended.lock();
            assert!(appended.last().is_none_or(|(last, _)| *last < offset));
            appended.push((offset, data));
            Ok(())
        }
    }

    fn disk_of(pattern: &[(bool, u16)], unit: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (index, (data, units)) in pattern.iter().enumerate() {
            let value = if *data { u8::try_from(index % 250).unwrap() + 1 } else { 0 };
            bytes.extend(std::iter::repeat_n(value, usize::from(*units) * unit + index));
        }
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_cluster_that_is_not_zero_arrives_in_order(
            pattern in prop::collection::vec((any::<bool>(), 0..200u16), 0..12),
            workers in 1..4usize,
            shift in 12..21u32,
        ) {
            let bytes = disk_of(&pattern, 16 << 10);
            let source = MemoryDevice::from_bytes(bytes.clone());
            let target = Recorder { cluster_bytes: 1 << shift, appended: Mutex::new(Vec::new()), fail_at: None };
            let progress = Progress::new();
            copy_compressed(&source, &target, workers, &progress, &CancelToken::new()).unwrap();
            let mut got = vec![0; bytes.len()];
            for (offset, data) in target.appended.into_inner() {
                prop_assert_eq!(offset % (1 << shift), 0);
                prop_assert!(!is_zero(&data));
                let offset = usize::try_from(offset).unwrap();
                got[offset..offset + data.len()].copy_from_slice(&data);
            }
            prop_assert!(got == bytes);
            prop_assert_eq!(progress.snapshot().done_bytes, bytes.len() as u64);
        }
    }

    #[test]
    fn a_failure_in_the_middle_ends_all_workers_with_its_cause() {
        let source = MemoryDevice::from_bytes(vec![1; 20 << 20]);
        let target = Recorder {
            cluster_bytes: 65536,
            appended: Mutex::new(Vec::new()),
            fail_at: Some(5 << 20),
        };
        let run = |cancel: &CancelToken| {
            copy_compressed(&source, &target, 3, &Progress::new(), cancel).unwrap_err()
        };
        assert_eq!(run(&CancelToken::new()).io_kind(), Some(std::io::ErrorKind::StorageFull));
        let cancel = CancelToken::new();
        cancel.cancel();
        assert!(matches!(run(&cancel), BlockError::Cancelled));
    }

    /// Panics where it is to compress what lies behind the first spans.
    struct Panicking;

    impl CompressedWriter for Panicking {
        fn cluster_bytes(&self) -> u64 {
            65536
        }
        fn compress(&self, data: &[u8]) -> Result<CompressedCluster> {
            assert!(data.first() != Some(&2), "a bug in a compressor (meant to be)");
            Ok(CompressedCluster::Plain(data.to_vec()))
        }
        fn append(&self, _offset: u64, _cluster: CompressedCluster) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_panic_in_a_worker_ends_all_of_them() {
        let mut bytes = vec![1; 20 << 20];
        bytes[5 << 20..6 << 20].fill(2);
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let source = MemoryDevice::from_bytes(bytes);
            let (progress, cancel) = (Progress::new(), CancelToken::new());
            sender.send(copy_compressed(&source, &Panicking, 3, &progress, &cancel))
        });
        let outcome = receiver.recv_timeout(Duration::from_secs(60)).expect("it never ends");
        assert!(outcome.unwrap_err().to_string().contains("ended abnormally"));
    }
}
