//! Writing data: in place where it is there, into new space otherwise.
//!
//! A block that reads as zeros gets new space at the end of the file, which reads as zeros as
//! well: so it is entered in the block table at once and then written like any other, and many
//! threads may fill it. Should the table become durable before the data, the block is what it was.
//! Space that was used before holds other bytes: there the whole block is made right first.
//!
//! In a differencing image a block that is written in part is entered as partially present with no
//! sector of its own; sectors become its own, by their bits, after they are written.

use super::allocate::Space;
use super::bat::{BITMAP_BLOCK_BYTES, BatEntry, BitmapBlockState, ENTRY_BYTES, PayloadState};
use super::bits;
use super::mapping::{BlockBitmap, Place};
use super::pages::PAGE_BYTES;
use super::writer::{Metadata, VhdxWriter};
use crate::bytes::{le_u64, length};
use std::ops::Range;
use vmtide_block::{BlockDevice, ByteRange, Result};

/// Up to this size the filled-up first and last sector and the data between are joined in memory
/// for one write; above it three writes cost less than the copy.
const JOIN_BYTES: u64 = 1 << 20;

/// What is written.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// These bytes.
    Data(&'a [u8]),
    /// This many zeros.
    Zeros(u64),
}

impl<'a> Source<'a> {
    const fn length(self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeros(count) => count,
        }
    }

    /// The part from `from` on, of `count` bytes.
    fn part(self, from: u64, count: u64) -> Source<'a> {
        match self {
            Self::Data(data) => Source::Data(&data[length(from)..length(from + count)]),
            Self::Zeros(_) => Source::Zeros(count),
        }
    }
}

/// What must be done for a block before the bytes at one place can be written.
enum Step {
    /// Nothing: this many bytes can be written at this offset of the file.
    Write { offset: u64, count: u64 },
    /// Sectors of a partially present block must be added; this many bytes.
    AddSectors { count: u64, payload: u64 },
}

impl VhdxWriter {
    /// Writes `data`; the caller has checked the range and shares the gate.
    pub(super) fn write_data(&self, data: &[u8], offset: u64) -> Result<()> {
        self.write_source(Source::Data(data), offset)
    }

    pub(super) fn write_source(&self, source: Source<'_>, offset: u64) -> Result<()> {
        let mut done = 0;
        while done < source.length() {
            let (at, left) = (offset + done, source.length() - done);
            let rest = source.part(done, left);
            done += match self.in_place(at, left)? {
                Some((offset, count)) => {
                    self.write_file(rest.part(0, count), offset)?;
                    count
                }
                None => self.write_new(rest, at)?,
            };
        }
        Ok(())
    }

    /// Where the bytes from `at` can be overwritten, and how many; `None` where the first cannot.
    fn in_place(&self, at: u64, limit: u64) -> Result<Option<(u64, u64)>> {
        let run = self.run(at, limit)?;
        Ok(match run.place {
            Place::File(offset) => Some((offset, run.length)),
            _ => None,
        })
    }

    fn write_file(&self, source: Source<'_>, offset: u64) -> Result<()> {
        match source {
            Source::Data(data) => self.file.write_at(data, offset),
            Source::Zeros(count) => self.file.write_zeroes(ByteRange::new(offset, count)),
        }
    }

    /// Writes the beginning of `source` where nothing can be overwritten, and returns how much.
    fn write_new(&self, source: Source<'_>, at: u64) -> Result<u64> {
        let block_bytes = self.geometry.block_bytes();
        let blocks = at / block_bytes..(at + source.length()).div_ceil(block_bytes);
        let hold = self.hold(blocks.clone());
        let step = match self.in_place(at, source.length())? {
            // Somebody else allocated it while this thread waited.
            Some((offset, count)) => Step::Write { offset, count },
            None => match self.allocate(source, at, blocks)? {
                Allocated::Step(step) => step,
                Allocated::Written(count) => return Ok(count),
            },
        };
        match step {
            Step::Write { offset, count } => {
                drop(hold);
                self.write_file(source.part(0, count), offset)?;
                Ok(count)
            }
            Step::AddSectors { count, payload } => {
                self.add_sectors(source.part(0, count), at, payload)?;
                Ok(count)
            }
        }
    }

