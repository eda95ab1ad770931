//! Reading a part of a frame: no less verified than all of it, for less work.

use super::{Compression, FrameDecoder, Pack};
use crate::BLOCK_BYTES;
use std::ops::Range;

/// zstd's blocks, which come out whole: to stop inside one saves nothing.
const STEP_BYTES: usize = 128 << 10;

impl Pack {
    /// The part of a frame's content that is worth reading for who wants the bytes `wanted` of it; `None` for all of it.
    ///
    /// Where chunks are stored as they are and not sealed, those with the wanted bytes, which their ids verify. What is
    /// compressed is verified by the tag or checksum of all that is stored, and decompressed as far as is wanted. What is
    /// sealed and not compressed has next to no work after its tag, and no part.
    pub(crate) fn part_for(&self, number: usize, wanted: &Range<usize>) -> Option<Range<usize>> {
        if !self.object.reader.rereads_cheaply() {
            return None;
        }
        let length = self.content_length(number);
        let part = match self.frames()[number].compression {
            Compression::None if self.sealed => return None,
            Compression::None => self.chunks_around(number, wanted),
            Compression::Zstd => 0..wanted.end.next_multiple_of(STEP_BYTES).min(length),
        };
        (part.len() < length).then_some(part)
    }

    /// The bytes of the chunks that have a part of `wanted`.
    fn chunks_around(&self, number: usize, wanted: &Range<usize>) -> Range<usize> {
        let begin = self.blocks_of(number).start;
        let bounds = self.chunks_of(number).map(|chunk| {
            let (first, entry) = self.chunk(chunk);
            let start = (first - begin) as usize * BLOCK_BYTES;
            start..start + usize::from(entry.blocks) * BLOCK_BYTES
        });
        let mut met = bounds.filter(|bytes| bytes.end > wanted.start && bytes.start < wanted.end);
        let first = met.next().unwrap_or_default();
        first.start..met.next_back().map_or(first.end, |last| last.end)
    }

    /// Fills `out` with the bytes `part` of a frame's content, which [`part_for`](Self::part_for) answered with, and verifies them.
    /// False where that does not come out right, for whatever reason: who reads all of the frame is told what is wrong.
    pub(crate) fn read_part(
        &self,
        number: usize,
        part: &Range<usize>,
        stored: &mut Vec<u8>,
        out: &mut [u8],
        decoder: &mut FrameDecoder,
    ) -> bool {
        let compression = self.frames()[number].compression;
        if compression == Compression::None && !self.sealed {
            return self.read_chunks(number, part, out);
        }
        if part.start != 0 {
            return false;
        }
        let Ok(stored) = self.read_stored(number..number + 1, stored) else { return false };
        let Ok(content) = self.open(number, stored) else { return false };
        decoder.decode_beginning(compression, content, out).is_some()
    }

    /// Reads whole chunks that are stored as they are, and compares them with their ids.
    fn read_chunks(&self, number: usize, part: &Range<usize>, out: &mut [u8]) -> bool {
        let frame = &self.frames()[number];
        let is_plain = frame.stored_length as usize == self.content_length(number);
        let offset = frame.offset + part.start as u64;
        if !is_plain || out.len() != part.len() || self.object.reader.read_at(out, offset).is_err()
        {
            return false;
        }
        let begin = self.blocks_of(number).start;
        let mut rest = &*out;
        for (first, entry) in self.chunks_of(number).map(|chunk| self.chunk(chunk)) {
            let start = (first - begin) as usize * BLOCK_BYTES;
            if start < part.start {
                continue;
            }
            let Some((content, after)) =
                rest.split_at_checked(usize::from(entry.blocks) * BLOCK_BYTES)
            else {
                break;
            };
            if self.subkeys.chunk_id(content) != entry.id {
                return false;
            }
            rest = after;
        }
        // Whatever was asked for: nothing is handed out that no id stands for.
        rest.is_empty()
    }
}
