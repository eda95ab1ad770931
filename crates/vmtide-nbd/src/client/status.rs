//! Block status: allocation, dirty bitmaps and other metadata contexts.

use super::connection::Piece;
use super::device::NbdDevice;
use crate::proto::assembly::Expected;
use crate::proto::constants::{CONTEXT_ALLOCATION, CONTEXT_DIRTY_BITMAP, cmd};
use crate::proto::meta_context::encode_status_filter;
use crate::proto::request::HeaderStyle;
use crate::proto::status::StatusExtent;
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, Extent, ExtentKind, RangeSet, Result,
    push_extent,
};

/// The longest range a compact request asks for: what fits 32 bits, on a 64 KiB boundary.
const MAX_COMPACT_BYTES: u64 = (u32::MAX - 0xffff) as u64;

/// The most extents one answer of [`BlockDevice::extents`] holds.
const MAX_EXTENTS: usize = 1 << 16;

/// The most dirty ranges kept apart; past it they are joined, which reads more and loses
/// nothing. 4 Mi ranges take 64 MiB: a 256 GiB disk with every other 64 KiB changed.
const MAX_DIRTY_RANGES: usize = 4 << 20;

/// The metadata context of QEMU's dirty bitmap `name`.
pub fn dirty_bitmap_context(name: &str) -> String {
    format!("{CONTEXT_DIRTY_BITMAP}{name}")
}

impl NbdDevice {
    /// The metadata contexts the server agreed to, e.g. `base:allocation`.
    pub fn contexts(&self) -> impl Iterator<Item = &str> {
        self.contexts.iter().map(|context| context.name.as_str())
    }

    /// Whether the server agreed to `context`.
    pub fn has_context(&self, context: &str) -> bool {
        self.contexts().any(|name| name == context)
    }

    /// The status of `range` in one metadata context, in one request.
    ///
    /// As with [`BlockDevice::extents`] the answer covers a prefix of the range, in order and
    /// without gaps, and is empty only where the range is: a server stops where it likes.
    ///
    /// # Errors
    /// [`BlockError::Unsupported`] where the server did not agree to the context,
    /// [`BlockError::OutOfRange`], what the server says, and [`BlockError::Damaged`] where its
    /// answer is none.
    pub fn block_status(&self, context: &str, range: ByteRange) -> Result<Vec<StatusExtent>> {
        self.check_range(range)?;
        let Some(id) = self.contexts.iter().find(|known| known.name == context) else {
            return Err(BlockError::unsupported(
                self.name(),
                format!(
                    "the server does not offer {context} (it offers: {})",
                    self.contexts().collect::<Vec<_>>().join(", ")
                ),
            ));
        };
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let mut asked = self.align(range)?;
        if self.style != HeaderStyle::Extended {
            asked.length = asked.length.min(MAX_COMPACT_BYTES);
        }
        let what = || format!("block status ({context}) {asked} of {}", self.name);
        let filter = self.style == HeaderStyle::Extended
            && self.flags().can_filter_status()
            && self.contexts.len() > 1;
        let payload =
            if filter { encode_status_filter(asked.length, &[id.id]) } else { Vec::new() };
        let wanted = if filter {
            vec![id.id]
        } else {
            self.contexts.iter().map(|context| context.id).collect()
        };
        let piece = Piece {
            command: cmd::BLOCK_STATUS,
            flags: 0,
            range: asked,
            payload: &payload,
            expected: Expected::Status(wanted),
        };
        let statuses =
            self.ask("block status", piece)?.map_err(|error| error.into_block_error(what()))?;
        let mut extents: Vec<_> = statuses
            .into_iter()
            .filter(|(answered, _)| *answered == id.id)
            .flat_map(|(_, extents)| extents)
            .collect();
        // Alignment may have grown the range: back to what was asked.
        for extent in &mut extents {
            extent.range = extent.range.intersect(&range);
        }
        extents.retain(|extent| !extent.range.is_empty());
        if extents.first().is_none_or(|extent| extent.range.offset != range.offset) {
            return Err(BlockError::damaged(what(), "the answer does not cover the first byte"));
        }
        Ok(extents)
    }

