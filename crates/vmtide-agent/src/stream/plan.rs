//! Cutting a list of ranges into pieces.

use super::error::StreamError;
use super::ranges::RangeList;
use std::collections::VecDeque;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent};

/// The most parts of a piece: what bounds the headers in its buffer. With ranges of one sector a piece still
/// holds half a megabyte.
pub(super) const MAX_PARTS: usize = 1024;

/// Ranges that touch are read as one, but no more of them are looked at in one step than this, so that a step
/// takes the same time however many there are.
const MAX_JOINED_RANGES: usize = 1024;

/// For ranges shorter than this nobody is asked where they have holes: reading them is as cheap.
const EXTENTS_FROM_BYTES: u64 = 64 << 10;

/// How far ahead holes are asked for, so that the answer stays small.
const EXTENTS_WINDOW_BYTES: u64 = 1 << 30;

/// A step of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The head of a framed stream.
    Head,
    /// Read this.
    Data(ByteRange),
    /// Known to be zeros; in framed streams alone.
    Zero(ByteRange),
    /// The end of a framed stream, at this position.
    End(u64),
}

/// What one reader does at a time, and one buffer holds.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) parts: Vec<Part>,
    /// Bytes of the disk that it speaks for.
    pub(super) content_bytes: u64,
    /// Whether nothing comes after it.
    pub(super) last: bool,
}

/// Where a stream stands.
#[derive(Debug)]
pub(super) struct Planner {
    list: RangeList,
    index: usize,
    /// How much of the range at `index` is done.
    within: u64,
    position: u64,
    /// The position at which the stream ends.
    until: u64,
    framed: bool,
    extents: VecDeque<Extent>,
    head_due: bool,
    end_due: bool,
}

impl Planner {
    /// A plan for positions `from` to `until`, both at most the total of the list.
    pub(super) fn new(list: RangeList, from: u64, until: u64, framed: bool) -> Self {
        let until = until.min(list.total_bytes());
        let mut planner = Self {
            list,
            index: 0,
            within: 0,
            position: 0,
            until,
            framed,
            extents: VecDeque::new(),
            head_due: framed,
            end_due: framed,
        };
        planner.advance(from.min(until));
        planner
    }

    /// Bytes of content still to come.
    pub(super) const fn left_bytes(&self) -> u64 {
        self.until.saturating_sub(self.position)
    }

    /// The next piece, of at most `piece_bytes` of data; none at the end.
    pub(super) fn next_piece(
        &mut self,
        device: &dyn BlockDevice,
        piece_bytes: u64,
    ) -> Result<Option<Piece>, StreamError> {
        let before = self.position;
        let mut parts = Vec::new();
        let mut room = piece_bytes;
        if std::mem::take(&mut self.head_due) {
            parts.push(Part::Head);
        }
        while room > 0 && parts.len() < MAX_PARTS && self.left_bytes() > 0 {
            let run = self.run();
            let extent = self.extent_of(device, run)?;
            if extent.kind.reads_as_zero() {
                parts.push(Part::Zero(extent.range));
                self.advance(extent.range.length);
                continue;
            }
            let range = cut(extent.range, room, piece_bytes);
            parts.push(Part::Data(range));
            self.advance(range.length);
            room -= range.length;
            if range.length < extent.range.length {
                break;
            }
        }
        if self.left_bytes() == 0 && parts.len() < MAX_PARTS && std::mem::take(&mut self.end_due) {
            parts.push(Part::End(self.position));
        }
        let last = self.left_bytes() == 0 && !self.end_due;
        let content_bytes = self.position - before;
        Ok((!parts.is_empty()).then_some(Piece { parts, content_bytes, last }))
    }

    /// The bytes from here on that lie on the disk one after the other, as far as is looked.
    fn run(&self) -> ByteRange {
        let most = self.left_bytes().min(EXTENTS_WINDOW_BYTES);
        let ranges = self.list.as_slice().get(self.index..).unwrap_or_default();
        let Some(first) = ranges.first() else {
            return ByteRange::new(0, 0);
        };
        let start = first.offset.saturating_add(self.within);
        let mut end = first.end();
        for next in ranges.iter().take(MAX_JOINED_RANGES).skip(1) {
            if end - start >= most || (next.offset != end && !next.is_empty()) {
                break;
            }
            end = end.saturating_add(next.length);
        }
        ByteRange::new(start, (end - start).min(most))
    }

    /// What is known of the beginning of `run`: how far it is of one kind, and which.
    fn extent_of(
        &mut self,
        device: &dyn BlockDevice,
        run: ByteRange,
    ) -> Result<Extent, StreamError> {
        if !self.framed || run.length < EXTENTS_FROM_BYTES {
            return Ok(Extent { range: run, kind: vmtide_block::ExtentKind::Data });
        }
        while self.extents.front().is_some_and(|extent| extent.range.end() <= run.offset) {
            self.extents.pop_front();
        }
        if !self.extents.front().is_some_and(|extent| extent.range.contains(run.offset)) {
            self.extents = device.extents(run)?.into();
        }
        match self.extents.front() {
            Some(extent) if extent.range.contains(run.offset) => {
                Ok(Extent { range: extent.range.intersect(&run), kind: extent.kind })
            }
            _ => Err(StreamError::Read(BlockError::damaged(
                device.name(),
                format!("no extents reported at byte {}", run.offset),
            ))),
        }
    }

