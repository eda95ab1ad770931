//! The directory of a pack: where its frames lie, and which chunks they hold.

use super::{MAX_CHUNK_BLOCKS, MAX_FRAME_BYTES, MAX_FRAME_CHUNKS};
use crate::context::{OpenObject, StoredSection};
use crate::crypto::TAG_BYTES;
use crate::envelope::HEADER_BYTES;
use crate::{BLOCK_BYTES, ChunkId, RepoError, Result};

/// The length of one entry of the frame table.
pub(super) const FRAME_ENTRY_BYTES: usize = 32;

/// The length of one entry of the chunk table.
pub(super) const CHUNK_ENTRY_BYTES: usize = 34;

/// How a frame's chunks are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    /// As they are: compression would not have made them smaller.
    None,
    /// One zstd frame.
    Zstd,
}

impl Compression {
    const fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Zstd => 1,
        }
    }
}

/// One frame of a pack, as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameEntry {
    /// Where it begins in the object.
    pub offset: u64,
    /// Its stored length in bytes, tag included.
    pub stored_length: u32,
    /// The chunks in it.
    pub chunks: u16,
    /// How they are stored.
    pub compression: Compression,
    /// The checksum of the stored bytes.
    pub checksum: [u8; 16],
}

impl FrameEntry {
    /// What sealing binds beside header and number.
    pub(super) fn associated(chunks: u16, compression: Compression) -> [u8; 4] {
        let count = chunks.to_le_bytes();
        [count[0], count[1], compression.code(), 0]
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&self.stored_length.to_le_bytes());
        out.extend_from_slice(&Self::associated(self.chunks, self.compression));
        out.extend_from_slice(&self.checksum);
    }

    fn decode(entry: &[u8]) -> Option<Self> {
        let u16_at = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let compression = match (entry[14], entry[15]) {
            (0, 0) => Compression::None,
            (1, 0) => Compression::Zstd,
            _ => return None,
        };
        let mut checksum = [0; 16];
        checksum.copy_from_slice(&entry[16..32]);
        Some(Self {
            offset: u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32,
            stored_length: u32_at(8),
            chunks: u16_at(12),
            compression,
            checksum,
        })
    }
}

/// One chunk of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkEntry {
    /// The name of its content.
    pub id: ChunkId,
    /// Its length in blocks.
    pub blocks: u16,
}

impl ChunkEntry {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.0);
        out.extend_from_slice(&self.blocks.to_le_bytes());
    }

    fn decode(entry: &[u8]) -> Self {
        let mut id = ChunkId([0; 32]);
        id.0.copy_from_slice(&entry[..32]);
        Self { id, blocks: u16::from_le_bytes([entry[32], entry[33]]) }
    }
}

/// The directory of a pack, opened. The sums over lengths are worked out once, so that places are
/// found by binary search.
#[derive(Debug, Default)]
pub(super) struct PackDirectory {
    /// The frames in order.
    pub frames: Vec<FrameEntry>,
    /// The number of each frame's first chunk, and the number of all chunks.
    pub first_chunks: Vec<u32>,
    /// The ordinal of each frame's first block, and the number of all blocks.
    pub frame_blocks: Vec<u32>,
    /// All chunks in order.
    pub chunks: Vec<ChunkEntry>,
    /// The ordinal of each chunk's first block.
    pub chunk_blocks: Vec<u32>,
}

