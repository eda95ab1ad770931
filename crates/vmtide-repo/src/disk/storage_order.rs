//! All data of a disk in the order of the packs: every frame is read and decoded once, whatever
//! places of the disk its chunks belong to.
//!
//! The disk is dealt with in windows of at most some [`ENOUGH_RUNS`] runs. The runs of a window are
//! found from the map, followed to the packs they are in now, sorted by their places there, and cut into tasks
//! of some frames of one pack, which workers take in order. Data that is stored as it lies on the
//! disk, as after a full backup, comes in whole frames.

use super::point_disk::{BLOCK, FETCH_BYTES, PointDisk, index, narrow, too_far};
use super::{PackSet, Place};
use crate::envelope::ObjectKind;
use crate::map::{MapRun, Target};
use crate::pack::{FrameDecoder, MAX_FRAME_BYTES, Pack};
use crate::{Location, ObjectId, RepoError, Result};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use vmtide_block::{AlignedBuffer, BlockError, CancelToken, StorageOrder, TakePiece};

/// A window takes no more runs when it has so many: 18 MiB of memory, and 48 GiB of disk where every 64
/// KiB were written on another day. A frame with pieces in several windows is decoded once in each.
const ENOUGH_RUNS: usize = 3 << 18;

/// The stretch of disk whose runs are asked for at once: a window has at most so many more.
const STEP_BLOCKS: u64 = 1 << 18;

/// The frames that a worker takes at a time: many enough that neighbours are fetched together, few
/// enough that the last ones are shared.
const TASK_FRAMES: u32 = 8;

/// Some blocks of the disk that are neighbours in one frame.
#[derive(Clone, Copy, Debug)]
struct Piece {
    first_block: u64,
    /// Position in the window's list of packs.
    pack: u32,
    frame: u32,
    ordinal: u32,
    count: u32,
}

/// A stretch of the disk, ready to be read.
#[derive(Default)]
struct Window {
    packs: Vec<ObjectId>,
    numbers: HashMap<ObjectId, u32>,
    pieces: Vec<Piece>,
}

impl Window {
    fn number_of(&mut self, pack: ObjectId) -> Result<u32> {
        if let Some(number) = self.numbers.get(&pack) {
            return Ok(*number);
        }
        let number = narrow(self.packs.len() as u64)?;
        self.packs.push(pack);
        self.numbers.insert(pack, number);
        Ok(number)
    }

    /// Takes a run as the map has it; its frame is not known yet.
    fn add_run(&mut self, run: MapRun) -> Result<()> {
        let Target::Data { pack, ordinal } = run.target else { return Ok(()) };
        let (pack, count) = (self.number_of(pack)?, narrow(run.count)?);
        self.pieces.push(Piece { first_block: run.first_block, pack, frame: 0, ordinal, count });
        Ok(())
    }

    /// Adds the pieces that `run` makes in `pack`, one for each frame.
    fn add_pieces(&mut self, pack: &Pack, run: Piece) -> Result<()> {
        let number = self.number_of(pack.id())?;
        let mut rest = Piece { pack: number, ..run };
        while rest.count > 0 {
            let frame = pack.frame_of(rest.ordinal)?;
            let count = rest.count.min(pack.blocks_of(frame).end - rest.ordinal);
            self.pieces.push(Piece { frame: narrow(frame as u64)?, count, ..rest });
            rest.first_block += u64::from(count);
            rest.ordinal = rest.ordinal.checked_add(count).ok_or_else(too_far)?;
            rest.count -= count;
        }
        Ok(())
    }

    /// Adds the pieces of `run`, wherever the blocks it has in `pack` are now.
    fn follow(&mut self, packs: &PackSet, pack: ObjectId, run: Piece) -> Result<()> {
        let mut rest = run;
        while rest.count > 0 {
            let place = Location { pack, ordinal: rest.ordinal };
            let (found, ordinal, count) = packs.resolve(place, rest.count)?;
            self.add_pieces(&found, Piece { ordinal, count, ..rest })?;
            rest.first_block += u64::from(count);
            rest.ordinal = rest.ordinal.checked_add(count).ok_or_else(too_far)?;
            rest.count -= count;
        }
        Ok(())
    }

    fn sort(&mut self) {
        self.pieces.sort_unstable_by_key(|piece| (piece.pack, piece.ordinal, piece.first_block));
    }

    /// Follows every run to the pack it is in now and cuts it into pieces of frames. Opens each pack
    /// that is named once, whatever the order of the runs on the disk.
    fn resolve(mut self, packs: &PackSet) -> Result<Self> {
        self.sort();
        let mut resolved =
            Self { pieces: Vec::with_capacity(self.pieces.len()), ..Self::default() };
        let is_healed = !packs.repairs()?.healed.is_empty();
        for runs in self.pieces.chunk_by(|a, b| a.pack == b.pack) {
            let pack = self.packs[runs[0].pack as usize];
            match packs.place(pack) {
                Ok(Place::Pack(pack)) if !is_healed => {
                    runs.iter().try_for_each(|run| resolved.add_pieces(&pack, *run))?;
                }
                // Moved, damaged or healed: run by run.
                _ => runs.iter().try_for_each(|run| resolved.follow(packs, pack, *run))?,
            }
        }
        resolved.sort();
        Ok(resolved)
    }

