//! Writing data: in place where the block is there, into a new block otherwise.

use super::bitmap::Bitmap;
use super::footer::{FOOTER_BYTES, Kind};
use super::writer::{Hold, Space, State, VhdWriter, View, entry_of};
use crate::bytes::length;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmtide_block::{BlockDevice, ByteRange, Result, is_zero};

/// The alignment of blocks' data in the file, as Windows 8 and later have it: a block on a disk
/// with sectors of 4 KiB is then read and written without detours.
const DATA_ALIGNMENT: u64 = 4096;

/// The file grows by a quarter, at most by so much, because each step costs two small writes.
const STEP_MAX_BYTES: u64 = 64 << 20;

/// One block's part of a change.
struct Piece {
    block: u64,
    /// The offset in the block.
    inside: u64,
    /// The offset on the disk.
    at: u64,
}

impl VhdWriter {
    /// Writes `data`; the caller has checked the range and shares the gate.
    pub(super) fn write_data(&self, state: &State, data: &[u8], offset: u64) -> Result<()> {
        if self.layers.kind == Kind::Fixed {
            return self.file.write_at(data, offset);
        }
        let (mut rest, mut at) = (data, offset);
        while !rest.is_empty() {
            let (piece, limit) = self.piece(at, rest.len() as u64);
            let (now, after) = rest.split_at(length(limit));
            self.write_piece(state, &piece, now)?;
            at += limit;
            rest = after;
        }
        Ok(())
    }

    /// Makes `range` zero; the caller has checked the range and shares the gate.
    pub(super) fn zero_range(&self, state: &State, range: ByteRange) -> Result<()> {
        if self.layers.kind == Kind::Fixed {
            return self.file.write_zeroes(range);
        }
        let mut at = range.offset;
        while at < range.end() {
            let (piece, limit) = self.piece(at, range.end() - at);
            self.zero_piece(state, &piece, limit)?;
            at += limit;
        }
        Ok(())
    }

    fn piece(&self, at: u64, limit: u64) -> (Piece, u64) {
        let block_bytes = self.shape().block_bytes;
        let (block, inside) = (at / block_bytes, at % block_bytes);
        (Piece { block, inside, at }, limit.min(block_bytes - inside))
    }

    fn write_piece(&self, state: &State, piece: &Piece, data: &[u8]) -> Result<()> {
        if let Some(start) = state.block(self.shape(), piece.block)
            && self.write_present(piece, start, data)?
        {
            return Ok(());
        }
        let hold = self.hold(piece.block);
        match state.block(self.shape(), piece.block) {
            Some(start) => self.write_completing(state, piece, start, data),
            None => self.write_new(state, piece, data, &hold),
        }
    }

    /// Writes to a block that is there; `false` where that takes completing sectors, which are the
    /// parent's so far.
    fn write_present(&self, piece: &Piece, start: u64, data: &[u8]) -> Result<bool> {
        let stored = start + self.shape().bitmap_bytes + piece.inside;
        if self.layers.kind == Kind::Dynamic {
            self.file.write_at(data, stored)?;
            return Ok(true);
        }
        let bitmap = self.bitmap(piece.block, start)?;
        let (first, end) = (piece.inside, piece.inside + data.len() as u64);
        let completes = |edge: u64| !edge.is_multiple_of(512) && !bitmap.get(edge / 512);
        if completes(first) || completes(end) {
            return Ok(false);
        }
        self.file.write_at(data, stored)?;
        self.set_sectors(piece.block, &bitmap, first / 512, end.div_ceil(512));
        Ok(true)
    }

    /// Writes to a block of a differencing disk that is there and held: sectors that become its own
    /// get the rest of their bytes from the parent. Sectors that are its own already are written
    /// byte by byte, because other threads write to them at the same time.
    fn write_completing(
        &self,
        state: &State,
        piece: &Piece,
        start: u64,
        data: &[u8],
    ) -> Result<()> {
        if self.write_present(piece, start, data)? {
            return Ok(());
        }
        let bitmap = self.bitmap(piece.block, start)?;
        let (mut from, mut to) = (piece.inside, piece.inside + data.len() as u64);
        let (first, last) = (from / 512, (to - 1) / 512);
        let mut bytes = data.to_vec();
        if !to.is_multiple_of(512) && !bitmap.get(last) {
            let sector = self.sector_now(state, piece, last)?;
            bytes.extend_from_slice(sector.get(length(to % 512)..).unwrap_or_default());
            to = (last + 1) * 512;
        }
        if !from.is_multiple_of(512) && !bitmap.get(first) {
            let mut sector = self.sector_now(state, piece, first)?;
            sector.truncate(length(from % 512));
            bytes.splice(0..0, sector);
            from = first * 512;
        }
        self.file.write_at(&bytes, start + self.shape().bitmap_bytes + from)?;
        self.set_sectors(piece.block, &bitmap, from / 512, to.div_ceil(512));
        Ok(())
    }

    /// The 512 bytes that a sector of a block has now; past the end of the disk zeros.
    fn sector_now(&self, state: &State, piece: &Piece, sector: u64) -> Result<Vec<u8>> {
        let at = piece.at - piece.inside + sector * 512;
        let mut bytes = vec![0u8; 512];
        let present = length(self.size_bytes().saturating_sub(at)).min(512);
        let view = View { writer: self, state };
        self.layers.read(&view, bytes.get_mut(..present).unwrap_or_default(), at)?;
        Ok(bytes)
    }

