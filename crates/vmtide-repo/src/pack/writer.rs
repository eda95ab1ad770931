//! Writing one pack.

use super::{ChunkEntry, Compression, FrameEntry, MAX_FRAME_BYTES, MAX_FRAME_CHUNKS};
use crate::context::{DIRECTORY_SECTION, NewObject, RepoContext};
use crate::envelope::{ObjectKind, TRAILER_BYTES};
use crate::{BLOCK_BYTES, ObjectId, RepoError, Result};

/// A pack is finished at so many chunks, however well they compress: its directory, forward and the
/// memory of whoever reads it grow with them. At 64 KiB chunks this is 4 GiB of content.
const MAX_PACK_CHUNKS: usize = 64 << 10;

/// A pack being written. Dropped without [`finish`](Self::finish), it never was.
pub(crate) struct PackWriter {
    object: NewObject,
    frames: Vec<FrameEntry>,
    chunks: Vec<ChunkEntry>,
    next_ordinal: u32,
}

/// A pack that is durable.
#[derive(Debug)]
pub(crate) struct FinishedPack {
    pub id: ObjectId,
    pub chunks: Vec<ChunkEntry>,
    pub stored_bytes: u64,
}

impl PackWriter {
    /// Begins a pack under a new random id.
    pub(crate) fn create(context: &RepoContext) -> Result<Self> {
        let object = context.create_object(ObjectKind::Pack, ObjectId::random()?)?;
        Ok(Self { object, frames: Vec::new(), chunks: Vec::new(), next_ordinal: 0 })
    }

    /// The id it will have.
    pub(crate) const fn id(&self) -> ObjectId {
        self.object.header.id
    }

    /// The bytes written so far.
    pub(crate) const fn stored_bytes(&self) -> u64 {
        self.object.offset
    }

    /// Whether it is time to begin another: at so many stored bytes, or at [`MAX_PACK_CHUNKS`].
    pub(crate) fn is_full(&self, pack_size_bytes: u64) -> bool {
        self.stored_bytes() >= pack_size_bytes || self.chunks.len() >= MAX_PACK_CHUNKS
    }

    /// The ordinal that the first block of the next frame will get.
    pub(crate) const fn next_ordinal(&self) -> u32 {
        self.next_ordinal
    }

    /// Appends a frame of `chunks`; `stored` is their stored form and is sealed in place.
    pub(crate) fn append(
        &mut self,
        chunks: &[ChunkEntry],
        compression: Compression,
        stored: &mut Vec<u8>,
    ) -> Result<()> {
        let too_much = || RepoError::Invalid("too much for one pack".into());
        let count = u16::try_from(chunks.len()).map_err(|_| too_much())?;
        let blocks: u32 = chunks.iter().map(|chunk| u32::from(chunk.blocks)).sum();
        if chunks.len() > MAX_FRAME_CHUNKS || blocks as usize * BLOCK_BYTES > MAX_FRAME_BYTES {
            return Err(RepoError::Invalid(format!(
                "a frame of {} chunks and {blocks} blocks is more than readers take",
                chunks.len()
            )));
        }
        let next_ordinal = self.next_ordinal.checked_add(blocks).ok_or_else(too_much)?;
        let offset = self.object.offset;
        let number = self.frames.len() as u64;
        let associated = FrameEntry::associated(count, compression);
        let checksum = self.object.write_section(number, &associated, stored)?;
        let stored_length = u32::try_from(stored.len()).map_err(|_| too_much())?;
        self.frames.push(FrameEntry {
            offset,
            stored_length,
            chunks: count,
            compression,
            checksum,
        });
        self.chunks.extend_from_slice(chunks);
        self.next_ordinal = next_ordinal;
        Ok(())
    }

    /// Writes the directory and makes the pack durable.
    pub(crate) fn finish(self) -> Result<FinishedPack> {
        let count = |count: usize| {
            u32::try_from(count).map_err(|_| RepoError::Invalid("too much for one pack".into()))
        };
        let (frame_count, chunk_count) = (count(self.frames.len())?, count(self.chunks.len())?);
        let mut table = Vec::new();
        self.chunks.iter().for_each(|chunk| chunk.encode(&mut table));
        self.object.cipher.seal(DIRECTORY_SECTION, &[], &mut table)?;
        let mut directory = Vec::new();
        self.frames.iter().for_each(|frame| frame.encode(&mut directory));
        directory.append(&mut table);
        let (id, offset) = (self.id(), self.object.offset);
        self.object.finish(&directory, frame_count, chunk_count)?;
        let stored_bytes = offset + (directory.len() + TRAILER_BYTES) as u64;
        Ok(FinishedPack { id, chunks: self.chunks, stored_bytes })
    }
}
