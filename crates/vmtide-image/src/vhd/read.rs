//! Reading through the block table: what the read-only image and the writer share.

use super::footer::Kind;
use super::header::BlockShape;
use crate::bytes::length;
use crate::image::{Placement, push_placement};
use std::sync::Arc;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, ExtentKind, Result, push_extent};

/// The most extents in one answer.
const MAX_EXTENTS: usize = 1 << 16;

/// The most blocks that one call of `extents` looks at, so that the caller gets its turn (and its
/// chance to cancel) within milliseconds, however large and empty the disk.
const MAX_BLOCKS_PER_CALL: u64 = 1 << 17;

/// Gives what the tables say of a block.
pub(crate) trait Tables {
    /// Where the block begins in the file (its bitmap; the data follows); `None` where it is not
    /// there.
    fn block(&self, block: u64) -> Result<Option<u64>>;

    /// Whether the sectors of this block from `first` on are the disk's own, and how many before
    /// `end` are the same. Asked for blocks of differencing disks that are there.
    fn sectors(&self, block: u64, start: u64, first: u64, end: u64) -> Result<(bool, u64)>;
}

/// Where a range of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// In the parent, or zero where there is none.
    Absent,
    /// In the file from this offset on.
    Stored(u64),
}

/// The files under an image and what is needed to read them.
pub(crate) struct Layers {
    pub(crate) name: String,
    pub(crate) file: Arc<dyn BlockDevice>,
    pub(crate) parent: Option<Arc<dyn BlockDevice>>,
    pub(crate) kind: Kind,
    /// Of no meaning in fixed disks.
    pub(crate) shape: BlockShape,
}

impl Layers {
    /// The mapping at `offset` and how many bytes share it: at least one, at most `limit`, and
    /// not past the end of a block that is there.
    pub(crate) fn run(
        &self,
        tables: &impl Tables,
        offset: u64,
        limit: u64,
    ) -> Result<(Mapping, u64)> {
        if self.kind == Kind::Fixed {
            return Ok((Mapping::Stored(offset), limit));
        }
        let block_bytes = self.shape.block_bytes;
        let (block, inside) = (offset / block_bytes, offset % block_bytes);
        let rest = limit.min(block_bytes - inside);
        let Some(start) = tables.block(block)? else {
            return Ok((Mapping::Absent, rest));
        };
        let stored = Mapping::Stored(start + self.shape.bitmap_bytes + inside);
        if self.kind == Kind::Dynamic {
            return Ok((stored, rest));
        }
        let end = (inside + rest).div_ceil(512);
        let (own, sectors) = tables.sectors(block, start, inside / 512, end)?;
        let run = ((inside / 512 + sectors) * 512 - inside).min(rest);
        Ok((if own { stored } else { Mapping::Absent }, run))
    }

    /// As [`run`](Self::run), with what follows joined where it is absent, too.
    fn long_run(
        &self,
        tables: &impl Tables,
        offset: u64,
        limit: u64,
        work: &mut u64,
    ) -> Result<(Mapping, u64)> {
        let (mapping, mut run) = self.run(tables, offset, limit)?;
        *work += 1;
        if mapping != Mapping::Absent {
            return Ok((mapping, run));
        }
        while run < limit && *work < MAX_BLOCKS_PER_CALL {
            let (next, more) = self.run(tables, offset + run, limit - run)?;
            if next != Mapping::Absent {
                break;
            }
            *work += 1;
            run += more;
        }
        Ok((mapping, run))
    }

    /// Fills `buffer` from `offset`; the caller has checked the range.
    pub(crate) fn read(&self, tables: &impl Tables, buffer: &mut [u8], offset: u64) -> Result<()> {
        let (mut rest, mut at) = (buffer, offset);
        let mut work = 0;
        while !rest.is_empty() {
            let (mapping, run) = self.long_run(tables, at, rest.len() as u64, &mut work)?;
            // Bounds nothing here: the buffer does.
            work = 0;
            let (piece, after) = rest.split_at_mut(length(run));
            match mapping {
                Mapping::Stored(stored) => self.read_stored(stored, piece, at)?,
                Mapping::Absent => self.read_parent(piece, at)?,
            }
            at += run;
            rest = after;
        }
        Ok(())
    }

    fn read_stored(&self, stored: u64, piece: &mut [u8], at: u64) -> Result<()> {
        self.check_stored(ByteRange::new(stored, piece.len() as u64), at)?;
        self.file.read_at(piece, stored)
    }

