//! Packs: the objects that hold chunks (format §6).
//!
//! A writer fills one pack at a time and knows nothing of others; a reader opens a pack by reading
//! its directory and then takes frames by position. Frames are the unit of compression, of sealing
//! and of reading; chunks are the unit of names, blocks that of places.

mod directory;
mod frame;
mod part;
mod reader;
mod writer;

pub(crate) use directory::{ChunkEntry, Compression, FrameEntry, stored_frames};
pub(crate) use frame::{FrameDecoder, FrameEncoder};
pub(crate) use reader::{Pack, is_media_error};
pub(crate) use writer::{FinishedPack, PackWriter};

/// The most bytes of chunks in one frame (format §6). A reader allocates no more than this for a
/// frame, whatever the directory says.
pub(crate) const MAX_FRAME_BYTES: usize = 4 << 20;

/// The most chunks in one frame (format §6).
pub(crate) const MAX_FRAME_CHUNKS: usize = 4096;

/// The most blocks in one chunk (format §6): a chunk is never longer than a frame may be.
pub(crate) const MAX_CHUNK_BLOCKS: u16 = 1024;