    /// The pieces of some frames of one pack each.
    fn tasks(&self) -> Vec<Range<usize>> {
        let mut tasks = Vec::new();
        let mut first = 0;
        for (at, piece) in self.pieces.iter().enumerate() {
            let begun = self.pieces[first];
            if piece.pack != begun.pack || piece.frame - begun.frame >= TASK_FRAMES {
                tasks.push(first..at);
                first = at;
            }
        }
        tasks.push(first..self.pieces.len());
        tasks
    }
}

/// A worker's memory.
struct Worker {
    decoder: FrameDecoder,
    stored: Vec<u8>,
    content: AlignedBuffer,
}

impl PointDisk {
    /// The next window, and where the one after it begins.
    fn window(&self, from: u64) -> Result<(Window, u64)> {
        let mut window = Window::default();
        let (mut at, end) = (from, self.size_bytes.div_ceil(BLOCK));
        while at < end && (at == from || window.pieces.len() < ENOUGH_RUNS) {
            let next = (at + STEP_BLOCKS).min(end);
            self.map.for_each_run(at..next, &mut |run| window.add_run(run))?;
            at = next;
        }
        Ok((window, at))
    }

    fn read_window(
        &self,
        window: &Window,
        workers: usize,
        cancel: &CancelToken,
        take: &TakePiece<'_>,
    ) -> Result<(), BlockError> {
        let tasks = window.tasks();
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let work = || -> Result<(), BlockError> {
            let mut worker = Worker {
                decoder: FrameDecoder::new()?,
                stored: Vec::new(),
                content: AlignedBuffer::new(MAX_FRAME_BYTES),
            };
            while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                if failed.load(Ordering::Relaxed) {
                    return Err(BlockError::Cancelled);
                }
                cancel.check()?;
                self.read_task(window, &window.pieces[task.clone()], &mut worker, take)?;
            }
            Ok(())
        };
        let mut result = Ok(());
        std::thread::scope(|scope| {
            let handles: Vec<_> = (0..workers.min(tasks.len()))
                .map(|_| {
                    scope.spawn(|| {
                        let outcome = work();
                        failed.fetch_or(outcome.is_err(), Ordering::Relaxed);
                        outcome
                    })
                })
                .collect();
            for handle in handles {
                let outcome = handle.join().unwrap_or_else(|_| {
                    failed.store(true, Ordering::Relaxed);
                    Err(BlockError::damaged(self.name.clone(), "a reader ended abnormally"))
                });
                // Others only stop because one failed: its error is the one to show.
                if matches!(result, Ok(()) | Err(BlockError::Cancelled)) && outcome.is_err() {
                    result = outcome;
                }
            }
        });
        result
    }

    /// Reads the frames of one task, neighbours together, and hands over its pieces.
    fn read_task(
        &self,
        window: &Window,
        pieces: &[Piece],
        worker: &mut Worker,
        take: &TakePiece<'_>,
    ) -> Result<(), BlockError> {
        let Some(first) = pieces.first() else { return Ok(()) };
        let id = window.packs[first.pack as usize];
        let Place::Pack(pack) = self.packs.place(id)? else {
            // It was there a moment ago, and who reads keeps `prune` away.
            let name = ObjectKind::Pack.object_name(id);
            return Err(RepoError::damaged(name, "was moved while it was read").into());
        };
        let mut rest = pieces;
        while !rest.is_empty() {
            let frames = batch(&pack, rest);
            let stored = pack.read_stored(frames.clone(), &mut worker.stored)?;
            let mut stored = &mut *stored;
            for number in frames {
                let length = pack.frames()[number].stored_length as usize;
                let (this, after) = std::mem::take(&mut stored).split_at_mut(length);
                stored = after;
                let count = rest.iter().take_while(|piece| piece.frame as usize == number).count();
                let (now, later) = rest.split_at(count);
                let content = &mut worker.content[..pack.content_length(number)];
                pack.decode(number, this, content, &mut worker.decoder)?;
                let begin = pack.blocks_of(number).start;
                for piece in now {
                    let from = u64::from(piece.ordinal - begin) * BLOCK;
                    let offset = piece.first_block * BLOCK;
                    let bytes = (u64::from(piece.count) * BLOCK).min(self.size_bytes - offset);
                    take(&content[index(from)..index(from + bytes)], offset)?;
                }
                rest = later;
            }
        }
        Ok(())
    }
}

/// The frames at the beginning of `pieces` that are neighbours and worth fetching together.
fn batch(pack: &Pack, pieces: &[Piece]) -> Range<usize> {
    let first = pieces.first().map_or(0, |piece| piece.frame as usize);
    let (mut end, mut bytes) = (first, 0);
    for piece in pieces {
        let frame = piece.frame as usize;
        if frame < end {
            continue;
        }
        bytes += u64::from(pack.frames()[frame].stored_length);
        if frame > end || (end > first && bytes > FETCH_BYTES) {
            break;
        }
        end = frame + 1;
    }
    first..end
}

impl StorageOrder for PointDisk {
    fn read_all(
        &self,
        workers: usize,
        cancel: &CancelToken,
        take: &TakePiece<'_>,
    ) -> Result<(), BlockError> {
        let (mut at, end) = (0, self.size_bytes.div_ceil(BLOCK));
        while at < end {
            cancel.check()?;
            let (window, next) = self.window(at)?;
            if !window.pieces.is_empty() {
                self.read_window(&window.resolve(&self.packs)?, workers, cancel, take)?;
            }
            at = next;
        }
        Ok(())
    }
}
