//! Making a delta: from a disk and the ranges of it that changed, or by comparing it with its base.
//!
//! A planner walks the changed ranges and asks the disk what they hold; workers read, look for zeros,
//! compare, compress and digest one frame each; the calling thread writes the frames in order.

use crate::format::{MAX_EXTENTS, shorten};
use crate::frame::{EncodedFrame, Encoder, Frame};
use crate::pipeline::{default_workers, run_in_order};
use crate::writer::StreamWriter;
use crate::{DeltaError, DeltaHeader, DeltaSummary, Result};
use std::io::Write;
use vmtide_block::{
    BlockDevice, ByteRange, CancelToken, Extent, ExtentKind, Progress, RangeSet, for_each_extent,
    is_zero,
};

/// Zeros inside data that are shorter than this stay data, in bytes: compressed they are nothing, and
/// as extents of their own they would cut what is written to the target into small pieces.
const ZERO_RUN_BYTES: usize = 64 << 10;

/// The smallest unit in which data is compared and zeros are looked for, in bytes.
const MIN_GRAIN_BYTES: usize = 4096;

/// The most extents that one frame is planned with. Workers cut them further; together that stays
/// below [`MAX_EXTENTS`].
const MAX_PLANNED: usize = 4096;

/// How much that reads as zeros is held against the base at once, in bytes, and how many extents of a
/// plan that counts as: the base may hold data in every other block of it.
const COMPARED_EMPTY_BYTES: u64 = 64 << 20;
const COMPARED_EMPTY_WEIGHT: usize = 256;

/// Where a worker begins another frame. Half of what is allowed: what one piece of data adds fits into
/// the other half.
const SPLIT_EXTENTS: usize = (MAX_EXTENTS / 2) as usize;

/// How to make a delta.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The level of zstd, from -7 (fastest) to 22; none stores the data as it is.
    pub level: Option<i32>,
    /// The number of workers; each holds a frame in three forms, some 3 MiB.
    pub workers: usize,
    /// With a base: keep only what differs from it, in units of the header's granularity.
    pub differing_only: bool,
    /// With a base: record in every frame a digest of what the base holds there, by which a wrong
    /// base is found before anything is written to it.
    pub base_digests: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        let workers = default_workers();
        Self { level: Some(1), workers, differing_only: false, base_digests: true }
    }
}

/// What a delta is made from.
#[derive(Clone, Copy)]
pub struct DeltaSource<'a> {
    /// The disk as it is at the moment that the delta leads to.
    pub device: &'a dyn BlockDevice,
    /// The disk as it was at the moment that the delta is counted from, where that can be read.
    pub base: Option<&'a dyn BlockDevice>,
    /// The ranges that may differ. What is in none of them is the same at both moments; what lies
    /// past the end of the disk is left out.
    pub changed: &'a RangeSet,
}

/// Makes a delta and writes it to `out`, which is never sought in. The header's sizes must be those
/// of the disks. Progress counts bytes of changed ranges.
///
/// # Errors
/// [`DeltaError::Unsupported`] where the header does not fit the disks; those of reading the disks
/// and of writing; [`vmtide_block::BlockError::Cancelled`]. What was written by then is no delta: it
/// has no trailer.
pub fn create_delta(
    source: &DeltaSource<'_>,
    header: &DeltaHeader,
    options: &CreateOptions,
    out: &mut dyn Write,
    progress: &Progress,
    cancel: &CancelToken,
) -> Result<DeltaSummary> {
    const NAME: &str = "the new delta";
    check_sizes(source, header)?;
    let changed = source.changed.clamp(header.size_bytes);
    progress.add_total(changed.total_bytes());
    let mut writer = StreamWriter::begin(out, header.clone(), NAME)?;
    let differing_only = options.differing_only && source.base.is_some();
    let mut planner =
        Planner::new(source.device, &changed, header.max_frame_bytes, differing_only, cancel);
    let maker = FrameMaker {
        source,
        differing_only,
        base_digests: options.base_digests && source.base.is_some(),
        grain_bytes: usize::try_from(header.granularity_bytes)
            .unwrap_or(MIN_GRAIN_BYTES)
            .clamp(MIN_GRAIN_BYTES, ZERO_RUN_BYTES),
        progress,
        cancel,
    };
    // A level that zstd does not take is found before threads are made.
    Encoder::new(options.level)?;
    run_in_order(
        options.workers,
        cancel,
        || planner.next_plan(),
        || (Encoder::new(options.level), [Vec::new(), Vec::new()]),
        |(encoder, buffers), plan| {
            let encoder = encoder.as_mut().map_err(|_| {
                DeltaError::unsupported(NAME, "zstd cannot be prepared: too little memory")
            })?;
            let frames = maker.make(&plan, buffers)?;
            frames.iter().map(|frame| encoder.encode(frame)).collect::<Result<Vec<_>>>()
        },
        |frames: Vec<EncodedFrame>| frames.iter().try_for_each(|frame| writer.append(frame)),
    )?;
    writer.finish()
}

