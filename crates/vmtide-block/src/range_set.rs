//! Sets of bytes as sorted, merged ranges: the arithmetic of changed ranges.
//!
//! Change tracking answers with ranges in any order, overlapping, unaligned or beyond the end of
//! a disk that shrank (CBT and RCT both do). Everything downstream wants them sorted, merged and
//! clamped once, here. Making a set larger than the truth is always safe for a backup (more is
//! read); making it smaller never is, so every lossy operation rounds outward.

use crate::ByteRange;
use serde::{Deserialize, Serialize};

/// A set of bytes kept as sorted ranges that neither touch nor overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<ByteRange>", into = "Vec<ByteRange>")]
pub struct RangeSet {
    ranges: Vec<ByteRange>,
}

impl RangeSet {
    /// The empty set.
    pub const fn new() -> Self {
        Self { ranges: Vec::new() }
    }

    /// The set of all bytes of a disk of `size_bytes`.
    pub fn full(size_bytes: u64) -> Self {
        Self::from(vec![ByteRange::new(0, size_bytes)])
    }

    /// The ranges: sorted by offset, none empty, none touching the next.
    pub fn as_slice(&self) -> &[ByteRange] {
        &self.ranges
    }

    /// The ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.ranges.iter().copied()
    }

    /// Whether no byte is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The number of bytes in the set.
    pub fn total_bytes(&self) -> u64 {
        self.ranges.iter().fold(0, |sum, range| sum.saturating_add(range.length))
    }

    /// Adds a range. Amortised constant time when ranges arrive in order, as trackers send them.
    /// A range past `u64::MAX` is cut there.
    pub fn insert(&mut self, range: ByteRange) {
        let range = ByteRange::from_bounds(range.offset, range.end());
        if range.is_empty() {
            return;
        }
        match self.ranges.last_mut() {
            Some(last) if range.offset > last.end() => self.ranges.push(range),
            Some(last) if range.offset >= last.offset => {
                let end = last.end().max(range.end());
                *last = ByteRange::from_bounds(last.offset, end);
            }
            None => self.ranges.push(range),
            Some(_) => self.insert_out_of_order(range),
        }
    }

    fn insert_out_of_order(&mut self, range: ByteRange) {
        // Ranges that touch or overlap the new one: [first, past).
        let first = self.ranges.partition_point(|r| r.end() < range.offset);
        let past = self.ranges.partition_point(|r| r.offset <= range.end());
        if first >= past {
            self.ranges.insert(first, range);
            return;
        }
        let start = range.offset.min(self.ranges[first].offset);
        let end = range.end().max(self.ranges[past - 1].end());
        self.ranges.splice(first..past, [ByteRange::from_bounds(start, end)]);
    }

    /// Whether every byte of `range` is in the set. True for an empty range.
    pub fn contains_range(&self, range: &ByteRange) -> bool {
        if range.is_empty() {
            return true;
        }
        let index = self.ranges.partition_point(|r| r.end() <= range.offset);
        self.ranges.get(index).is_some_and(|r| r.offset <= range.offset && range.end() <= r.end())
    }

    /// The bytes in this set, in the other, or in both.
    pub fn union(&self, other: &Self) -> Self {
        let mut all = Vec::with_capacity(self.ranges.len() + other.ranges.len());
        all.extend_from_slice(&self.ranges);
        all.extend_from_slice(&other.ranges);
        Self::from(all)
    }

    /// The bytes in both sets.
    pub fn intersect(&self, other: &Self) -> Self {
        let (mut left, mut right) = (self.ranges.as_slice(), other.ranges.as_slice());
        let mut out = Self::new();
        while let (Some(a), Some(b)) = (left.first(), right.first()) {
            out.insert(a.intersect(b));
            if a.end() <= b.end() {
                left = &left[1..];
            } else {
                right = &right[1..];
            }
        }
        out
    }

    /// The bytes of this set that lie inside `window`.
    pub fn within(&self, window: ByteRange) -> Self {
        let first = self.ranges.partition_point(|r| r.end() <= window.offset);
        let past = self.ranges.partition_point(|r| r.offset < window.end());
        let ranges = self.ranges[first..past.max(first)]
            .iter()
            .map(|range| range.intersect(&window))
            .filter(|range| !range.is_empty())
            .collect();
        Self { ranges }
    }

    /// The bytes of this set that are not in `other`.
    pub fn subtract(&self, other: &Self) -> Self {
        let mut out = Self::new();
        let mut cut = other.ranges.as_slice();
        for range in &self.ranges {
            let mut start = range.offset;
            while let Some(hole) = cut.first() {
                if hole.end() <= start {
                    cut = &cut[1..];
                    continue;
                }
                if hole.offset >= range.end() {
                    break;
                }
                out.insert(ByteRange::from_bounds(start, hole.offset));
                start = hole.end();
                if start >= range.end() {
                    break;
                }
            }
            out.insert(ByteRange::from_bounds(start, range.end()));
        }
        out
    }

    /// The bytes of a disk of `size_bytes` that are not in the set.
    pub fn complement(&self, size_bytes: u64) -> Self {
        Self::full(size_bytes).subtract(self)
    }

    /// The set without bytes at or past `size_bytes`.
    pub fn clamp(&self, size_bytes: u64) -> Self {
        self.within(ByteRange::new(0, size_bytes))
    }

    /// Every range grown to multiples of `alignment`, merged, and clamped at `limit`.
    pub fn align_outward(&self, alignment: u64, limit: u64) -> Self {
        let mut out = Self::new();
        for range in &self.ranges {
            out.insert(range.align_outward(alignment, limit));
        }
        out
    }

    /// The set with at most about `max_ranges` ranges, by rounding outward to ever larger powers
    /// of two. Bounds memory for a disk whose changes are scattered everywhere; the answer may
    /// hold more bytes than the truth, never fewer.
    pub fn bounded(self, max_ranges: usize, limit: u64) -> Self {
        let mut set = self;
        let mut alignment = 64 * 1024;
        while set.ranges.len() > max_ranges.max(1) {
            set = set.align_outward(alignment, limit);
            match alignment.checked_mul(2) {
                Some(next) => alignment = next,
                None => break,
            }
        }
        set
    }
}

