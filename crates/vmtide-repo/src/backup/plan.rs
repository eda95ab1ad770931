//! From changed ranges and extents to spans of work.

use super::session::ChangedRanges;
use crate::{BLOCK_BYTES, Result};
use vmtide_block::{BlockDevice, ByteRange, CancelToken, RangeSet, for_each_extent};

/// What a worker takes at a time: a stretch (format §6.1). It is read and stored in one pack in order. Shorter ones cut more
/// chunks short.
const STRETCH_BYTES: u64 = 4 << 20;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// The stretch of disk whose extents are asked for and kept at once: bounds the memory of a badly
/// fragmented image.
const WINDOW_BYTES: u64 = WINDOW as u64;
const WINDOW: usize = 1 << 30;

/// Changed ranges closer than this are asked about in one go: asking an image about a gap costs
/// less than another question over a network.
const GAP_BYTES: u64 = 16 << 20;

/// One piece of a disk, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Reads as zeros.
    Zero { first_block: u64, count: u64 },
    /// Has to be read.
    Data { first_block: u64, count: u64 },
}

/// Calls `emit` with pieces that cover exactly the blocks that `changed` touches, in order of
/// windows, data in stretches.
pub(super) fn plan(
    source: &dyn BlockDevice,
    changed: &ChangedRanges,
    cancel: &CancelToken,
    emit: &mut dyn FnMut(Piece) -> Result<()>,
) -> Result<()> {
    let size_bytes = source.size_bytes();
    match changed {
        ChangedRanges::Everything => {
            let mut at = 0;
            while at < size_bytes {
                let window = ByteRange::from_bounds(at, (at + WINDOW_BYTES).min(size_bytes));
                plan_window(source, &RangeSet::from(vec![window]), cancel, emit)?;
                at = window.end();
            }
        }
        ChangedRanges::Only(ranges) => {
            let aligned = ranges.clamp(size_bytes).align_outward(BLOCK, size_bytes);
            for window in windows(&aligned) {
                plan_window(source, &window, cancel, emit)?;
            }
        }
    }
    Ok(())
}

/// Groups ranges that lie close together, and cuts what is longer than a window.
fn windows(aligned: &RangeSet) -> impl Iterator<Item = RangeSet> + '_ {
    let mut rest = aligned
        .iter()
        .flat_map(|range| {
            (range.offset..range.end()).step_by(WINDOW).map(move |start| {
                ByteRange::from_bounds(start, (start + WINDOW_BYTES).min(range.end()))
            })
        })
        .peekable();
    std::iter::from_fn(move || {
        let first = rest.next()?;
        let mut group = RangeSet::from(vec![first]);
        let mut end = first.end();
        while let Some(next) = rest.peek() {
            if next.offset - end > GAP_BYTES || next.end() - first.offset > WINDOW_BYTES {
                break;
            }
            end = next.end();
            group.insert(*next);
            rest.next();
        }
        Some(group)
    })
}

fn plan_window(
    source: &dyn BlockDevice,
    wanted: &RangeSet,
    cancel: &CancelToken,
    emit: &mut dyn FnMut(Piece) -> Result<()>,
) -> Result<()> {
    let size_bytes = source.size_bytes();
    let (Some(first), Some(last)) = (wanted.as_slice().first(), wanted.as_slice().last()) else {
        return Ok(());
    };
    let hull = ByteRange::from_bounds(first.offset, last.end());
    let data = match data_in(source, hull, cancel) {
        Ok(data) => data,
        // A source may refuse questions outside what it tracks (QEMU's copy-before-write filter
        // with a bitmap does): ask only about what is wanted.
        Err(_) if wanted.as_slice().len() > 1 && !cancel.is_cancelled() => {
            let mut data = RangeSet::new();
            for range in wanted.iter() {
                data = data.union(&data_in(source, range, cancel)?);
            }
            data
        }
        Err(error) => return Err(error.into()),
    };
    let data = data.intersect(wanted).align_outward(BLOCK, size_bytes).intersect(wanted);
    let blocks = |range: ByteRange| {
        let first_block = range.offset / BLOCK;
        (first_block, range.end().div_ceil(BLOCK) - first_block)
    };
    for range in wanted.subtract(&data).iter() {
        let (first_block, count) = blocks(range);
        emit(Piece::Zero { first_block, count })?;
    }
    let stretch = STRETCH_BYTES / BLOCK;
    for range in data.iter() {
        let (mut first_block, mut left) = blocks(range);
        while left > 0 {
            // Stretches begin on multiples of their length, so that the same disk is cut the same
            // way every time.
            let count = (stretch - first_block % stretch).min(left);
            emit(Piece::Data { first_block, count })?;
            first_block += count;
            left -= count;
        }
    }
    Ok(())
}

fn data_in(
    source: &dyn BlockDevice,
    range: ByteRange,
    cancel: &CancelToken,
) -> vmtide_block::Result<RangeSet> {
    let mut data = RangeSet::new();
    for_each_extent(source, range, cancel, |extent| {
        if !extent.kind.reads_as_zero() {
            data.insert(extent.range);
        }
        Ok(())
    })?;
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmtide_block::{MemoryDevice, is_zero};

    proptest! {
        #[test]
        fn pieces_cover_what_changed_once_and_zero_pieces_are_zero(
            layout in prop::collection::vec((any::<bool>(), 1..80_000usize), 1..12),
            changed in prop::option::of(prop::collection::vec((0..400_000u64, 0..50_000u64), 0..8)),
        ) {
            let bytes: Vec<u8> = layout.iter()
                .flat_map(|(data, length)| std::iter::repeat_n(u8::from(*data), *length)).collect();
            let size = bytes.len() as u64;
            let disk = MemoryDevice::from_bytes(bytes.clone());
            let changed = changed.map_or(ChangedRanges::Everything, |pairs| {
                ChangedRanges::Only(pairs.into_iter().map(|(o, l)| ByteRange::new(o, l)).collect())
            });
            let expected = match &changed {
                ChangedRanges::Everything => RangeSet::full(size),
                ChangedRanges::Only(ranges) => ranges.clamp(size).align_outward(BLOCK, size),
            };
            let mut covered = RangeSet::new();
            let mut total = 0;
            plan(&disk, &changed, &CancelToken::new(), &mut |piece| {
                let (Piece::Zero { first_block, count } | Piece::Data { first_block, count }) = piece;
                let range = ByteRange::from_bounds(
                    first_block * BLOCK, ((first_block + count) * BLOCK).min(size));
                if matches!(piece, Piece::Zero { .. }) {
                    let bounds = usize::try_from(range.offset).unwrap()..usize::try_from(range.end()).unwrap();
                    assert!(is_zero(&bytes[bounds]));
                }
                total += range.length;
                covered.insert(range);
                Ok(())
            }).unwrap();
            prop_assert_eq!(&covered, &expected);
            prop_assert_eq!(total, expected.total_bytes());
        }
    }
}