    /// Visits the status of all of `range` in one context, asking as often as needed.
    ///
    /// # Errors
    /// Those of [`block_status`](Self::block_status) and of `visit`, and
    /// [`BlockError::Cancelled`].
    pub fn for_each_status(
        &self,
        context: &str,
        range: ByteRange,
        cancel: &CancelToken,
        mut visit: impl FnMut(StatusExtent) -> Result<()>,
    ) -> Result<()> {
        let mut at = range.offset;
        while at < range.end() {
            cancel.check()?;
            let rest = ByteRange::from_bounds(at, range.end());
            for extent in self.block_status(context, rest)? {
                at = extent.range.end();
                visit(extent)?;
            }
        }
        Ok(())
    }

    /// The bytes of `range` that the dirty bitmap `bitmap` holds as changed.
    ///
    /// The bitmap must be among the options' contexts
    /// ([`NbdOptions::with_dirty_bitmap`](crate::NbdOptions::with_dirty_bitmap)) and be exported
    /// by the server. With more than 4 Mi ranges, neighbours are joined: the answer is never
    /// less than the truth. Whatever of the answer is not certain is an error, not a shorter
    /// answer.
    ///
    /// # Errors
    /// As [`for_each_status`](Self::for_each_status).
    pub fn dirty_ranges(
        &self,
        bitmap: &str,
        range: ByteRange,
        cancel: &CancelToken,
    ) -> Result<RangeSet> {
        self.dirty_ranges_of_all(&[bitmap], range, cancel)
    }

    /// The bytes of `range` that any of several dirty bitmaps holds as changed.
    ///
    /// # Errors
    /// As [`dirty_ranges`](Self::dirty_ranges).
    pub fn dirty_ranges_of_all(
        &self,
        bitmaps: &[&str],
        range: ByteRange,
        cancel: &CancelToken,
    ) -> Result<RangeSet> {
        let mut all = RangeSet::new();
        for bitmap in bitmaps {
            let mut dirty = RangeSet::new();
            let context = dirty_bitmap_context(bitmap);
            self.for_each_status(&context, range, cancel, |extent| {
                if extent.flags & 1 != 0 {
                    dirty.insert(extent.range);
                }
                if dirty.as_slice().len() > MAX_DIRTY_RANGES {
                    let joined = std::mem::take(&mut dirty);
                    dirty = joined.bounded(MAX_DIRTY_RANGES / 2, range.end());
                }
                Ok(())
            })?;
            all = if all.is_empty() { dirty } else { all.union(&dirty) };
        }
        Ok(all)
    }

    /// What the changed `ranges` hold now: data to read, or zeros to record. In order, one
    /// answer per range at least.
    ///
    /// # Errors
    /// As [`for_each_status`](Self::for_each_status).
    pub fn for_each_changed_extent(
        &self,
        ranges: &RangeSet,
        cancel: &CancelToken,
        mut visit: impl FnMut(Extent) -> Result<()>,
    ) -> Result<()> {
        for range in ranges.iter() {
            vmtide_block::for_each_extent(self, range, cancel, &mut visit)?;
        }
        Ok(())
    }

    /// Allocation by `base:allocation`; all data where the server does not tell.
    pub(super) fn allocation(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        if !self.has_context(CONTEXT_ALLOCATION) {
            let kind = ExtentKind::Data;
            push_extent(&mut extents, Extent { range, kind });
            return Ok(extents);
        }
        for status in self.block_status(CONTEXT_ALLOCATION, range)? {
            let kind = status.allocation();
            push_extent(&mut extents, Extent { range: status.range, kind });
            if extents.len() >= MAX_EXTENTS {
                break;
            }
        }
        Ok(extents)
    }
}