    /// Makes room for bytes from `at` on, which are not there; the caller holds the blocks.
    fn allocate(&self, source: Source<'_>, at: u64, blocks: Range<u64>) -> Result<Allocated> {
        let block_bytes = self.geometry.block_bytes();
        let (block, inside) = (blocks.start, at % block_bytes);
        let entry = self.entry(self.payload_index(block))?;
        let end = at + source.length();
        let reads_parent = |entry: BatEntry| {
            self.parent.is_some() && entry.payload_state() == Some(PayloadState::NotPresent)
        };
        if entry.payload_state() == Some(PayloadState::PartiallyPresent) {
            let payload = self.payload(self.payload_index(block), entry)?;
            let count = source.length().min(block_bytes - inside);
            return Ok(Allocated::Step(Step::AddSectors { count, payload }));
        }
        if !reads_parent(entry) {
            return self.allocate_zero(source, at, blocks);
        }
        let covers = |block: u64| {
            at <= block * block_bytes
                && end >= ((block + 1).saturating_mul(block_bytes)).min(self.size_bytes())
        };
        if !covers(block) {
            let payload = self.make_partial(block)?;
            let count = source.length().min(block_bytes - inside);
            return Ok(Allocated::Step(Step::AddSectors { count, payload }));
        }
        let mut wanted = 0;
        for next in blocks.clone() {
            if !covers(next) || !reads_parent(self.entry(self.payload_index(next))?) {
                break;
            }
            wanted += 1;
        }
        let claim = self.claim(wanted.max(1), block_bytes)?;
        let count = source.length().min(claim.count * block_bytes);
        let target = block..block + claim.count;
        self.entering(&target, claim.offset, || {
            self.write_file(source.part(0, count), claim.offset)
        })?;
        Ok(Allocated::Written(count))
    }

    /// Makes room where blocks read as zeros.
    fn allocate_zero(&self, source: Source<'_>, at: u64, blocks: Range<u64>) -> Result<Allocated> {
        let block_bytes = self.geometry.block_bytes();
        let (first, inside) = (blocks.start, at % block_bytes);
        let anchor = self.anchor(first)?;
        let (offset, count, fresh) = match anchor {
            Some(offset) => (offset, 1, false),
            None => {
                let mut wanted = 0;
                for block in blocks {
                    let entry = self.entry(self.payload_index(block))?;
                    let is_zero = match entry.payload_state() {
                        Some(PayloadState::NotPresent) => self.parent.is_none(),
                        _ => !is_present(entry),
                    };
                    if !is_zero || self.anchor(block)?.is_some() {
                        break;
                    }
                    wanted += 1;
                }
                let claim = self.claim(wanted.max(1), block_bytes)?;
                (claim.offset, claim.count, claim.fresh)
            }
        };
        let target = first..first + count;
        let total = count * block_bytes;
        let count = source.length().min(total - inside);
        if fresh {
            self.entering(&target, offset, || Ok(()))?;
            return Ok(Allocated::Step(Step::Write { offset: offset + inside, count }));
        }
        self.entering(&target, offset, || {
            self.file.write_zeroes(ByteRange::new(offset, inside))?;
            self.write_file(source.part(0, count), offset + inside)?;
            let after = inside + count;
            self.file.write_zeroes(ByteRange::new(offset + after, total - after))
        })?;
        Ok(Allocated::Written(count))
    }

    /// Does `fill`, then enters the blocks as present from `offset` of the file on; where either
    /// fails the space is given back, unless it is the blocks' own.
    fn entering(
        &self,
        blocks: &Range<u64>,
        offset: u64,
        fill: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let block_bytes = self.geometry.block_bytes();
        let result = fill().and_then(|()| {
            let mut metadata = self.metadata.write();
            // All pages before any is changed: then entering cannot fail halfway, and space that
            // is given back below was not entered.
            for block in blocks.clone() {
                let at = metadata.bat.offset + self.payload_index(block).0 * ENTRY_BYTES;
                metadata.pages.load(&*self.file, at - at % PAGE_BYTES)?;
            }
            for block in blocks.clone() {
                let at = offset + (block - blocks.start) * block_bytes;
                let entry = BatEntry::payload(PayloadState::FullyPresent, at);
                self.set_entry(&mut metadata, self.payload_index(block), entry)?;
            }
            Ok(())
        });
        if result.is_err() && self.anchor(blocks.start)? != Some(offset) {
            let bytes = (blocks.end - blocks.start) * block_bytes;
            self.metadata.write().frees.push(ByteRange::new(offset, bytes));
        }
        result
    }

    /// The space that a block without data keeps (MS-VHDX 2.5.1.1: a soft anchor), where it may be
    /// used.
    fn anchor(&self, block: u64) -> Result<Option<u64>> {
        let entry = self.entry(self.payload_index(block))?;
        let keeps = matches!(
            entry.payload_state(),
            Some(PayloadState::Undefined | PayloadState::Zero | PayloadState::Unmapped)
        ) && entry.offset() != 0;
        Ok((keeps && self.anchors_trusted()).then(|| entry.offset()))
    }

    /// Whether the places that blocks without data keep are theirs alone.
    pub(super) fn anchors_trusted(&self) -> bool {
        self.space.lock().as_ref().is_some_and(Space::anchors_trusted)
    }

    /// Gives a block that is all the parent's a place in the file, with no sector of its own yet,
    /// and answers with the place. The caller holds the block.
    fn make_partial(&self, block: u64) -> Result<u64> {
        self.make_bitmap(block)?;
        let bitmap = self.bitmap_of(block)?;
        let claim = self.claim(1, self.geometry.block_bytes())?;
        let mut metadata = self.metadata.write();
        self.fill_bits(&mut metadata, bitmap, 0..self.geometry.sectors_per_block(), false)?;
        let entry = BatEntry::payload(PayloadState::PartiallyPresent, claim.offset);
        self.set_entry(&mut metadata, self.payload_index(block), entry)?;
        Ok(claim.offset)
    }