    /// Succeeds where the file has the bytes `stored`, which are the disk's at `at`.
    fn check_stored(&self, stored: ByteRange, at: u64) -> Result<()> {
        let size_bytes = self.file.size_bytes();
        if stored.checked_end().is_some_and(|end| end <= size_bytes) {
            return Ok(());
        }
        Err(BlockError::damaged(
            &self.name,
            format!(
                "block table, entry {}: the data of disk offset {at} would be at {:#x}, past the \
                 end of the file of {size_bytes} bytes: the image is truncated",
                at / self.shape.block_bytes,
                stored.offset
            ),
        ))
    }

    fn read_parent(&self, piece: &mut [u8], at: u64) -> Result<()> {
        let Some(parent) = &self.parent else {
            piece.fill(0);
            return Ok(());
        };
        let present = piece.len().min(length(parent.size_bytes().saturating_sub(at)));
        let (stored, missing) = piece.split_at_mut(present);
        missing.fill(0);
        if stored.is_empty() {
            return Ok(());
        }
        parent.read_at(stored, at)
    }

    /// What `range` holds, merged through the chain; a prefix of it, as [`BlockDevice::extents`]
    /// allows. Where the file itself has holes the disk has zeros. The caller has checked the
    /// range.
    pub(crate) fn extents(&self, tables: &impl Tables, range: ByteRange) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        let (mut at, mut work) = (range.offset, 0);
        while at < range.end() && extents.len() < MAX_EXTENTS && work < MAX_BLOCKS_PER_CALL {
            let (mapping, run) = self.long_run(tables, at, range.end() - at, &mut work)?;
            at += match mapping {
                Mapping::Stored(stored) => {
                    self.check_stored(ByteRange::new(stored, run), at)?;
                    let place = ByteRange::new(stored, run);
                    push_below(&mut extents, &*self.file, place, at, stored_kind)?
                }
                Mapping::Absent => {
                    let below = self.parent.as_ref().map_or(0, |parent| parent.size_bytes());
                    match &self.parent {
                        Some(parent) if at < below => {
                            let place = ByteRange::from_bounds(at, below.min(at + run));
                            push_below(&mut extents, parent, place, at, |kind| kind)?
                        }
                        _ => {
                            push_extent(
                                &mut extents,
                                Extent::new(at, run, ExtentKind::Unallocated),
                            );
                            run
                        }
                    }
                }
            };
        }
        Ok(extents)
    }

    /// Where the bytes of `range` are in this image, the parent not asked.
    pub(crate) fn layout(&self, tables: &impl Tables, range: ByteRange) -> Result<Vec<Placement>> {
        let mut placements = Vec::new();
        let (mut at, mut work) = (range.offset, 0);
        while at < range.end() && placements.len() < MAX_EXTENTS && work < MAX_BLOCKS_PER_CALL {
            let (mapping, run) = self.long_run(tables, at, range.end() - at, &mut work)?;
            let (kind, file_offset) = match mapping {
                Mapping::Stored(stored) => (ExtentKind::Data, Some(stored)),
                Mapping::Absent => (ExtentKind::Unallocated, None),
            };
            let range = ByteRange::new(at, run);
            let placement = Placement { range, kind, file_offset, compressed: false };
            push_placement(&mut placements, placement);
            at += run;
        }
        Ok(placements)
    }
}

/// What a part of the file says of the disk: a hole in it is zeros.
fn stored_kind(kind: ExtentKind) -> ExtentKind {
    if kind.reads_as_zero() { ExtentKind::Zero } else { ExtentKind::Data }
}

/// Appends what the device below says of `place`, which is the disk's at `at`; answers with the
/// bytes it covered.
fn push_below(
    extents: &mut Vec<Extent>,
    below: &dyn BlockDevice,
    place: ByteRange,
    at: u64,
    kind: impl Fn(ExtentKind) -> ExtentKind,
) -> Result<u64> {
    let mut covered = 0;
    for extent in below.extents(place)? {
        if extent.range.offset != place.offset + covered || extent.range.end() > place.end() {
            return Err(BlockError::damaged(
                below.name(),
                format!("extent {} does not continue the answer", extent.range),
            ));
        }
        push_extent(extents, Extent::new(at + covered, extent.range.length, kind(extent.kind)));
        covered += extent.range.length;
    }
    if covered == 0 {
        return Err(BlockError::damaged(below.name(), format!("no extents reported for {place}")));
    }
    Ok(covered)
}
