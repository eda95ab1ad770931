//! Filling packs: chunks into frames, frames into a pack, a full pack into the session.

use super::state::SessionState;
use crate::pack::{ChunkEntry, FrameEncoder, MAX_FRAME_BYTES, PackWriter};
use crate::{BLOCK_BYTES, ChunkId, Location, RepoError, Result};

/// New data this far apart on the disk, in blocks, was probably not written together, and will not be
/// overwritten together.
const JUMP_BLOCKS: u64 = 256;

/// An island is new data without a jump in it. Where islands are smaller than this, frames end with
/// them. A restore decodes the whole of a frame whatever is still in use of it: after a year of scattered writes, frames of
/// 32 islands that die one by one would cost a restore four times as much as those of one. See
/// `docs/decisions/0013-layout.md`.
const SMALL_ISLAND_BYTES: usize = 512 << 10;

/// The bytes of chunks in a frame that may end with an island, at least: for less, its entries and what
/// compression loses weigh more.
const MIN_FRAME_BYTES: usize = 64 << 10;

/// One worker's open pack. It goes from disk to disk of a job, so that a VM with many small disks
/// does not leave many small packs.
pub(super) struct PackFiller {
    frame_bytes: usize,
    encoder: FrameEncoder,
    pack: Option<PackWriter>,
    frame: Vec<u8>,
    frame_chunks: Vec<ChunkEntry>,
    stored: Vec<u8>,
    /// The block of the disk of the next chunk.
    block: u64,
    /// The one after the last chunk taken.
    next_block: u64,
    /// What was taken since the last jump.
    island_bytes: usize,
}

impl PackFiller {
    /// A filler that compresses some `frame_bytes` together.
    pub(super) fn new(compression_level: i32, frame_bytes: usize) -> Result<Self> {
        let frame_bytes = frame_bytes.min(MAX_FRAME_BYTES);
        Ok(Self {
            frame_bytes,
            encoder: FrameEncoder::new(compression_level)?,
            pack: None,
            frame: Vec::with_capacity(frame_bytes),
            frame_chunks: Vec::new(),
            stored: Vec::new(),
            block: 0,
            next_block: 0,
            island_bytes: 0,
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

    /// Says that the chunk taken next, if it is new, lies at this block of the disk.
    pub(super) fn go_to(&mut self, block: u64) {
        self.block = block;
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
        if !(self.next_block..self.next_block + JUMP_BLOCKS).contains(&self.block) {
            if self.island_bytes < SMALL_ISLAND_BYTES && self.frame.len() >= MIN_FRAME_BYTES {
                stored += self.flush_frame()?;
            }
            self.island_bytes = 0;
        }
        self.next_block = self.block + u64::from(blocks);
        self.block = self.next_block;
        self.island_bytes += chunk.len();
        // The place that was named stays right: the blocks that wait only move into the pack.
        if self.frame.len() + chunk.len() > MAX_FRAME_BYTES {
            stored += self.flush_frame()?;
        }
        self.frame.extend_from_slice(chunk);
        self.frame_chunks.push(ChunkEntry { id, blocks });
        // Only now, with the chunk taken, may the pack end: it was promised a place in this one.
        if self.frame.len() >= self.frame_bytes || self.is_pack_full(session) {
            stored += self.flush_frame()?;
        }
        if self.is_pack_full(session) {
            self.finish_pack(session)?;
        }
        Ok(stored)
    }

    fn is_pack_full(&self, session: &SessionState) -> bool {
        self.pack.as_ref().is_some_and(|pack| pack.is_full(session.pack_size_bytes))
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
