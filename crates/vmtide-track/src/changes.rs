//! From bitmaps to ranges of bytes.

use crate::bitmap::{Layer, PAGE_BITS, PAGE_WORDS, Words};
use crate::options::Geometry;
use vmtide_block::ByteRange;

/// The most ranges in one page of an answer, whatever is asked for: 1 MiB of memory.
pub const MAX_RANGES_PER_PAGE: usize = 1 << 16;

/// A part of the answer to "what changed?".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangePage {
    /// Changed ranges: sorted, merged, inside the range asked for.
    pub ranges: Vec<ByteRange>,
    /// How many bytes of the range asked for this page speaks for, from its beginning; never 0 for a range
    /// that is not empty.
    pub processed_bytes: u64,
}

/// Several sets looked at as one.
struct Union<'a> {
    layers: &'a [Layer],
    page: Option<usize>,
    words: Box<Words>,
}

impl<'a> Union<'a> {
    fn new(layers: &'a [Layer]) -> Self {
        Self { layers, page: None, words: Box::new([0; PAGE_WORDS]) }
    }

    fn word(&mut self, block: u64) -> u64 {
        let page = usize::try_from(block / PAGE_BITS).unwrap_or(usize::MAX);
        if self.page != Some(page) {
            self.words.fill(0);
            for layer in self.layers {
                layer.or_page(page, &mut self.words);
            }
            self.page = Some(page);
        }
        let index = usize::try_from(block % PAGE_BITS / 64).unwrap_or(0);
        self.words.get(index).copied().unwrap_or(0)
    }

    /// The first block of `from..end` that is in the set, or that is not.
    fn next(&mut self, from: u64, end: u64, is_in: bool) -> Option<u64> {
        let mut at = from;
        while at < end {
            let word = self.word(at);
            let wanted = if is_in { word } else { !word } >> (at % 64);
            if wanted != 0 {
                let found = at + u64::from(wanted.trailing_zeros());
                return (found < end).then_some(found);
            }
            at = (at | 63) + 1;
        }
        None
    }
}

/// The blocks of `range` that are in any of `layers`, as ranges inside it. The range lies inside the disk.
pub(crate) fn collect(
    layers: &[Layer],
    geometry: &Geometry,
    range: ByteRange,
    max_ranges: usize,
) -> ChangePage {
    let granularity = u64::from(geometry.granularity_bytes);
    let max_ranges = max_ranges.clamp(1, MAX_RANGES_PER_PAGE);
    let mut ranges = Vec::new();
    let (mut at, end) = (range.offset / granularity, range.end().div_ceil(granularity));
    let mut union = Union::new(layers);
    while let Some(first) = union.next(at, end, true) {
        if ranges.len() == max_ranges {
            let processed_bytes = (first * granularity).saturating_sub(range.offset);
            return ChangePage { ranges, processed_bytes };
        }
        let after = union.next(first, end, false).unwrap_or(end);
        let changed =
            ByteRange::from_bounds(first * granularity, after.saturating_mul(granularity));
        ranges.push(changed.intersect(&range));
        at = after;
    }
    ChangePage { ranges, processed_bytes: range.length }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bitmap::AtomicBitmap;
    use std::sync::Arc;

    #[test]
    fn pages_of_an_answer_join_to_the_whole() {
        let geometry = Geometry::new(5 * 4096 * PAGE_BITS + 100, 4096, 1 << 20).unwrap();
        let one = Arc::new(AtomicBitmap::new(geometry.blocks()));
        let two = Arc::new(AtomicBitmap::new(geometry.blocks()));
        one.set_range(3, 7);
        two.set_range(6, 9);
        two.set_range(PAGE_BITS - 1, 3 * PAGE_BITS + 1);
        one.set_range(geometry.blocks() - 1, geometry.blocks());
        let layers = [Layer::Growing(one), Layer::Growing(two)];
        let whole = ByteRange::new(100, geometry.size_bytes - 100);
        let all = collect(&layers, &geometry, whole, 1000);
        let block = |first: u64, end: u64| {
            ByteRange::from_bounds(first * 4096, (end * 4096).min(geometry.size_bytes))
        };
        assert_eq!(
            all.ranges,
            [
                block(3, 9),
                block(PAGE_BITS - 1, 3 * PAGE_BITS + 1),
                block(5 * PAGE_BITS, 5 * PAGE_BITS + 1)
            ]
        );
        let (mut ranges, mut at) = (Vec::new(), whole.offset);
        while at < whole.end() {
            let page = collect(&layers, &geometry, ByteRange::from_bounds(at, whole.end()), 1);
            assert!(page.processed_bytes > 0 && page.ranges.len() <= 1);
            ranges.extend(page.ranges);
            at += page.processed_bytes;
        }
        assert_eq!(ranges, all.ranges);
        let inside = collect(&layers, &geometry, ByteRange::new(4 * 4096 + 7, 10), 9);
        assert_eq!(inside.ranges, [ByteRange::new(4 * 4096 + 7, 10)]);
        assert!(collect(&layers, &geometry, ByteRange::new(0, 0), 9).ranges.is_empty());
    }
}