fn check_sizes(source: &DeltaSource<'_>, header: &DeltaHeader) -> Result<()> {
    let refuse = |detail: String| Err(DeltaError::unsupported("the new delta", detail));
    let size_bytes = source.device.size_bytes();
    if size_bytes != header.size_bytes {
        return refuse(format!(
            "{} has {size_bytes} bytes, and the header says {}",
            source.device.name(),
            header.size_bytes
        ));
    }
    match source.base.map(|base| base.size_bytes()) {
        Some(size) if size != header.base_size_bytes => refuse(format!(
            "the base has {size} bytes, and the header says {}",
            header.base_size_bytes
        )),
        _ => Ok(()),
    }
}

/// Cuts the changed ranges into what fits a frame.
struct Planner<'a> {
    device: &'a dyn BlockDevice,
    /// What is left, the first range last.
    ranges: Vec<ByteRange>,
    /// Extents of the first range that the device has answered with already, in reverse.
    known: Vec<Extent>,
    frame_bytes: u64,
    /// Whether what reads as zeros is compared with the base.
    compares: bool,
    cancel: &'a CancelToken,
}

impl<'a> Planner<'a> {
    fn new(
        device: &'a dyn BlockDevice,
        changed: &RangeSet,
        frame_bytes: u32,
        compares: bool,
        cancel: &'a CancelToken,
    ) -> Self {
        let mut ranges = changed.as_slice().to_vec();
        ranges.reverse();
        let frame_bytes = frame_bytes.into();
        Self { device, ranges, known: Vec::new(), frame_bytes, compares, cancel }
    }

    /// The next extent of the changed ranges.
    fn next_extent(&mut self) -> Result<Option<Extent>> {
        while self.known.is_empty() {
            let Some(range) = self.ranges.pop() else {
                return Ok(None);
            };
            self.cancel.check()?;
            // A prefix is answered with; what is left of the range is asked for later.
            let answer = self.device.extents(range)?;
            let mut at = range.offset;
            for extent in answer {
                if extent.range.offset != at
                    || extent.range.is_empty()
                    || extent.range.end() > range.end()
                {
                    return Err(DeltaError::damaged(
                        self.device.name(),
                        format!(
                            "extent {} does not continue the answer at byte {at}",
                            extent.range
                        ),
                    ));
                }
                at = extent.range.end();
                self.known.push(extent);
            }
            if at == range.offset && !range.is_empty() {
                return Err(DeltaError::damaged(
                    self.device.name(),
                    format!("no extents reported at byte {at}"),
                ));
            }
            self.known.reverse();
            let rest = ByteRange::from_bounds(at, range.end());
            if !rest.is_empty() {
                self.ranges.push(rest);
            }
        }
        Ok(self.known.pop())
    }

