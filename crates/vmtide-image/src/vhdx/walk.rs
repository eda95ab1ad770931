//! Walking over the disk: where each run of it is (MS-VHDX 2.5.1).

use super::bat::{BITMAP_BLOCK_BYTES, BatEntry, BatIndex, BlockNumber, PayloadState};
use super::bits;
use super::header::MIB;
use super::image::{
    BAT_PAGE_ENTRIES, BITMAP_PAGE_BYTES, BatPage, BitmapPage, MAX_RUNS_PER_CALL, VhdxImage,
};
use crate::bytes::length;
use std::sync::Arc;
use vmtide_block::{ExtentKind, Result};

/// Where a run of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// At this byte of the file.
    File(u64),
    /// Nowhere: zeros.
    Zero,
    /// In the parent; where there is none, zeros.
    Below,
}

impl Mapping {
    pub(super) const fn kind(self) -> ExtentKind {
        match self {
            Self::File(_) => ExtentKind::Data,
            Self::Zero => ExtentKind::Zero,
            Self::Below => ExtentKind::Unallocated,
        }
    }

    /// Whether `next` continues this mapping after `length` bytes.
    fn is_continued_by(self, next: Self, length: u64) -> bool {
        match (self, next) {
            (Self::File(offset), Self::File(next)) => offset + length == next,
            (one, other) => one == other,
        }
    }
}

/// A run of the disk with one mapping.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) mapping: Mapping,
    pub(super) length: u64,
}

/// A walk over the disk that keeps the pages it is in.
pub(super) struct Walk<'a> {
    image: &'a VhdxImage,
    bat_page: Option<(u64, Arc<BatPage>)>,
    bitmap_page: Option<(u64, Arc<BitmapPage>)>,
    /// The runs looked at.
    pub(super) steps: u64,
    /// The run after the last one that was joined, with where it begins.
    ahead: Option<(u64, Run)>,
}

impl<'a> Walk<'a> {
    pub(super) const fn new(image: &'a VhdxImage) -> Self {
        Self { image, bat_page: None, bitmap_page: None, steps: 0, ahead: None }
    }

    fn entry(&mut self, index: BatIndex) -> Result<BatEntry> {
        let (number, inside) = (index.0 / BAT_PAGE_ENTRIES, length(index.0 % BAT_PAGE_ENTRIES));
        let page = match &mut self.bat_page {
            Some((held, page)) if *held == number => page,
            slot => {
                let image = self.image;
                let page = image.bat_cache.get_or_read(number, || image.read_bat_page(number))?;
                &mut slot.insert((number, page)).1
            }
        };
        Ok(page.entries.get(inside).copied().unwrap_or_default())
    }

    /// The whole run at `at`, as far as mappings continue each other, at most `limit` bytes.
    pub(super) fn run(&mut self, at: u64, limit: u64) -> Result<Run> {
        let mut run = match self.ahead.take() {
            Some((start, run)) if start == at => Run { length: run.length.min(limit), ..run },
            _ => self.piece(at, limit)?,
        };
        while run.length < limit && self.steps < MAX_RUNS_PER_CALL {
            let next_at = at + run.length;
            let next = self.piece(next_at, limit - run.length)?;
            if !run.mapping.is_continued_by(next.mapping, run.length) {
                self.ahead = Some((next_at, next));
                break;
            }
            run.length += next.length;
        }
        Ok(run)
    }

    /// The run at `at` inside its block, at most `limit` bytes.
    fn piece(&mut self, at: u64, limit: u64) -> Result<Run> {
        self.steps += 1;
        let geometry = self.image.geometry;
        let block = geometry.block_of(at);
        let inside = at & (geometry.block_bytes() - 1);
        let length = limit.min(geometry.block_bytes() - inside);
        let index = geometry.payload_index(block);
        let entry = self.entry(index)?;
        let mapping = match entry.payload_state() {
            Some(PayloadState::NotPresent) => Mapping::Below,
            Some(PayloadState::Undefined | PayloadState::Zero | PayloadState::Unmapped) => {
                Mapping::Zero
            }
            Some(PayloadState::FullyPresent) => self.in_file(block, index, entry, inside)?,
            Some(PayloadState::PartiallyPresent) if geometry.has_parent => {
                let (is_present, length) = self.bits(at, length)?;
                let mapping = match is_present {
                    true => self.in_file(block, index, entry, inside)?,
                    false => Mapping::Below,
                };
                return Ok(Run { mapping, length });
            }
            _ => {
                return Err(self.image.damaged(format!(
                    "BAT entry {} at {:#x}: the state of payload block {} is {}, which {}",
                    index.0,
                    self.image.entry_at(index),
                    block.0,
                    entry.raw_state(),
                    if entry.raw_state() == 7 { "needs a parent" } else { "does not exist" }
                )));
            }
        };
        Ok(Run { mapping, length })
    }

    /// Where byte `inside` of a block is in the file. All of the block that is disk must be there.
    fn in_file(
        &self,
        block: BlockNumber,
        index: BatIndex,
        entry: BatEntry,
        inside: u64,
    ) -> Result<Mapping> {
        let image = self.image;
        let offset = entry.offset();
        let end = offset.checked_add(image.geometry.bytes_of(block));
        if offset < MIB || end.is_none_or(|end| end > image.file_bytes) {
            return Err(image.damaged(format!(
                "BAT entry {} at {:#x}: payload block {} at {offset:#x} is not behind the first \
                 MiB and inside the file of {} bytes",
                index.0,
                image.entry_at(index),
                block.0,
                image.file_bytes
            )));
        }
        Ok(Mapping::File(offset + inside))
    }

    /// Whether the sector at `at` is in this image, and for how many bytes that goes on; `limit`
    /// does not leave the block.
    fn bits(&mut self, at: u64, limit: u64) -> Result<(bool, u64)> {
        let geometry = self.image.geometry;
        let chunk = geometry.chunk_of(geometry.block_of(at));
        let bit = geometry.bitmap_bit(at);
        let bits_per_page = BITMAP_PAGE_BYTES * 8;
        let page_in_chunk = bit / bits_per_page;
        let number = chunk.0 * (BITMAP_BLOCK_BYTES / BITMAP_PAGE_BYTES) + page_in_chunk;
        if self.bitmap_page.as_ref().is_none_or(|(held, _)| *held != number) {
            let image = self.image;
            let index = geometry.bitmap_index(chunk);
            let entry = self.entry(index)?;
            let page = image.bitmap_cache.get_or_read(number, || {
                image.read_bitmap_page(chunk, index, entry, page_in_chunk * BITMAP_PAGE_BYTES)
            })?;
            self.bitmap_page = Some((number, page));
        }
        let bytes: &[u8] = self.bitmap_page.as_ref().map_or(&[], |(_, page)| &page.entries);
        let from = bit % bits_per_page;
        // The first sector may begin before `at`.
        let skipped = at & (geometry.sector_bytes() - 1);
        let end = bits_per_page.min(from + (skipped + limit).div_ceil(geometry.sector_bytes()));
        let (is_present, sectors) = bits::run(bytes, from, end);
        let run_bytes = (sectors << geometry.sector_bits) - skipped;
        Ok((is_present, run_bytes.min(limit)))
    }
}