    /// Moves `length` bytes on, and over ranges that are empty.
    fn advance(&mut self, length: u64) {
        self.position += length;
        let mut left = length;
        while let Some(range) = self.list.as_slice().get(self.index) {
            let rest = range.length - self.within;
            if left < rest {
                self.within += left;
                return;
            }
            left -= rest;
            self.within = 0;
            self.index += 1;
        }
    }
}

/// As much of `range` as there is room for; where that is not all, up to a multiple of the piece if there is
/// one, so that no unit of the source is read by two pieces.
fn cut(range: ByteRange, room: u64, piece_bytes: u64) -> ByteRange {
    if range.length <= room {
        return range;
    }
    let end = range.offset.saturating_add(room);
    let aligned = [piece_bytes, 4096]
        .into_iter()
        .map(|unit| end - end % unit.max(1))
        .find(|aligned| *aligned > range.offset);
    ByteRange::from_bounds(range.offset, aligned.unwrap_or(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmtide_block::MemoryDevice;

    const DISK: usize = 1 << 20;

    /// All parts of a plan, checked for the rules of pieces.
    fn plan(ranges: &[ByteRange], from: u64, until: u64, framed: bool, piece: u64) -> Vec<Part> {
        let mut bytes = vec![1u8; DISK];
        bytes[256 << 10..640 << 10].fill(0);
        let device = MemoryDevice::from_bytes(bytes);
        let list = RangeList::new(ranges.to_vec(), DISK as u64).unwrap();
        let mut planner = Planner::new(list, from, until, framed);
        let mut all = Vec::new();
        let mut last = planner.left_bytes() == 0 && !framed;
        while let Some(next) = planner.next_piece(&device, piece).unwrap() {
            assert!(!last, "a piece after the last one");
            assert!(next.parts.len() <= MAX_PARTS);
            let data: u64 = next
                .parts
                .iter()
                .map(|part| match part {
                    Part::Data(range) => range.length,
                    _ => 0,
                })
                .sum();
            assert!(data <= piece);
            last = next.last;
            all.extend(next.parts);
        }
        assert!(last, "no piece was the last one");
        all
    }

    /// The single bytes of the disk that a plan speaks for, in order.
    fn bytes_of(ranges: impl Iterator<Item = ByteRange>) -> Vec<u64> {
        ranges.flat_map(|range| range.offset..range.end()).collect()
    }

    fn contents(parts: &[Part]) -> impl Iterator<Item = ByteRange> + '_ {
        parts.iter().filter_map(|part| match part {
            Part::Data(range) | Part::Zero(range) => Some(*range),
            Part::Head | Part::End(_) => None,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_plan_speaks_for_exactly_what_was_asked_for(
            pairs in prop::collection::vec((0..DISK as u64, 0..200_000u64), 0..12),
            from in 0..300_000u64, length in 0..500_000u64, framed: bool, shift in 12..19u32,
        ) {
            let ranges: Vec<_> = pairs.iter()
                .map(|(offset, length)| ByteRange::from_bounds(*offset, (offset + length).min(DISK as u64)))
                .collect();
            let all = bytes_of(ranges.iter().copied());
            let from = usize::try_from(from).unwrap().min(all.len());
            let until = (from + usize::try_from(length).unwrap()).min(all.len());
            let parts = plan(&ranges, from as u64, until as u64, framed, 1 << shift);
            prop_assert!(bytes_of(contents(&parts)) == all[from..until]);
            if framed {
                prop_assert_eq!(parts.first(), Some(&Part::Head));
                prop_assert_eq!(parts.last(), Some(&Part::End(until as u64)));
            }
        }
    }

    #[test]
    fn touching_ranges_are_read_as_one_and_holes_are_known() {
        let ranges: Vec<_> = (0..2048).map(|at| ByteRange::new(at * 512, 512)).collect();
        let parts = plan(&ranges, 0, u64::MAX, true, 256 << 10);
        assert_eq!(
            parts[1..3],
            [
                Part::Data(ByteRange::new(0, 256 << 10)),
                Part::Zero(ByteRange::new(256 << 10, 256 << 10)),
            ]
        );
        assert!(parts.len() < 12, "{parts:?}");
    }

    #[test]
    fn long_ranges_are_cut_where_the_source_has_its_units() {
        let parts = plan(&[ByteRange::new(1000, 700_000)], 0, u64::MAX, false, 64 << 10);
        let ends: Vec<_> = contents(&parts).map(|range| range.end()).collect();
        assert!(ends[..ends.len() - 1].iter().all(|end| end % (64 << 10) == 0), "{ends:?}");
    }

    #[test]
    fn a_device_that_knows_no_extents_is_an_error() {
        struct Silent;
        impl BlockDevice for Silent {
            fn name(&self) -> String {
                "silent".into()
            }
            fn size_bytes(&self) -> u64 {
                1 << 30
            }
            fn read_at(&self, _: &mut [u8], _: u64) -> vmtide_block::Result<()> {
                Ok(())
            }
            fn extents(&self, _: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
                Ok(Vec::new())
            }
        }
        let mut planner = Planner::new(RangeList::whole(1 << 30), 0, u64::MAX, true);
        assert!(planner.next_piece(&Silent, 1 << 18).is_err());
    }
}
