//! Where the bytes of the disk are while a writer changes it, and reading them.

use super::bat::{
    BITMAP_BLOCK_BYTES, BatEntry, BatIndex, BitmapBlockState, BlockNumber, ENTRY_BYTES, EntryOf,
    PayloadState,
};
use super::bits;
use super::header::MIB;
use super::pages::PAGE_BYTES;
use super::writer::VhdxWriter;
use crate::bytes::length;
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent, ExtentKind, Result, push_extent};

/// The most extents in one answer.
const MAX_EXTENTS: usize = 1 << 16;

/// Where a run of bytes of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the file, at this offset.
    File(u64),
    /// Nowhere: it reads as zeros.
    Zero,
    /// Not in this image, which has no parent: it reads as zeros.
    Absent,
    /// In the parent, which reads as zeros past its end.
    Parent,
}

/// A run of bytes of the disk in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) place: Place,
    /// In bytes.
    pub(super) length: u64,
}

impl VhdxWriter {
    /// Where the entry of a block stands in the table.
    pub(super) const fn payload_index(&self, block: u64) -> BatIndex {
        self.geometry.payload_index(BlockNumber(block))
    }

    /// Where the entry of the sector bitmap of a block's chunk stands in the table.
    pub(super) const fn bitmap_index(&self, block: u64) -> BatIndex {
        self.geometry.bitmap_index(self.geometry.chunk_of(BlockNumber(block)))
    }

    /// Where the bytes from `at` are, as far as they are in one place; at most `limit`, at least
    /// one. The caller has checked that they are on the disk.
    pub(super) fn run(&self, at: u64, limit: u64) -> Result<Run> {
        let mut run = self.run_in_block(at, limit)?;
        while run.length < limit {
            let next_at = at + run.length;
            if !next_at.is_multiple_of(self.geometry.block_bytes()) {
                break;
            }
            let next = self.run_in_block(next_at, limit - run.length)?;
            let goes_on = match (run.place, next.place) {
                (Place::File(offset), Place::File(next)) => offset + run.length == next,
                (one, other) => one == other,
            };
            if !goes_on {
                break;
            }
            run.length += next.length;
        }
        Ok(run)
    }

    fn run_in_block(&self, at: u64, limit: u64) -> Result<Run> {
        let block_bytes = self.geometry.block_bytes();
        let (block, inside) = (at / block_bytes, at % block_bytes);
        let limit = limit.min(block_bytes - inside);
        let index = self.payload_index(block);
        let entry = self.entry(index)?;
        let place = match (entry.payload_state(), &self.parent) {
            (Some(PayloadState::FullyPresent), _) => {
                Place::File(self.payload(index, entry)? + inside)
            }
            (Some(PayloadState::PartiallyPresent), Some(_)) => {
                return self.run_of_sectors(block, inside, limit, self.payload(index, entry)?);
            }
            (Some(PayloadState::NotPresent), None) => Place::Absent,
            (Some(PayloadState::NotPresent), Some(_)) => Place::Parent,
            (Some(PayloadState::Undefined | PayloadState::Zero | PayloadState::Unmapped), _) => {
                Place::Zero
            }
            (Some(PayloadState::PartiallyPresent), None) | (None, _) => {
                return Err(self.bad_entry(index, entry, "a state that is not allowed here"));
            }
        };
        Ok(Run { place, length: limit })
    }

    /// The run in a partially present block whose payload is at `payload`.
    fn run_of_sectors(&self, block: u64, inside: u64, limit: u64, payload: u64) -> Result<Run> {
        let sector_bytes = self.geometry.sector_bytes();
        let first = inside / sector_bytes;
        let past = (inside + limit).div_ceil(sector_bytes);
        let bitmap = self.bitmap_of(block)?;
        let mut sector = first;
        let mut is_present = None;
        while sector < past {
            let (page, bit) = bitmap.place(sector);
            let in_page = (past - sector).min(PAGE_BYTES * 8 - bit);
            let (is_set, count) = bits::run(&*self.page(page)?, bit, bit + in_page);
            if is_present.is_some_and(|present| present != is_set) {
                break;
            }
            is_present = Some(is_set);
            sector += count;
            if count < in_page {
                break;
            }
        }
        let end = (sector * sector_bytes).min(inside + limit);
        let place = match is_present {
            Some(true) => Place::File(payload + inside),
            _ => Place::Parent,
        };
        Ok(Run { place, length: end - inside })
    }

    /// Where the sector bits of a partially present block are.
    pub(super) fn bitmap_of(&self, block: u64) -> Result<BlockBitmap> {
        let index = self.bitmap_index(block);
        let entry = self.entry(index)?;
        if entry.bitmap_state() != Some(BitmapBlockState::Present) {
            return Err(self.bad_entry(
                index,
                entry,
                "no sector bitmap, though a block of its chunk is partially present",
            ));
        }
        Ok(BlockBitmap {
            offset: self.payload(index, entry)?,
            first_bit: self.geometry.bitmap_bit(block << self.geometry.block_bits),
        })
    }

    /// The offset in a table entry of something that is there.
    pub(super) fn payload(&self, index: BatIndex, entry: BatEntry) -> Result<u64> {
        self.check_in_file(index, entry)?;
        Ok(entry.offset())
    }