    /// The extents of the next frame, none where there are no more.
    fn next_plan(&mut self) -> Result<Option<Vec<Extent>>> {
        let mut plan: Vec<Extent> = Vec::new();
        let mut room = self.frame_bytes;
        let mut weight = 0;
        while weight < MAX_PLANNED {
            let Some(extent) = self.next_extent()? else {
                break;
            };
            if extent.kind != ExtentKind::Data {
                let range = extent.range;
                let limit = if self.compares { COMPARED_EMPTY_BYTES } else { u64::MAX };
                let piece = ByteRange::new(range.offset, range.length.min(limit));
                weight += if self.compares { COMPARED_EMPTY_WEIGHT } else { 1 };
                plan.push(Extent { range: piece, kind: extent.kind });
                self.put_back(piece.end(), extent);
                continue;
            }
            weight += 1;
            // Up to a multiple, so that no unit of the source is read for two frames.
            let range = extent.range;
            let to_multiple = self.frame_bytes - range.offset % self.frame_bytes;
            let piece = ByteRange::new(range.offset, range.length.min(to_multiple));
            if piece.length > room {
                self.known.push(extent);
                break;
            }
            room -= piece.length;
            plan.push(Extent { range: piece, kind: ExtentKind::Data });
            self.put_back(piece.end(), extent);
        }
        Ok((!plan.is_empty()).then_some(plan))
    }

    /// Keeps what is left of an extent from byte `from` of the disk for the next frame.
    fn put_back(&mut self, from: u64, extent: Extent) {
        let range = ByteRange::from_bounds(from, extent.range.end());
        if !range.is_empty() {
            self.known.push(Extent { range, kind: extent.kind });
        }
    }
}

/// What becomes of one grain.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Grain {
    Same,
    Zero,
    Data,
}

/// Turns plans into frames.
struct FrameMaker<'a> {
    source: &'a DeltaSource<'a>,
    differing_only: bool,
    base_digests: bool,
    grain_bytes: usize,
    progress: &'a Progress,
    cancel: &'a CancelToken,
}

impl FrameMaker<'_> {
    /// The frames of a plan: one, none where nothing of it differs, more where there are too many
    /// extents for one.
    fn make(&self, plan: &[Extent], buffers: &mut [Vec<u8>; 2]) -> Result<Vec<Frame>> {
        let mut frames =
            Frames { done: Vec::new(), frame: Frame::default(), hasher: self.hasher() };
        for extent in plan {
            self.cancel.check()?;
            match extent.kind {
                ExtentKind::Data => self.add_data(extent.range, buffers, &mut frames)?,
                kind => self.add_empty(extent.range, kind, &mut frames)?,
            }
            self.progress.add_done(extent.range.length);
        }
        frames.end_frame(None);
        Ok(frames.done)
    }

    fn hasher(&self) -> Option<blake3::Hasher> {
        self.base_digests.then(blake3::Hasher::new)
    }

    /// A range that reads as zeros now: left out where the base is known to read so as well.
    fn add_empty(&self, range: ByteRange, kind: ExtentKind, frames: &mut Frames) -> Result<()> {
        let Some(base) = self.source.base.filter(|_| self.differing_only) else {
            frames.room(self).push_empty(range, kind);
            return Ok(());
        };
        let inside = range.intersect(&ByteRange::new(0, base.size_bytes()));
        for_each_extent(base, inside, self.cancel, |extent| {
            if !extent.kind.reads_as_zero() {
                frames.room(self).push_empty(extent.range, kind);
            }
            Ok(())
        })?;
        Ok(())
    }

    fn add_data(
        &self,
        range: ByteRange,
        buffers: &mut [Vec<u8>; 2],
        frames: &mut Frames,
    ) -> Result<()> {
        let [new, old] = buffers;
        let length = usize::try_from(range.length).unwrap_or(usize::MAX);
        new.resize(length, 0);
        self.source.device.read_at(new, range.offset)?;
        if let Some(base) = self.source.base {
            old.resize(length, 0);
            read_base(base, old, range.offset)?;
        }
        self.progress.add_transferred(range.length);
        frames.room(self);
        for (kind, start, end) in self.runs(new, old) {
            let at = range.offset + start as u64;
            match kind {
                Grain::Same => {}
                Grain::Zero => {
                    let zeros = ByteRange::new(at, (end - start) as u64);
                    frames.frame.push_empty(zeros, ExtentKind::Zero);
                }
                Grain::Data => {
                    frames.frame.push_data(at, &new[start..end]);
                    if let Some(hasher) = &mut frames.hasher {
                        hasher.update(&old[start..end]);
                    }
                }
            }
        }
        Ok(())
    }

    /// What becomes of which part of a piece of data. `old` is as long, or empty without a base.
    fn runs(&self, new: &[u8], old: &[u8]) -> Vec<(Grain, usize, usize)> {
        let mut runs: Vec<(Grain, usize, usize)> = Vec::new();
        let mut at = 0;
        while at < new.len() {
            let end = (at + self.grain_bytes).min(new.len());
            let grain = &new[at..end];
            let kind = if self.differing_only && old.get(at..end) == Some(grain) {
                Grain::Same
            } else if is_zero(grain) {
                Grain::Zero
            } else {
                Grain::Data
            };
            match runs.last_mut() {
                Some(last) if last.0 == kind => last.2 = end,
                _ => runs.push((kind, at, end)),
            }
            at = end;
        }
        keep_short_zeros(runs)
    }
}

