//! A part of a disk with a file system in it, in one piece or several.

use vmtide_block::{BlockDevice, ByteRange, CancelToken, RangeSet, Result};

/// How much of a long table is read at once, in bytes: a frame of a repository is not much longer.
const PIECE_BYTES: u64 = 1 << 20;

/// A part of a volume and where it lies on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The offset in the volume.
    pub(crate) at: u64,
    pub(crate) range: ByteRange,
}

/// A partition, a whole disk, or a logical volume of LVM. Offsets are those inside it. What no piece has is not there.
pub(crate) struct Volume<'a> {
    device: &'a dyn BlockDevice,
    /// In their order in the volume.
    pieces: Vec<Piece>,
}

impl<'a> Volume<'a> {
    /// The part `area` of `device`, as far as that goes; none where it begins behind the end.
    pub(crate) fn new(device: &'a dyn BlockDevice, area: ByteRange) -> Option<Self> {
        Self::of(device, vec![Piece { at: 0, range: area }])
    }

    /// Pieces of `device`, as far as that goes; none where they overlap in the volume, or nothing is there.
    fn of(device: &'a dyn BlockDevice, mut pieces: Vec<Piece>) -> Option<Self> {
        for piece in &mut pieces {
            let end = piece.range.checked_end()?.min(device.size_bytes());
            piece.range = ByteRange::from_bounds(piece.range.offset.min(end), end);
        }
        pieces.retain(|piece| !piece.range.is_empty());
        pieces.sort_by_key(|piece| piece.at);
        let last = pieces.last()?;
        last.at.checked_add(last.range.length)?;
        let apart = |pair: &[Piece]| pair[0].at + pair[0].range.length <= pair[1].at;
        pieces.windows(2).all(apart).then_some(Self { device, pieces })
    }

    /// A volume of pieces of this one; none where nothing of it is here.
    pub(crate) fn inside(&self, pieces: &[Piece]) -> Option<Self> {
        let mut found = Vec::new();
        for piece in pieces {
            for part in self.parts(piece.range.offset, piece.range.length) {
                let at = piece.at.checked_add(part.at - piece.range.offset)?;
                found.push(Piece { at, ..part });
            }
        }
        Self::of(self.device, found)
    }

    /// Where it ends.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.at + piece.range.length)
    }

    /// All of it, as bytes of the disk.
    pub(crate) fn area(&self) -> RangeSet {
        RangeSet::from(self.pieces.iter().map(|piece| piece.range).collect::<Vec<_>>())
    }

    /// The part of `length` bytes at `offset`, as far as it is there.
    fn parts(&self, offset: u64, length: u64) -> impl Iterator<Item = Piece> {
        let end = offset.saturating_add(length);
        let first = self.pieces.partition_point(|piece| piece.at + piece.range.length <= offset);
        self.pieces[first..].iter().take_while(move |piece| piece.at < end).map(move |piece| {
            let skipped = offset.saturating_sub(piece.at);
            let behind = (piece.at + piece.range.length).saturating_sub(end);
            let range =
                ByteRange::from_bounds(piece.range.offset + skipped, piece.range.end() - behind);
            Piece { at: piece.at + skipped, range }
        })
    }

    /// What of `ranges` of the disk lies in the `length` bytes at `offset`.
    pub(crate) fn touched(&self, offset: u64, length: u64, ranges: &RangeSet) -> RangeSet {
        let mut found = RangeSet::new();
        for part in self.parts(offset, length) {
            ranges.within(part.range).iter().for_each(|range| found.insert(range));
        }
        found
    }

    /// Reads at `offset`; answers with whether all of it is there.
    ///
    /// # Errors
    /// Those of the disk.
    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<bool> {
        let (mut rest, mut at) = (buffer, offset);
        for part in self.parts(offset, rest.len() as u64) {
            let length = usize::try_from(part.range.length).ok().filter(|_| part.at == at);
            let Some(length) = length else { return Ok(false) };
            let (now, later) = rest.split_at_mut(length.min(rest.len()));
            self.device.read_at(now, part.range.offset)?;
            (rest, at) = (later, at + part.range.length);
        }
        Ok(rest.is_empty())
    }

    /// How much of `length` bytes at `offset` is there before the first gap, and whether all of that reads as zero.
    fn there(&self, offset: u64, length: u64) -> Result<(u64, bool)> {
        let (mut at, mut is_zero) = (offset, true);
        for part in self.parts(offset, length) {
            if part.at != at {
                break;
            }
            let extents = self.device.extents(part.range)?;
            is_zero &= extents.iter().all(|extent| extent.kind.reads_as_zero());
            at += part.range.length;
        }
        Ok((at - offset, is_zero))
    }

    /// Hands the entries of a table of `length` bytes at `offset` to `take`, each of `entry_bytes` (at most
    /// [`PIECE_BYTES`]) with its number; stretches that read as zero are left out.
    ///
    /// # Errors
    /// Those of the disk and of `take`; cancelled.
    pub(crate) fn for_each_entry(
        &self,
        (offset, length): (u64, u64),
        entry_bytes: u32,
        cancel: &CancelToken,
        take: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let entry = u64::from(entry_bytes);
        let step = PIECE_BYTES / entry * entry;
        let mut buffer = Vec::new();
        let mut at = 0;
        while step > 0 && at < length {
            cancel.check()?;
            let begin = offset.checked_add(at).filter(|begin| *begin < self.size_bytes());
            let Some(begin) = begin else { return Ok(()) };
            let (there, is_zero) = self.there(begin, step.min(length - at))?;
            if !is_zero {
                buffer.resize(usize::try_from(there).unwrap_or(0), 0);
                self.read(&mut buffer, begin)?;
                for (number, entry) in
                    (at / entry..).zip(buffer.chunks_exact_mut(crate::bytes::index(entry_bytes)))
                {
                    take(number, entry)?;
                }
            }
            at += step;
        }
        Ok(())
    }
}
