//! One byte range of a virtual disk.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A half-open range of bytes, `offset .. offset + length`.
///
/// This is also the JSON form of changed ranges everywhere vmtide reads or writes them:
/// `{"offset":0,"length":65536}`. A range read from outside may overflow `u64`: use
/// [`checked_end`](Self::checked_end) before trusting it; [`end`](Self::end) saturates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ByteRange {
    /// The first byte.
    pub offset: u64,
    /// The number of bytes.
    pub length: u64,
}

impl ByteRange {
    /// The range of `length` bytes from `offset`.
    pub const fn new(offset: u64, length: u64) -> Self {
        Self { offset, length }
    }

    /// The range from `start` up to and without `end`; empty where `end <= start`.
    pub const fn from_bounds(start: u64, end: u64) -> Self {
        Self { offset: start, length: end.saturating_sub(start) }
    }

    /// The byte after the last one, saturating at `u64::MAX`.
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// The byte after the last one, or `None` where that is past `u64::MAX`.
    pub const fn checked_end(&self) -> Option<u64> {
        self.offset.checked_add(self.length)
    }

    /// Whether the range has no bytes.
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether `offset` lies in the range.
    pub const fn contains(&self, offset: u64) -> bool {
        offset >= self.offset && offset < self.end()
    }

    /// The bytes that are in both ranges; empty where there are none.
    pub fn intersect(&self, other: &Self) -> Self {
        Self::from_bounds(self.offset.max(other.offset), self.end().min(other.end()))
    }

    /// The smallest range with both bounds on multiples of `alignment` that holds this one,
    /// clamped at `limit`. An `alignment` of 0 or 1 changes nothing but the clamp.
    pub fn align_outward(&self, alignment: u64, limit: u64) -> Self {
        if self.is_empty() {
            return Self::new(self.offset.min(limit), 0);
        }
        let alignment = alignment.max(1);
        let start = self.offset - self.offset % alignment;
        let end = self.end();
        let end = match end % alignment {
            0 => end,
            rest => end.saturating_add(alignment - rest),
        };
        Self::from_bounds(start.min(limit), end.min(limit))
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.length)
    }
}
