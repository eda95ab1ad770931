//! Rewriting packs without their dead chunks.

use crate::care::mark::ChunkBits;
use crate::context::RepoContext;
use crate::disk::Move;
use crate::pack::{ChunkEntry, FrameDecoder, FrameEncoder, Pack, PackWriter};
use crate::{BLOCK_BYTES, Location, Result};

/// The level of compression of what is rewritten: that of backups.
const COMPRESSION_LEVEL: i32 = 3;

/// Notes a move, joined with the one before where it continues it: a pack's moves are few runs.
fn push_move(moves: &mut Vec<Move>, next: Move) {
    let (ordinal, count, target) = next;
    match moves.last_mut() {
        Some((first, length, begun))
            if *first + *length == ordinal
                && begun.pack == target.pack
                && begun.ordinal + *length == target.ordinal =>
        {
            *length += count;
        }
        _ => moves.push(next),
    }
}

/// Moves chunks into new packs.
pub(super) struct Mover<'a> {
    context: &'a RepoContext,
    pack_size_bytes: u64,
    decoder: FrameDecoder,
    encoder: FrameEncoder,
    writer: Option<PackWriter>,
    rewritten_bytes: u64,
}

impl<'a> Mover<'a> {
    pub(super) fn new(context: &'a RepoContext, pack_size_bytes: u64) -> Result<Self> {
        Ok(Self {
            context,
            pack_size_bytes,
            decoder: FrameDecoder::new()?,
            encoder: FrameEncoder::new(COMPRESSION_LEVEL)?,
            writer: None,
            rewritten_bytes: 0,
        })
    }

    /// Copies the live chunks of a pack, frame by frame, and says where each went.
    pub(super) fn move_chunks(&mut self, pack: &Pack, live: &ChunkBits) -> Result<Vec<Move>> {
        let mut moves = Vec::new();
        let (mut stored, mut content) = (Vec::new(), Vec::new());
        for frame in 0..pack.frames().len() {
            let numbers = pack.chunks_of(frame);
            if !numbers.clone().any(|number| live.contains(number)) {
                continue;
            }
            let sealed = pack.read_stored(frame..frame + 1, &mut stored)?;
            content.resize(pack.content_length(frame), 0);
            pack.decode_and_compare(frame, sealed, &mut content, &mut self.decoder)?;
            let first_block = pack.blocks_of(frame).start;
            let mut kept = Vec::new();
            let mut kept_content = Vec::new();
            let mut target = self.next_location()?;
            for number in numbers.filter(|number| live.contains(*number)) {
                let (ordinal, chunk) = pack.chunk(number);
                let start = (ordinal - first_block) as usize * BLOCK_BYTES;
                let end = start + usize::from(chunk.blocks) * BLOCK_BYTES;
                kept_content.extend_from_slice(&content[start..end]);
                kept.push(chunk);
                push_move(&mut moves, (ordinal, u32::from(chunk.blocks), target));
                target.ordinal += u32::from(chunk.blocks);
            }
            self.append(&kept, &kept_content, &mut stored)?;
        }
        Ok(moves)
    }

    /// Where the next frame's first block will be.
    fn next_location(&mut self) -> Result<Location> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => self.writer.insert(PackWriter::create(self.context)?),
        };
        Ok(Location { pack: writer.id(), ordinal: writer.next_ordinal() })
    }

    fn append(
        &mut self,
        chunks: &[ChunkEntry],
        content: &[u8],
        stored: &mut Vec<u8>,
    ) -> Result<()> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let compression = self.encoder.encode(content, stored)?;
        writer.append(chunks, compression, stored)?;
        if writer.is_full(self.pack_size_bytes) {
            self.finish_pack()?;
        }
        Ok(())
    }

    fn finish_pack(&mut self) -> Result<()> {
        if let Some(writer) = self.writer.take() {
            let pack = writer.finish()?;
            self.rewritten_bytes += pack.stored_bytes;
        }
        Ok(())
    }

    /// Makes the last pack durable. Answers with the stored bytes of all.
    pub(super) fn finish(mut self) -> Result<u64> {
        self.finish_pack()?;
        Ok(self.rewritten_bytes)
    }
}
