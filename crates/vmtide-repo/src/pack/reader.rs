//! Reading packs.

use super::directory::{CHUNK_ENTRY_BYTES, FRAME_ENTRY_BYTES, PackDirectory};
use super::{ChunkEntry, FrameDecoder, FrameEntry};
use crate::context::{DIRECTORY_SECTION, DamageLog, OpenObject, RepoContext};
use crate::crypto::{Subkeys, checksum};
use crate::{BLOCK_BYTES, ObjectId, RepoError, Result};
use std::ops::Range;

/// A pack open for reading, its directory in memory. Shared by threads.
pub(crate) struct Pack {
    id: ObjectId,
    name: String,
    pub(super) object: OpenObject,
    pub(super) sealed: bool,
    pub(super) subkeys: Subkeys,
    directory: PackDirectory,
    damage: DamageLog,
}

impl Pack {
    /// Reads and checks the directory of a pack whose envelope was verified.
    pub(crate) fn from_object(context: &RepoContext, mut opened: OpenObject) -> Result<Self> {
        let name = opened.header.object_name();
        let frame_bytes = opened.trailer.first_count as usize * FRAME_ENTRY_BYTES;
        let chunk_bytes = opened.trailer.second_count as usize * CHUNK_ENTRY_BYTES;
        let expected = frame_bytes + chunk_bytes + opened.cipher.overhead_bytes();
        let mut bytes = std::mem::take(&mut opened.directory);
        if bytes.len() != expected {
            let detail =
                format!("directory of {} bytes, but its counts ask for {expected}", bytes.len());
            return Err(RepoError::damaged(name, detail));
        }
        let (frame_table, chunk_table) = bytes.split_at_mut(frame_bytes);
        let chunk_table = opened.cipher.open(DIRECTORY_SECTION, &[], chunk_table)?;
        let directory = PackDirectory::decode(
            &name,
            frame_table,
            chunk_table,
            opened.trailer.directory_offset,
        )?;
        Ok(Self {
            id: opened.header.id,
            sealed: context.sealed,
            subkeys: context.subkeys.clone(),
            object: opened,
            directory,
            damage: context.damage.clone(),
            name,
        })
    }

    pub(crate) const fn id(&self) -> ObjectId {
        self.id
    }

    /// The length of the whole object in bytes.
    pub(crate) fn length_bytes(&self) -> u64 {
        self.object.reader.length_bytes()
    }