    /// Succeeds where what an entry leads to is in the file. Of the last block the file needs to hold no more than
    /// there is disk; where it ends before, it was cut off, and what is missing was no zeros.
    pub(super) fn check_in_file(&self, index: BatIndex, entry: BatEntry) -> Result<()> {
        let geometry = self.present_geometry();
        let needed = match geometry.entry_at(index) {
            EntryOf::Payload(block) => geometry.bytes_of(block),
            EntryOf::Bitmap(_) => BITMAP_BLOCK_BYTES,
        };
        let (offset, file_bytes) = (entry.offset(), self.file.size_bytes());
        if offset < MIB || offset.checked_add(needed).is_none_or(|end| end > file_bytes) {
            let what = format!(
                "{needed} bytes at {offset:#x} are not behind the first MiB and inside the file of {file_bytes} bytes"
            );
            return Err(self.bad_entry(index, entry, &what));
        }
        Ok(())
    }

    pub(super) fn bad_entry(&self, index: BatIndex, entry: BatEntry, what: &str) -> BlockError {
        let at = self.metadata.read().bat.offset + index.0 * ENTRY_BYTES;
        BlockError::damaged(
            &self.name,
            format!("block table entry {} at {at:#x} is {entry:?}: {what}", index.0),
        )
    }

    /// Fills `buffer` from `offset` of the disk; the caller has checked the range.
    pub(super) fn read_disk(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let (mut rest, mut at) = (buffer, offset);
        while !rest.is_empty() {
            let run = self.run(at, rest.len() as u64)?;
            let (piece, after) = rest.split_at_mut(length(run.length));
            match run.place {
                Place::File(offset) => self.read_file(piece, offset)?,
                Place::Zero | Place::Absent => piece.fill(0),
                Place::Parent => self.read_parent(piece, at)?,
            }
            at += run.length;
            rest = after;
        }
        Ok(())
    }

    /// Reads the file; where it ends, which is not before the last byte of the disk, zeros.
    fn read_file(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let present = self.file.size_bytes().saturating_sub(offset).min(buffer.len() as u64);
        let (inside, past) = buffer.split_at_mut(length(present));
        past.fill(0);
        self.file.read_at(inside, offset)
    }

    fn read_parent(&self, buffer: &mut [u8], at: u64) -> Result<()> {
        let Some(parent) = &self.parent else {
            buffer.fill(0);
            return Ok(());
        };
        let present = parent.size_bytes().saturating_sub(at).min(buffer.len() as u64);
        let (inside, past) = buffer.split_at_mut(length(present));
        past.fill(0);
        if inside.is_empty() { Ok(()) } else { parent.read_at(inside, at) }
    }

    /// What a range of the disk holds, by the rules of [`BlockDevice::extents`].
    pub(super) fn find_extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        let mut at = range.offset;
        while at < range.end() && extents.len() < MAX_EXTENTS {
            let run = self.run(at, range.end() - at)?;
            let whole = ByteRange::new(at, run.length);
            match run.place {
                Place::File(_) => {
                    push_extent(&mut extents, Extent { range: whole, kind: ExtentKind::Data })
                }
                Place::Zero => {
                    push_extent(&mut extents, Extent { range: whole, kind: ExtentKind::Zero })
                }
                Place::Absent => {
                    push_extent(
                        &mut extents,
                        Extent { range: whole, kind: ExtentKind::Unallocated },
                    );
                }
                Place::Parent => {
                    at = self.parent_extents(whole, &mut extents)?;
                    continue;
                }
            }
            at += run.length;
        }
        Ok(extents)
    }

    /// Adds what the parent holds of `range`, and says how far its answer went.
    fn parent_extents(&self, range: ByteRange, extents: &mut Vec<Extent>) -> Result<u64> {
        let size = self.parent.as_ref().map_or(0, |parent| parent.size_bytes());
        let inside = range.intersect(&ByteRange::new(0, size));
        match &self.parent {
            Some(parent) if !inside.is_empty() => {
                let mut end = range.offset;
                for extent in parent.extents(inside)? {
                    end = extent.range.end();
                    push_extent(extents, extent);
                }
                if end <= range.offset || end > range.end() {
                    return Err(BlockError::damaged(
                        parent.name(),
                        format!("no usable extents reported at byte {} of the disk", range.offset),
                    ));
                }
                Ok(end)
            }
            _ => {
                push_extent(extents, Extent { range, kind: ExtentKind::Unallocated });
                Ok(range.end())
            }
        }
    }

    /// Whether the whole range is known to read as zeros.
    pub(super) fn reads_as_zero(&self, range: ByteRange) -> Result<bool> {
        if range.is_empty() {
            return Ok(true);
        }
        let extents = self.find_extents(range)?;
        let covered = extents.last().map_or(range.offset, |last| last.range.end());
        Ok(covered == range.end() && extents.iter().all(|extent| extent.kind.reads_as_zero()))
    }
}

/// Where the sector bits of one block are.
#[derive(Clone, Copy)]
pub(super) struct BlockBitmap {
    /// The sector bitmap block's offset in the file.
    offset: u64,
    /// The number of the block's first bit in it.
    first_bit: u64,
}

impl BlockBitmap {
    /// The page that holds the bit of this sector of the block, and the bit's number in the page.
    pub(super) const fn place(&self, sector: u64) -> (u64, u64) {
        let bit = self.first_bit + sector;
        let page_bits = PAGE_BYTES * 8;
        (self.offset + bit / page_bits * PAGE_BYTES, bit % page_bits)
    }
}
