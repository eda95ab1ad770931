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

/// What a worker takes at a time, in blocks of content with what is no longer needed between them: 16 MiB. Enough that
/// neighbours are fetched together, little enough that the last ones are shared. Counted in blocks, not in frames:
/// those of scattered changes are small.
const TASK_BLOCKS: u32 = 4096;

/// Stored bytes between two wanted frames that are fetched and thrown away rather than asked for around: a request to a
/// distant store takes as long as a megabyte, a seek of a disk as half of one. More is a waste where the store is fast: a
/// hundredth of a frame's decoding for each 16 KiB.
const GAP_BYTES: u64 = 128 << 10;

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

    /// Takes pieces that were resolved beside these.
    fn append(&mut self, other: Self) -> Result<()> {
        let numbers =
            other.packs.iter().map(|id| self.number_of(*id)).collect::<Result<Vec<u32>>>()?;
        let renumbered = |piece: Piece| Piece { pack: numbers[piece.pack as usize], ..piece };
        self.pieces.extend(other.pieces.into_iter().map(renumbered));
        Ok(())
    }

    /// Follows every run to the pack it is in now and cuts it into pieces of frames. Opens each pack
    /// that is named once, whatever the order of the runs on the disk, and as many at a time as there are workers: the
    /// disk of a machine that was backed up for a year lies in hundreds of packs, and opening one takes two requests.
    fn resolve(mut self, packs: &PackSet, workers: usize, cancel: &CancelToken) -> Result<Self> {
        self.sort();
        let is_healed = !packs.repairs()?.healed.is_empty();
        let groups: Vec<_> = self.pieces.chunk_by(|a, b| a.pack == b.pack).collect();
        let next = AtomicUsize::new(0);
        let work = || -> Result<Vec<(usize, Self)>> {
            let mut done = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(runs) = groups.get(number) else { return Ok(done) };
                cancel.check()?;
                let pack = self.packs[runs[0].pack as usize];
                let resolved =
                    Self::resolve_group(packs, pack, runs, is_healed).inspect_err(|_| {
                        // The others need not go on.
                        next.store(groups.len(), Ordering::Relaxed);
                    })?;
                done.push((number, resolved));
            }
        };
        let mut parts = on_threads(workers.min(groups.len()), &work)?;
        // In the order of the disk, as far as packs have one: so a restore writes it about from front to back.
        parts.sort_unstable_by_key(|(number, _)| *number);
        let mut resolved = Self::default();
        parts.into_iter().try_for_each(|(_, part)| resolved.append(part))?;
        resolved.sort();
        Ok(resolved)
    }

    /// The pieces of the runs that the map has in one pack.
    fn resolve_group(
        packs: &PackSet,
        pack: ObjectId,
        runs: &[Piece],
        is_healed: bool,
    ) -> Result<Self> {
        let mut resolved = Self::default();
        match packs.place(pack) {
            Ok(Place::Pack(pack)) if !is_healed => {
                runs.iter().try_for_each(|run| resolved.add_pieces(&pack, *run))?;
            }
            // Moved, damaged or healed: run by run.
            _ => runs.iter().try_for_each(|run| resolved.follow(packs, pack, *run))?,
        }
        Ok(resolved)
    }

    /// The pieces of some whole frames of one pack each.
    fn tasks(&self) -> Vec<Range<usize>> {
        let mut tasks = Vec::new();
        let mut first = 0;
        for (at, pair) in (1..).zip(self.pieces.windows(2)) {
            let (begun, last, piece) = (self.pieces[first], pair[0], pair[1]);
            let is_far = piece.ordinal.saturating_sub(begun.ordinal) >= TASK_BLOCKS;
            if piece.pack != begun.pack || (is_far && piece.frame != last.frame) {
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
                if count == 0 {
                    // Only fetched because it lies between two that are wanted.
                    continue;
                }
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

/// The frames at the beginning of `pieces` that are worth fetching together: neighbours, and those with little between
/// them.
fn batch(pack: &Pack, pieces: &[Piece]) -> Range<usize> {
    let first = pieces.first().map_or(0, |piece| piece.frame as usize);
    let frames = pack.frames();
    let end_of = |frame: usize| frames[frame].offset + u64::from(frames[frame].stored_length);
    let begin = frames[first].offset;
    let mut last = first;
    for frame in pieces.iter().map(|piece| piece.frame as usize) {
        let gap = frames[frame].offset.saturating_sub(end_of(last));
        if gap > GAP_BYTES || (frame > first && end_of(frame) - begin > FETCH_BYTES) {
            break;
        }
        last = frame;
    }
    first..last + 1
}

/// Runs `work` on so many threads and puts together what they made, or answers with the error of one.
fn on_threads<T: Send>(
    threads: usize,
    work: &(dyn Fn() -> Result<Vec<T>> + Sync),
) -> Result<Vec<T>> {
    if threads <= 1 {
        return work();
    }
    let (mut all, mut failed) = (Vec::new(), None);
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for handle in handles {
            match handle.join() {
                Ok(Ok(made)) => all.extend(made),
                Ok(Err(error)) => failed = failed.take().or(Some(error)),
                Err(_) => {
                    failed = Some(RepoError::Invalid("a reader ended abnormally".into()));
                }
            }
        }
    });
    failed.map_or(Ok(all), Err)
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
                let window = window.resolve(&self.packs, workers, cancel)?;
                self.read_window(&window, workers, cancel, take)?;
            }
            at = next;
        }
        Ok(())
    }
}