    /// What its directory takes in memory, about.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.directory.chunks.len() * 40 + self.directory.frames.len() * 48
    }

    pub(crate) fn frames(&self) -> &[FrameEntry] {
        &self.directory.frames
    }

    /// All chunks with the ordinals of their first blocks.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = (u32, ChunkEntry)> + '_ {
        let firsts = self.directory.chunk_blocks.iter().copied();
        firsts.zip(self.directory.chunks.iter().copied())
    }

    /// The number of chunks.
    pub(crate) fn chunk_count(&self) -> usize {
        self.directory.chunks.len()
    }

    /// The numbers of the chunks in a frame.
    pub(crate) fn chunks_of(&self, frame: usize) -> Range<usize> {
        let first = &self.directory.first_chunks;
        first[frame] as usize..first[frame + 1] as usize
    }

    /// A chunk by its number, with the ordinal of its first block.
    pub(crate) fn chunk(&self, number: usize) -> (u32, ChunkEntry) {
        (self.directory.chunk_blocks[number], self.directory.chunks[number])
    }

    /// The ordinals of a frame's blocks.
    pub(crate) fn blocks_of(&self, frame: usize) -> Range<u32> {
        self.directory.frame_blocks[frame]..self.directory.frame_blocks[frame + 1]
    }

    /// The number of the frame that holds block `ordinal`.
    pub(crate) fn frame_of(&self, ordinal: u32) -> Result<usize> {
        self.check_ordinal(ordinal)?;
        Ok(self.directory.frame_blocks.partition_point(|first| *first <= ordinal) - 1)
    }

    /// The number of the chunk that holds block `ordinal`.
    pub(crate) fn chunk_of(&self, ordinal: u32) -> Result<usize> {
        self.check_ordinal(ordinal)?;
        Ok(self.directory.chunk_blocks.partition_point(|first| *first <= ordinal) - 1)
    }

    fn check_ordinal(&self, ordinal: u32) -> Result<()> {
        let blocks = self.directory.frame_blocks.last().copied().unwrap_or(0);
        if ordinal < blocks {
            return Ok(());
        }
        let detail = format!("a map names block {ordinal}, but the pack has only {blocks}");
        Err(RepoError::damaged(&self.name, detail))
    }

    /// Reads the stored bytes of neighbouring frames in one go. They are the part of `stored` that
    /// comes back; the vector itself only ever grows, so that reusing it costs nothing.
    pub(crate) fn read_stored<'a>(
        &self,
        frames: Range<usize>,
        stored: &'a mut Vec<u8>,
    ) -> Result<&'a mut [u8]> {
        let entries = &self.directory.frames[frames.clone()];
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
            return Ok(&mut []);
        };
        let length = last.offset + u64::from(last.stored_length) - first.offset;
        let length = usize::try_from(length)
            .map_err(|_| RepoError::damaged(&self.name, "frames longer than memory"))?;
        if stored.len() < length {
            stored.resize(length, 0);
        }
        let stored = &mut stored[..length];
        self.object.reader.read_at(stored, first.offset).inspect_err(|error| {
            if is_media_error(error) {
                frames.for_each(|number| self.note(number, error));
            }
        })?;
        Ok(stored)
    }

    /// Puts a frame that cannot be read on the list of what was met damaged.
    fn note(&self, number: usize, error: &RepoError) {
        let number = u32::try_from(number).ok();
        self.damage.note(self.id, number, error.to_string());
    }

    /// Verifies frame `number` of the pack, whose stored bytes these are, and puts its chunks into
    /// `out`, which must have room for exactly them. Nothing of a frame that fails is to be used.
    ///
    /// The tag (or, in a repository without encryption, the checksum) covers every stored byte, the
    /// frame's place and its chunk count, so what comes out is what the writer put in. That the writer
    /// hashed the same bytes is not looked at: see [`decode_and_compare`](Self::decode_and_compare).
    pub(crate) fn decode(
        &self,
        number: usize,
        stored: &mut [u8],
        out: &mut [u8],
        decoder: &mut FrameDecoder,
    ) -> Result<()> {
        self.try_decode(number, stored, out, decoder).inspect_err(|error| self.note(number, error))
    }

    fn try_decode(
        &self,
        number: usize,
        stored: &mut [u8],
        out: &mut [u8],
        decoder: &mut FrameDecoder,
    ) -> Result<()> {
        let frame = &self.directory.frames[number];
        let content = self.open(number, stored)?;
        decoder
            .decode(frame.compression, content, out)
            .ok_or_else(|| self.damaged(number, "it does not decompress to its chunks"))
    }

    fn damaged(&self, number: usize, detail: &str) -> RepoError {
        let offset = self.directory.frames[number].offset;
        RepoError::damaged(&self.name, format!("frame {number} at byte {offset}: {detail}"))
    }

    /// Verifies the stored bytes of a frame, and opens them where they are.
    pub(super) fn open<'a>(&self, number: usize, stored: &'a mut [u8]) -> Result<&'a mut [u8]> {
        let frame = &self.directory.frames[number];
        // Sealed frames are vouched for by their tag, which is stronger and covers the same bytes.
        if !self.sealed && checksum(stored) != frame.checksum {
            return Err(self.damaged(number, "its checksum does not match"));
        }
        let associated = FrameEntry::associated(frame.chunks, frame.compression);
        self.object
            .cipher
            .open(number as u64, &associated, stored)
            .map_err(|_| self.damaged(number, "it does not open: its bytes were changed"))
    }

    /// As [`decode`](Self::decode), and compares every chunk with its id. For who verifies data or
    /// stores it again under the same ids: it also finds what went wrong in the writer's memory.
    pub(crate) fn decode_and_compare(
        &self,
        number: usize,
        stored: &mut [u8],
        out: &mut [u8],
        decoder: &mut FrameDecoder,
    ) -> Result<()> {
        self.decode(number, stored, out, decoder)?;
        let mut rest = &*out;
        for chunk in &self.directory.chunks[self.chunks_of(number)] {
            let (content, after) = rest.split_at(usize::from(chunk.blocks) * BLOCK_BYTES);
            if self.subkeys.chunk_id(content) != chunk.id {
                let offset = self.directory.frames[number].offset;
                let detail = format!(
                    "frame {number} at byte {offset}: a chunk's content does not match its id"
                );
                let error = RepoError::damaged(&self.name, detail);
                self.note(number, &error);
                return Err(error);
            }
            rest = after;
        }
        Ok(())
    }

    /// The length of a frame's chunks in bytes.
    pub(crate) fn content_length(&self, number: usize) -> usize {
        self.blocks_of(number).len() * BLOCK_BYTES
    }
}

/// Whether the bytes of an object are lost, and not the way to them: it is shorter than its
/// directory says, or the disk under a local store cannot read it.
pub(crate) fn is_media_error(error: &RepoError) -> bool {
    match error {
        RepoError::Damaged { .. } => true,
        RepoError::Io { source, .. } => vmtide_block::files::is_media_error(source),
        _ => false,
    }
}
