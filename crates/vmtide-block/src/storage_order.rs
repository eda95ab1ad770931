//! Reading a whole device in the order in which its data is stored.
//!
//! A disk that was backed up a hundred times lies scattered over its repository: neighbours on the disk are in packs of
//! different days, and what is stored together belongs to places far apart. Read from its first byte to
//! its last, every piece would cost the decoding of everything it was stored with; read as it is
//! stored, everything is decoded once.

use crate::{CancelToken, Result};

/// Takes a piece of a disk and the offset it belongs to, from several threads at once.
pub type TakePiece<'a> = dyn Fn(&[u8], u64) -> Result<()> + Sync + 'a;

/// A device that can hand over all of its data at once, in an order of its own.
pub trait StorageOrder: Send + Sync {
    /// Calls `take` for every piece of data of the device, once, in no certain order, from up to
    /// `workers` threads. What [`extents`](crate::BlockDevice::extents) calls zero is not handed over. Pieces are
    /// at most [`MAX_PIECE_BYTES`] long, and begin on a page where the offset is a multiple of 4096.
    ///
    /// # Errors
    /// The first error of the device or of `take`, [`BlockError::Cancelled`](crate::BlockError::Cancelled).
    fn read_all(&self, workers: usize, cancel: &CancelToken, take: &TakePiece<'_>) -> Result<()>;
}

/// The longest piece, in bytes. Receivers have buffers of this length.
pub const MAX_PIECE_BYTES: usize = 4 << 20;