impl From<Vec<ByteRange>> for RangeSet {
    /// Sorts and merges; empty ranges vanish. Ranges past `u64::MAX` are cut there.
    fn from(mut ranges: Vec<ByteRange>) -> Self {
        ranges.sort_unstable();
        let mut out = Self { ranges: Vec::with_capacity(ranges.len().min(1 << 16)) };
        for range in ranges {
            out.insert(range);
        }
        out
    }
}

impl From<RangeSet> for Vec<ByteRange> {
    fn from(set: RangeSet) -> Self {
        set.ranges
    }
}

impl FromIterator<ByteRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = ByteRange>>(iter: I) -> Self {
        Self::from(iter.into_iter().collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SPACE: u64 = 96;

    fn members(set: &RangeSet) -> Vec<bool> {
        (0..SPACE).map(|at| set.iter().any(|range| range.contains(at))).collect()
    }

    fn any_set() -> impl Strategy<Value = RangeSet> {
        prop::collection::vec((0..SPACE, 0..16u64), 0..12).prop_map(|pairs| {
            let mut set = RangeSet::new();
            for (offset, length) in pairs {
                set.insert(ByteRange::from_bounds(offset, (offset + length).min(SPACE)));
            }
            set
        })
    }

    fn assert_normal(set: &RangeSet) {
        assert!(set.iter().all(|range| !range.is_empty()));
        assert!(set.as_slice().windows(2).all(|pair| pair[0].end() < pair[1].offset), "{set:?}");
    }

    proptest! {
        #[test]
        fn operations_agree_with_a_vector_of_flags(a in any_set(), b in any_set(), cut in 0..SPACE) {
            let (x, y) = (members(&a), members(&b));
            let pairwise = |f: fn(bool, bool) -> bool| -> Vec<bool> {
                x.iter().zip(&y).map(|(x, y)| f(*x, *y)).collect()
            };
            for (set, expected) in [
                (a.union(&b), pairwise(|x, y| x || y)),
                (a.intersect(&b), pairwise(|x, y| x && y)),
                (a.subtract(&b), pairwise(|x, y| x && !y)),
                (a.complement(SPACE), x.iter().map(|x| !x).collect()),
                (a.clamp(cut), x.iter().enumerate().map(|(at, x)| *x && (at as u64) < cut).collect()),
            ] {
                assert_normal(&set);
                prop_assert_eq!(members(&set), expected);
            }
            prop_assert_eq!(a.total_bytes(), x.iter().filter(|x| **x).count() as u64);
        }

        #[test]
        fn rounding_outward_never_loses_a_byte(a in any_set(), shift in 0..5u32, most in 1..6usize) {
            for set in [a.align_outward(1 << shift, SPACE), a.clone().bounded(most, SPACE)] {
                assert_normal(&set);
                prop_assert!(a.subtract(&set).is_empty());
                prop_assert!(set.iter().all(|range| range.end() <= SPACE));
            }
            prop_assert!(a.clone().bounded(most, SPACE).as_slice().len() <= most);
        }
    }

    #[test]
    fn json_is_the_list_of_ranges_in_any_order() {
        let text =
            r#"[{"offset":10,"length":5},{"offset":0,"length":10},{"offset":40,"length":0}]"#;
        let set: RangeSet = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&set).unwrap(), r#"[{"offset":0,"length":15}]"#);
    }

    #[test]
    fn a_range_past_the_end_of_u64_saturates() {
        let set = RangeSet::from(vec![ByteRange::new(u64::MAX - 1, 10)]);
        assert_eq!(set.total_bytes(), 1);
        assert!(set.clamp(100).is_empty());
    }
}