impl PackDirectory {
    /// Reads the two tables, the second one opened. The directory's hash is unkeyed, so anybody
    /// could have made it: everything is checked.
    pub(super) fn decode(
        object: &str,
        frame_table: &[u8],
        chunk_table: &[u8],
        directory_offset: u64,
    ) -> Result<Self> {
        let chunks = chunk_table.chunks_exact(CHUNK_ENTRY_BYTES).map(ChunkEntry::decode).collect();
        let mut directory = Self { chunks, ..Self::default() };
        directory.place_chunks(object)?;
        let mut end_of_last = HEADER_BYTES as u64;
        for (number, entry) in frame_table.chunks_exact(FRAME_ENTRY_BYTES).enumerate() {
            let damaged = |what: &str, value: u64| {
                let detail = format!("frame {number}: {what} {value} is not possible");
                RepoError::damaged(object, detail)
            };
            let frame = FrameEntry::decode(entry)
                .ok_or_else(|| damaged("compression", u64::from(entry[14])))?;
            let content_bytes = directory
                .add_frame(frame)
                .ok_or_else(|| damaged("chunk count", u64::from(frame.chunks)))?;
            if frame.stored_length as usize > content_bytes + TAG_BYTES {
                return Err(damaged("stored length", u64::from(frame.stored_length)));
            }
            match frame.offset.checked_add(u64::from(frame.stored_length)) {
                Some(end) if frame.offset == end_of_last && end <= directory_offset => {
                    end_of_last = end;
                }
                _ => return Err(damaged("offset", frame.offset)),
            }
        }
        if directory.first_chunks.last().copied().unwrap_or(0) as usize != directory.chunks.len() {
            let detail = format!("its frames do not hold its {} chunks", directory.chunks.len());
            return Err(RepoError::damaged(object, detail));
        }
        Ok(directory)
    }

    /// Works out the ordinals of the chunks.
    fn place_chunks(&mut self, object: &str) -> Result<()> {
        self.chunk_blocks.reserve(self.chunks.len());
        let mut next = 0u32;
        for (number, chunk) in self.chunks.iter().enumerate() {
            self.chunk_blocks.push(next);
            next = match next.checked_add(u32::from(chunk.blocks)) {
                Some(next) if (1..=MAX_CHUNK_BLOCKS).contains(&chunk.blocks) => next,
                _ => {
                    let detail =
                        format!("chunk {number}: length {} blocks is not possible", chunk.blocks);
                    return Err(RepoError::damaged(object, detail));
                }
            };
        }
        self.frame_blocks = vec![0];
        self.first_chunks = vec![0];
        Ok(())
    }

    /// Adds a frame; answers with the length of its content, or `None` where it has not so many
    /// chunks or more than fit.
    fn add_frame(&mut self, frame: FrameEntry) -> Option<usize> {
        let first = self.first_chunks.last().copied()?;
        let count = usize::from(frame.chunks);
        let chunks = self.chunks.get(first as usize..first as usize + count)?;
        let blocks: usize = chunks.iter().map(|chunk| usize::from(chunk.blocks)).sum();
        let fits =
            (1..=MAX_FRAME_CHUNKS).contains(&count) && blocks * BLOCK_BYTES <= MAX_FRAME_BYTES;
        if !fits {
            return None;
        }
        let next_block = self.frame_blocks.last()? + u32::try_from(blocks).ok()?;
        self.frames.push(frame);
        self.first_chunks.push(first + u32::from(frame.chunks));
        self.frame_blocks.push(next_block);
        Some(blocks * BLOCK_BYTES)
    }
}

/// Where the frames of a pack lie, without its key. The order is checked by whoever reads them.
///
/// # Errors
/// [`RepoError::Damaged`].
pub(crate) fn stored_frames(object: &OpenObject) -> Result<Vec<StoredSection>> {
    let frames = object.trailer.first_count as usize;
    let table = frames.checked_mul(FRAME_ENTRY_BYTES).and_then(|end| object.directory.get(..end));
    let table = table.ok_or_else(|| object.damaged("its frame table is cut"))?;
    let frame = |entry: &[u8]| {
        FrameEntry::decode(entry).map(|frame| StoredSection {
            offset: frame.offset,
            stored_bytes: u64::from(frame.stored_length),
            checksum: frame.checksum,
        })
    };
    let sections = table.chunks_exact(FRAME_ENTRY_BYTES).map(frame).collect::<Option<_>>();
    sections.ok_or_else(|| object.damaged("its frame table is impossible"))
}
