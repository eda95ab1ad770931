//! The format, as `docs/delta-format.md` has it: one file per structure. Nothing here reads or writes
//! a stream; bytes come in, checked values go out.

mod frame;
mod header;
mod ledger;
mod trailer;

pub(crate) use frame::{EXTENT_BYTES, decode_extents, encode_extents};
pub use frame::{Encoding, RecordHead, RecordKind};
pub use header::DeltaHeader;
pub(crate) use header::PRELUDE_BYTES;
pub(crate) use ledger::Ledger;
pub use trailer::DeltaTotals;
pub(crate) use trailer::Trailer;

/// The size of the head of every record, in bytes.
pub const HEAD_BYTES: usize = 96;

/// The size of the trailer, in bytes.
pub const TRAILER_BYTES: usize = 128;

/// The largest header, in bytes: four strings of 4 KiB and room to grow. A reader allocates it whole.
pub const MAX_HEADER_BYTES: usize = 64 << 10;

/// The longest string in a header, in bytes.
pub const MAX_STRING_BYTES: usize = 4096;

/// The most data in one frame, in bytes. A reader holds one frame per worker, so this times the
/// workers is its memory.
pub const MAX_FRAME_BYTES: u32 = 8 << 20;

/// The most extents in one frame: as many as a frame of [`MAX_FRAME_BYTES`] can have in alternating
/// sectors of 512 bytes, doubled. A table of them takes 1 MiB.
pub const MAX_EXTENTS: u32 = 1 << 16;

/// The largest disk, in bytes: lengths of extents have 56 bits.
pub const MAX_DISK_BYTES: u64 = (1 << 56) - 1;

/// The most entries in the index. A writer that has more leaves out every second and says so in the
/// stride, so that neither writer nor reader needs memory that grows with the disk.
pub const MAX_INDEX_ENTRIES: usize = 1 << 16;

/// The size of one entry of the index, in bytes.
pub const INDEX_ENTRY_BYTES: usize = 16;

/// The first 16 bytes of a BLAKE3 digest: what binds bodies to their heads.
pub(crate) type ShortDigest = [u8; 16];

pub(crate) fn short_digest(parts: &[&[u8]]) -> ShortDigest {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    shorten(&hasher.finalize())
}

pub(crate) fn shorten(digest: &blake3::Hash) -> ShortDigest {
    let mut short = [0; 16];
    short.copy_from_slice(&digest.as_bytes()[..16]);
    short
}

/// Reads the fields of a fixed structure one after the other. The caller gives all bytes there are;
/// past their end there are zeros, which every structure's own checks refuse.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let length = N.min(self.0.len());
        let (taken, rest) = self.0.split_at(length);
        out[..length].copy_from_slice(taken);
        self.0 = rest;
        out
    }
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}
