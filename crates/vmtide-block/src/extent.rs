//! What a range of a virtual disk holds, without reading it.

use crate::ByteRange;
use serde::{Deserialize, Serialize};

/// What is known of a range's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExtentKind {
    /// May hold anything: must be read. Claiming data where there are zeros is only slow.
    Data,
    /// Reads as zeros and is known to: a zero cluster, an explicit zero range, a file hole.
    Zero,
    /// Not allocated in this image. It reads as zeros where there is no parent; in one layer of a
    /// chain it reads as the parent. A device as a whole (a chain, an export) reads it as zeros.
    Unallocated,
}

impl ExtentKind {
    /// Whether a whole device reads this extent as zeros.
    pub const fn reads_as_zero(self) -> bool {
        matches!(self, Self::Zero | Self::Unallocated)
    }
}

/// A byte range of a virtual disk with one property.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// The bytes.
    #[serde(flatten)]
    pub range: ByteRange,
    /// What they hold.
    pub kind: ExtentKind,
}

impl Extent {
    /// The extent of `length` bytes from `offset`.
    pub const fn new(offset: u64, length: u64, kind: ExtentKind) -> Self {
        Self { range: ByteRange::new(offset, length), kind }
    }
}

/// Appends an extent, joining it with the last one where they touch and are of one kind. Empty
/// extents vanish.
pub fn push_extent(extents: &mut Vec<Extent>, next: Extent) {
    if next.range.is_empty() {
        return;
    }
    match extents.last_mut() {
        Some(last) if last.kind == next.kind && last.range.end() == next.range.offset => {
            last.range.length += next.range.length;
        }
        _ => extents.push(next),
    }
}