/// The frames that come of one plan.
struct Frames {
    done: Vec<Frame>,
    frame: Frame,
    /// Takes what the base holds where the frame has data.
    hasher: Option<blake3::Hasher>,
}

impl Frames {
    /// A frame with room for what one piece of the plan adds.
    fn room(&mut self, maker: &FrameMaker<'_>) -> &mut Frame {
        if self.frame.extents.len() >= SPLIT_EXTENTS {
            self.end_frame(maker.hasher());
        }
        &mut self.frame
    }

    fn end_frame(&mut self, next: Option<blake3::Hasher>) {
        let mut frame = std::mem::take(&mut self.frame);
        let hasher = std::mem::replace(&mut self.hasher, next);
        if !frame.extents.is_empty() {
            frame.base_digest = hasher.map(|hasher| shorten(&hasher.finalize()));
            self.done.push(frame);
        }
    }
}

/// Makes short runs of zeros that touch data into data.
fn keep_short_zeros(runs: Vec<(Grain, usize, usize)>) -> Vec<(Grain, usize, usize)> {
    let mut out: Vec<(Grain, usize, usize)> = Vec::with_capacity(runs.len());
    for (index, (kind, start, end)) in runs.iter().copied().enumerate() {
        let touches_data = index
            .checked_sub(1)
            .and_then(|before| runs.get(before))
            .is_some_and(|run| run.0 == Grain::Data)
            || runs.get(index + 1).is_some_and(|run| run.0 == Grain::Data);
        let short = end - start < ZERO_RUN_BYTES;
        let kind = if kind == Grain::Zero && short && touches_data { Grain::Data } else { kind };
        match out.last_mut() {
            Some(last) if last.0 == kind => last.2 = end,
            _ => out.push((kind, start, end)),
        }
    }
    out
}

/// Fills `buffer` with what the base holds from `offset` on; what lies past its end is zeros, as on a disk that grew.
pub(crate) fn read_base(base: &dyn BlockDevice, buffer: &mut [u8], offset: u64) -> Result<()> {
    let range = ByteRange::new(offset, buffer.len() as u64);
    let inside = range.intersect(&ByteRange::new(0, base.size_bytes()));
    let length = usize::try_from(inside.length).unwrap_or(0);
    let (held, past) = buffer.split_at_mut(length);
    past.fill(0);
    if !held.is_empty() {
        base.read_at(held, offset)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_zeros_beside_data_are_data() {
        let k = 1 << 10;
        let runs = vec![
            (Grain::Data, 0, 4 * k),
            (Grain::Zero, 4 * k, 8 * k),
            (Grain::Data, 8 * k, 12 * k),
            (Grain::Zero, 12 * k, 80 * k),
            (Grain::Same, 80 * k, 90 * k),
            (Grain::Zero, 90 * k, 94 * k),
        ];
        let expected = vec![
            (Grain::Data, 0, 12 * k),
            (Grain::Zero, 12 * k, 80 * k),
            (Grain::Same, 80 * k, 90 * k),
            (Grain::Zero, 90 * k, 94 * k),
        ];
        assert!(keep_short_zeros(runs) == expected);
    }
}
