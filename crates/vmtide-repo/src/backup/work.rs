//! What a worker does with a stretch of data.

use super::chunk::{Chunker, Cut};
use super::fill::PackFiller;
use super::limit::RateLimit;
use super::plan::{Piece, STRETCH_BYTES};
use super::sink::RunSink;
use super::state::SessionState;
use crate::map::{MapRun, Target};
use crate::{BLOCK_BYTES, Location, RepoError, Result};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use vmtide_block::{BlockDevice, BlockError, CancelToken, Progress};

const BLOCK: u64 = BLOCK_BYTES as u64;

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
        let mut buffer = vec![0; STRETCH_BYTES];
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

    /// Reads a stretch of data and stores what is not known. `buffer` is made as long as needed.
    pub(super) fn store_stretch(
        &self,
        first_block: u64,
        count: u64,
        filler: &mut PackFiller,
        buffer: &mut Vec<u8>,
    ) -> Result<()> {
        self.check()?;
        let offset = first_block * BLOCK;
        let wanted = (count * BLOCK).min(self.source.size_bytes().saturating_sub(offset));
        let filled = usize::try_from(wanted)
            .ok()
            .filter(|filled| *filled <= STRETCH_BYTES)
            .ok_or_else(|| RepoError::Invalid("a stretch longer than planned".into()))?;
        let padded = filled.next_multiple_of(BLOCK_BYTES);
        if buffer.len() < padded {
            buffer.resize(padded, 0);
        }
        if let Some(limiter) = self.limiter {
            limiter.take(wanted, self.cancel)?;
        }
        self.source.read_at(&mut buffer[..filled], offset)?;
        // The last block of a disk is stored at full size.
        buffer[filled..padded].fill(0);
        self.read_bytes.fetch_add(wanted, Ordering::Relaxed);
        self.progress.add_transferred(wanted);
        let content = &buffer[..padded];
        let mut runs = Runs { sink: &self.sink, open: None };
        self.chunker.cut(content, |cut| match cut {
            Cut::Zero { first, count } => runs.add(MapRun {
                first_block: first_block + first as u64,
                count: count as u64,
                target: Target::Zero,
            }),
            Cut::Chunk { first, count } => {
                let chunk = &content[first * BLOCK_BYTES..(first + count) * BLOCK_BYTES];
                let Location { pack, ordinal } =
                    self.store_chunk(chunk, first_block + first as u64, filler)?;
                runs.add(MapRun {
                    first_block: first_block + first as u64,
                    count: count as u64,
                    target: Target::Data { pack, ordinal },
                })
            }
        })?;
        runs.finish()?;
        self.progress.add_done(wanted);
        Ok(())
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