    /// Writes to a block that is not there yet and held.
    fn write_new(&self, state: &State, piece: &Piece, data: &[u8], hold: &Hold<'_>) -> Result<()> {
        if self.layers.kind == Kind::Dynamic {
            if is_zero(data) {
                return Ok(());
            }
            let start = self.allocate(state)?;
            let stored = start + self.shape().bitmap_bytes + piece.inside;
            self.file.write_at(data, stored)?;
            return self.enter_block(state, piece.block, start);
        }
        let start = self.allocate_differencing(state, piece.block, hold)?;
        self.write_completing(state, piece, start, data)
    }

    fn zero_piece(&self, state: &State, piece: &Piece, count: u64) -> Result<()> {
        let present = state.block(self.shape(), piece.block);
        if self.layers.kind == Kind::Dynamic {
            return match present {
                Some(start) => {
                    let stored = start + self.shape().bitmap_bytes + piece.inside;
                    self.file.write_zeroes(ByteRange::new(stored, count))
                }
                None => Ok(()),
            };
        }
        if present.is_none() && self.parent_is_zero(ByteRange::new(piece.at, count))? {
            return Ok(());
        }
        // The whole sectors are zeroed where they are, the rest is written.
        let (from, to) = (piece.inside, piece.inside + count);
        let (whole, whole_end) = (from.next_multiple_of(512), to / 512 * 512);
        if whole >= whole_end {
            return self.write_piece(state, piece, &vec![0; length(count)]);
        }
        let block_at = piece.at - piece.inside;
        for (edge, edge_end) in [(from, whole), (whole_end, to)] {
            if edge < edge_end {
                let part = Piece { block: piece.block, inside: edge, at: block_at + edge };
                self.write_piece(state, &part, &vec![0; length(edge_end - edge)])?;
            }
        }
        let start = match state.block(self.shape(), piece.block) {
            Some(start) => start,
            None => {
                let hold = self.hold(piece.block);
                match state.block(self.shape(), piece.block) {
                    Some(start) => start,
                    None => self.allocate_differencing(state, piece.block, &hold)?,
                }
            }
        };
        let stored = start + self.shape().bitmap_bytes;
        self.file.write_zeroes(ByteRange::from_bounds(stored + whole, stored + whole_end))?;
        let bitmap = self.bitmap(piece.block, start)?;
        self.set_sectors(piece.block, &bitmap, whole / 512, whole_end / 512);
        Ok(())
    }

    /// Whether the parent is known to read as zeros there.
    fn parent_is_zero(&self, range: ByteRange) -> Result<bool> {
        let Some(parent) = &self.layers.parent else {
            return Ok(true);
        };
        let end = range.end().min(parent.size_bytes());
        let mut at = range.offset;
        while at < end {
            let extents = parent.extents(ByteRange::from_bounds(at, end))?;
            let before = at;
            for extent in extents {
                if !extent.kind.reads_as_zero() {
                    return Ok(false);
                }
                at = extent.range.end();
            }
            if at <= before {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A new block of a differencing disk that is held: no sector is its own yet.
    fn allocate_differencing(&self, state: &State, block: u64, _hold: &Hold<'_>) -> Result<u64> {
        let start = self.allocate(state)?;
        let bitmap = Bitmap::from_bytes(&vec![0; length(self.shape().bitmap_bytes)]);
        self.new_bitmap(block, Arc::new(bitmap));
        self.enter_block(state, block, start)?;
        Ok(start)
    }

    /// Enters a block in the table, in memory; the next flush does in the file.
    fn enter_block(&self, state: &State, block: u64, start: u64) -> Result<()> {
        let entry = entry_of(&self.layers.name, start)?;
        if let Some(place) = state.entries.get(length(block)) {
            // Entry and note at once: a flush that finds the one must find the other.
            let mut changed = self.changed.lock();
            place.store(entry, Ordering::Release);
            changed.entries.insert(block);
        }
        Ok(())
    }

    /// Gives a block its place in the file, where all bytes are zero. So is its bitmap, until a flush.
    fn allocate(&self, state: &State) -> Result<u64> {
        let shape = self.shape();
        let mut space = self.space.lock();
        let data = (space.end + shape.bitmap_bytes).next_multiple_of(DATA_ALIGNMENT);
        let start = data - shape.bitmap_bytes;
        entry_of(&self.layers.name, start)?;
        self.reserve(state, &mut space, start + shape.stored_bytes())?;
        Ok(start)
    }

    /// Takes the space up to `end` into use. The file grows with a footer at its end, so that the
    /// bytes of a guest never stand there; footers in the space are wiped.
    pub(super) fn reserve(&self, state: &State, space: &mut Space, end: u64) -> Result<()> {
        if end + FOOTER_BYTES > space.file_bytes {
            let size = (end + (end / 4).min(STEP_MAX_BYTES)).next_multiple_of(FOOTER_BYTES);
            self.file.resize(size + FOOTER_BYTES)?;
            space.file_bytes = size + FOOTER_BYTES;
            self.file.write_at(&state.footer.encode(), size)?;
            space.footers.push(size);
        }
        let file_bytes = space.file_bytes;
        let footers = space.footers.extract_if(.., |footer| *footer < end);
        for footer in footers.chain(space.cut_footers.extract_if(.., |footer| *footer < end)) {
            let bytes = FOOTER_BYTES.min(file_bytes - footer);
            self.file.write_at(&vec![0; length(bytes)], footer)?;
        }
        space.end = end;
        Ok(())
    }
}
