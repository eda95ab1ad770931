//! Filling packs: chunks into frames, frames into a pack, a full pack into the session.

use super::session::SessionState;
use crate::pack::{ChunkEntry, FrameEncoder, MAX_FRAME_BYTES, PackWriter};
use crate::{BLOCK_BYTES, ChunkId, Location, RepoError, Result};

/// The bytes of chunks that are compressed together, at least. Smaller frames compress worse (zstd
/// sees less); larger ones leave the processor's cache and make reading one block cost more. See
/// `docs/decisions/0003-frames-and-levels.md`.
const FRAME_BYTES: usize = 2 << 20;

/// One worker's open pack. It goes from disk to disk of a job, so that a VM with many small disks
/// does not leave many small packs.
pub(super) struct PackFiller {
    encoder: FrameEncoder,
    pack: Option<PackWriter>,
    frame: Vec<u8>,
    frame_chunks: Vec<ChunkEntry>,
    stored: Vec<u8>,
}

impl PackFiller {
    pub(super) fn new(compression_level: i32) -> Result<Self> {
        Ok(Self {
            encoder: FrameEncoder::new(compression_level)?,
            pack: None,
            frame: Vec::with_capacity(FRAME_BYTES),
            frame_chunks: Vec::new(),
            stored: Vec::new(),
        })
    }

    /// The place that the next chunk given to [`push`](Self::push) will have.
    pub(super) fn next_location(&mut self, session: &SessionState) -> Result<Location> {
        let pack = match &mut self.pack {
            Some(pack) => pack,
            None => self.pack.insert(PackWriter::create(&session.context)?),
        };
        let waiting = u32::try_from(self.frame.len() / BLOCK_BYTES).ok();
        let ordinal = waiting
            .and_then(|waiting| pack.next_ordinal().checked_add(waiting))
            .ok_or_else(|| RepoError::Invalid("too much for one pack".into()))?;
        Ok(Location { pack: pack.id(), ordinal })
    }

    /// Takes a chunk at the place that [`next_location`](Self::next_location) named. Answers with
    /// the stored bytes that this made.
    pub(super) fn push(
        &mut self,
        session: &SessionState,
        id: ChunkId,
        chunk: &[u8],
    ) -> Result<u64> {
        let blocks = u16::try_from(chunk.len() / BLOCK_BYTES)
            .map_err(|_| RepoError::Invalid("chunk too long".into()))?;
        let mut stored = 0;
        // The place that was named stays right: the blocks that wait only move into the pack.
        if self.frame.len() + chunk.len() > MAX_FRAME_BYTES {
            stored += self.flush_frame()?;
        }
        self.frame.extend_from_slice(chunk);
        self.frame_chunks.push(ChunkEntry { id, blocks });
        if self.frame.len() < FRAME_BYTES {
            return Ok(stored);
        }
        stored += self.flush_frame()?;
        if self.pack.as_ref().is_some_and(|pack| pack.is_full(session.pack_size_bytes)) {
            self.finish_pack(session)?;
        }
        Ok(stored)
    }

    /// Puts the chunks that wait into the pack. Answers with the stored bytes that this made.
    pub(super) fn flush_frame(&mut self) -> Result<u64> {
        let Some(pack) = self.pack.as_mut().filter(|_| !self.frame_chunks.is_empty()) else {
            return Ok(0);
        };
        let before = pack.stored_bytes();
        let compression = self.encoder.encode(&self.frame, &mut self.stored)?;
        pack.append(&self.frame_chunks, compression, &mut self.stored)?;
        self.frame.clear();
        self.frame_chunks.clear();
        Ok(pack.stored_bytes() - before)
    }

    /// Makes the open pack durable and hands its chunks to the session's index.
    pub(super) fn finish_pack(&mut self, session: &SessionState) -> Result<()> {
        self.flush_frame()?;
        match self.pack.take() {
            // A pack opened for a chunk that another worker then stored.
            Some(pack) if pack.next_ordinal() == 0 => Ok(()),
            Some(pack) => session.add_finished_pack(pack.finish()?),
            None => Ok(()),
        }
    }
}