    /// Gives the chunk of a block its sector bitmap, where it has none.
    fn make_bitmap(&self, block: u64) -> Result<()> {
        let index = self.bitmap_index(block);
        let is_there = |entry: BatEntry| entry.bitmap_state() == Some(BitmapBlockState::Present);
        if is_there(self.entry(index)?) {
            return Ok(());
        }
        let bitmap_bytes = BITMAP_BLOCK_BYTES;
        let claim = self.claim(1, bitmap_bytes)?;
        if !claim.fresh {
            self.file.write_zeroes(ByteRange::new(claim.offset, bitmap_bytes))?;
        }
        let mut metadata = self.metadata.write();
        // Threads that hold different blocks of the chunk may come here at once.
        let at = metadata.bat.offset + index.0 * ENTRY_BYTES;
        let page = metadata.pages.load(&*self.file, at - at % PAGE_BYTES)?;
        if is_there(BatEntry(le_u64(&*page, length(at % PAGE_BYTES)))) {
            metadata.frees.push(ByteRange::new(claim.offset, bitmap_bytes));
            return Ok(());
        }
        self.set_entry(
            &mut metadata,
            index,
            BatEntry::bitmap(BitmapBlockState::Present, claim.offset),
        )
    }

    /// Writes into a partially present block whose payload is at `payload`, and makes the sectors
    /// its own. The caller holds the block; the source does not leave it.
    fn add_sectors(&self, source: Source<'_>, at: u64, payload: u64) -> Result<()> {
        let block_bytes = self.geometry.block_bytes();
        let sector_bytes = self.geometry.sector_bytes();
        let (block, end) = (at / block_bytes, at + source.length());
        let start = block * block_bytes;
        // What the first and the last sector hold beside the data, where they are not here yet. A
        // sector that is may be written by others right now: only its own bytes are touched.
        let head = self.rest_of_sector(at - at % sector_bytes..at, at)?;
        let tail =
            self.rest_of_sector(end..end.next_multiple_of(sector_bytes), end.saturating_sub(1))?;
        let place = |disk: u64| payload + (disk - start);
        let first = at - head.len() as u64;
        let total = head.len() as u64 + source.length() + tail.len() as u64;
        match source {
            Source::Data(data) if total <= JOIN_BYTES && total > source.length() => {
                self.file.write_at(&[&head, data, &tail].concat(), place(first))?;
            }
            _ => {
                self.file.write_at(&head, place(first))?;
                self.write_file(source, place(at))?;
                self.file.write_at(&tail, place(end))?;
            }
        }
        let sectors = (at - start) / sector_bytes..(end - start).div_ceil(sector_bytes);
        let bitmap = self.bitmap_of(block)?;
        let mut metadata = self.metadata.write();
        self.fill_bits(&mut metadata, bitmap, sectors, true)?;
        drop(metadata);
        let whole = block_bytes.min(self.size_bytes() - start);
        let run = self.run(start, whole)?;
        if run.length == whole && run.place == Place::File(payload) {
            let entry = BatEntry::payload(PayloadState::FullyPresent, payload);
            self.set_entry(&mut self.metadata.write(), self.payload_index(block), entry)?;
        }
        Ok(())
    }

    /// The present bytes of `range`, part of the sector that holds the byte `of`; nothing where the
    /// sector is here already.
    fn rest_of_sector(&self, range: Range<u64>, of: u64) -> Result<Vec<u8>> {
        if range.is_empty() || matches!(self.run(of, 1)?.place, Place::File(_)) {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; length(range.end - range.start)];
        self.read_disk(&mut bytes, range.start)?;
        Ok(bytes)
    }

    fn fill_bits(
        &self,
        metadata: &mut Metadata,
        bitmap: BlockBitmap,
        sectors: Range<u64>,
        is_set: bool,
    ) -> Result<()> {
        let mut at = sectors.start;
        while at < sectors.end {
            let (page, bit) = bitmap.place(at);
            let count = (sectors.end - at).min(PAGE_BYTES * 8 - bit);
            metadata.pages.change(&*self.file, page, |bytes| {
                bits::fill(bytes, bit..bit + count, is_set);
            })?;
            at += count;
        }
        Ok(())
    }
}

/// Whether a block has data in the file.
pub(super) fn is_present(entry: BatEntry) -> bool {
    matches!(
        entry.payload_state(),
        Some(PayloadState::FullyPresent | PayloadState::PartiallyPresent)
    )
}

/// What [`VhdxWriter::allocate`] did.
enum Allocated {
    /// There is room; this is next.
    Step(Step),
    /// There was no need of anything else: this many bytes are written.
    Written(u64),
}
