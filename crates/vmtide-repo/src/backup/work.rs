//! What a worker does with a stretch of data.

use super::chunk::{Chunker, Cut};
use super::fill::PackFiller;
use super::limit::RateLimit;
use super::plan::Piece;
use super::sink::RunSink;
use super::state::SessionState;
use crate::map::{MapRun, Target};
use crate::{BLOCK_BYTES, Location, RepoError, Result};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use vmtide_block::{BlockDevice, BlockError, CancelToken, Progress};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// What is read at a time, up to a multiple of this on the disk. Chunks are looked at, digested and put into a frame right after: with
/// whole stretches in memory they have left the processor's cache by then, and a full backup takes 3 % longer. A source far
/// away pays for it with more requests.
const STEP_BYTES: u64 = 1 << 20;

/// One disk being stored, shared by its workers.
pub(super) struct DiskJob<'a> {
    pub session: &'a SessionState,
    pub source: &'a dyn BlockDevice,
    pub chunker: Chunker,
    pub sink: RunSink,
    pub limiter: Option<&'a RateLimit>,
    pub progress: &'a Progress,
    pub cancel: &'a CancelToken,
    pub failed: AtomicBool,
    pub read_bytes: AtomicU64,
    pub new_bytes: AtomicU64,
    pub stored_bytes: AtomicU64,
}

impl DiskJob<'_> {
    /// Takes stretches until there are no more.
    pub(super) fn work(
        &self,
        pieces: &Mutex<Receiver<Piece>>,
        filler: &mut PackFiller,
    ) -> Result<()> {
        let mut buffer = Vec::new();
        loop {
            // The guard is dropped before the work begins.
            let next = pieces.lock().recv();
            let Ok(Piece::Data { first_block, count }) = next else { break };
            self.store_stretch(first_block, count, filler, &mut buffer)?;
        }
        self.finish(filler)
    }

    /// Stores the chunks that wait: they belong to this disk and are counted with it.
    pub(super) fn finish(&self, filler: &mut PackFiller) -> Result<()> {
        self.stored_bytes.fetch_add(filler.flush_frame()?, Ordering::Relaxed);
        Ok(())
    }

    /// Whether to stop: the job was cancelled, or another worker failed.
    pub(super) fn check(&self) -> Result<()> {
        self.cancel.check()?;
        if self.failed.load(Ordering::Relaxed) {
            return Err(BlockError::Cancelled.into());
        }
        Ok(())
    }

    /// Reads a stretch of data and stores what is not known. `buffer` is made as long as needed; what it held means nothing.
    pub(super) fn store_stretch(
        &self,
        first_block: u64,
        count: u64,
        filler: &mut PackFiller,
        buffer: &mut Vec<u8>,
    ) -> Result<()> {
        let offset = first_block * BLOCK;
        let end = (offset + count * BLOCK).min(self.source.size_bytes()).max(offset);
        let mut runs = Runs { sink: &self.sink, open: None };
        // The buffer begins with this block, and holds so many bytes that are not stored yet.
        let (mut block, mut held) = (first_block, 0);
        let mut next = offset;
        while next < end {
            let step_end = end.min((next / STEP_BYTES + 1) * STEP_BYTES);
            held += self.read_step(next..step_end, held, buffer)?;
            let content = &buffer[..held];
            let done = self.chunker.cut(content, step_end < end, |cut| match cut {
                Cut::Zero { first, count } => runs.add(MapRun {
                    first_block: block + first as u64,
                    count: count as u64,
                    target: Target::Zero,
                }),
                Cut::Chunk { first, count } => {
                    let chunk = &content[first * BLOCK_BYTES..(first + count) * BLOCK_BYTES];
                    let Location { pack, ordinal } =
                        self.store_chunk(chunk, block + first as u64, filler)?;
                    runs.add(MapRun {
                        first_block: block + first as u64,
                        count: count as u64,
                        target: Target::Data { pack, ordinal },
                    })
                }
            })?;
            buffer.copy_within(done * BLOCK_BYTES..held, 0);
            held -= done * BLOCK_BYTES;
            block += done as u64;
            self.progress.add_done(step_end - next);
            next = step_end;
        }
        runs.finish()
    }

    /// Reads some of a stretch into the buffer, behind the bytes held there; how many whole blocks' bytes that is.
    fn read_step(&self, range: Range<u64>, held: usize, buffer: &mut Vec<u8>) -> Result<usize> {
        self.check()?;
        let wanted = range.end - range.start;
        // No more than a step.
        let filled = usize::try_from(wanted)
            .map_err(|_| RepoError::Invalid("a step longer than memory".into()))?;
        let padded = filled.next_multiple_of(BLOCK_BYTES);
        if buffer.len() < held + padded {
            buffer.resize(held + padded, 0);
        }
        if let Some(limiter) = self.limiter {
            limiter.take(wanted, self.cancel)?;
        }
        self.source.read_at(&mut buffer[held..held + filled], range.start)?;
        // The last block of a disk is stored at full size.
        buffer[held + filled..held + padded].fill(0);
        self.read_bytes.fetch_add(wanted, Ordering::Relaxed);
        self.progress.add_transferred(wanted);
        Ok(padded)
    }

    fn store_chunk(
        &self,
        chunk: &[u8],
        first_block: u64,
        filler: &mut PackFiller,
    ) -> Result<Location> {
        filler.go_to(first_block);
        let stored = self.session.store_chunk(chunk, filler)?;
        self.new_bytes.fetch_add(stored.new_bytes, Ordering::Relaxed);
        self.stored_bytes.fetch_add(stored.stored_bytes, Ordering::Relaxed);
        Ok(stored.place)
    }
}

/// Joins neighbouring runs before they go to the sink.
struct Runs<'a> {
    sink: &'a RunSink,
    open: Option<MapRun>,
}

impl Runs<'_> {
    fn add(&mut self, next: MapRun) -> Result<()> {
        if self.open.as_mut().is_some_and(|open| open.join(&next)) {
            return Ok(());
        }
        self.open.replace(next).map_or(Ok(()), |done| self.sink.record(done))
    }

    fn finish(mut self) -> Result<()> {
        self.open.take().map_or(Ok(()), |run| self.sink.record(run))
    }
}
