//! The trailer: the sums, where the index is, and the digest of the whole.

use super::{Fields, TRAILER_BYTES};
use crate::{DeltaError, Result};
use serde::Serialize;
use vmtide_block::{Extent, ExtentKind};

const MAGIC: &[u8; 8] = b"VMTDTAIL";

/// Where the digest begins; what stands before it is under it.
pub(crate) const DIGESTED_BYTES: usize = 96;

/// How much a delta holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeltaTotals {
    /// The number of frames.
    pub frames: u64,
    /// The number of extents.
    pub extents: u64,
    /// The bytes of disk with data.
    pub data_bytes: u64,
    /// The bytes of disk that are zero now.
    pub zero_bytes: u64,
    /// The bytes of disk that are not allocated any more, and read as zeros.
    pub unallocated_bytes: u64,
    /// The bytes that the data takes in the stream.
    pub stored_bytes: u64,
}

impl DeltaTotals {
    /// The bytes of disk that the delta speaks of.
    pub const fn changed_bytes(&self) -> u64 {
        self.data_bytes.saturating_add(self.zero_bytes).saturating_add(self.unallocated_bytes)
    }

    pub(crate) fn add(&mut self, extents: &[Extent], stored_bytes: u32) {
        self.frames = self.frames.saturating_add(1);
        self.extents = self.extents.saturating_add(extents.len() as u64);
        self.stored_bytes = self.stored_bytes.saturating_add(stored_bytes.into());
        for extent in extents {
            let sum = match extent.kind {
                ExtentKind::Data => &mut self.data_bytes,
                ExtentKind::Zero => &mut self.zero_bytes,
                ExtentKind::Unallocated => &mut self.unallocated_bytes,
            };
            *sum = sum.saturating_add(extent.range.length);
        }
    }
}

/// The trailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub totals: DeltaTotals,
    /// Where the end record is in the stream.
    pub end_position: u64,
    /// Every so many frames have an entry in the index.
    pub index_stride: u32,
    /// The number of entries in the index.
    pub index_entries: u32,
    /// The digest of the whole.
    pub digest: [u8; 32],
}

impl Trailer {
    /// The part of the trailer that is under the digest.
    pub fn digested_bytes(&self) -> [u8; DIGESTED_BYTES] {
        let mut out = Vec::with_capacity(DIGESTED_BYTES);
        out.extend_from_slice(MAGIC);
        let totals = &self.totals;
        for value in [
            totals.frames,
            totals.extents,
            totals.data_bytes,
            totals.zero_bytes,
            totals.unallocated_bytes,
            totals.stored_bytes,
            self.end_position,
        ] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(&self.index_stride.to_le_bytes());
        out.extend_from_slice(&self.index_entries.to_le_bytes());
        let mut bytes = [0; DIGESTED_BYTES];
        bytes[..out.len()].copy_from_slice(&out);
        bytes
    }

    pub fn to_bytes(self) -> [u8; TRAILER_BYTES] {
        let mut bytes = [0; TRAILER_BYTES];
        bytes[..DIGESTED_BYTES].copy_from_slice(&self.digested_bytes());
        bytes[DIGESTED_BYTES..].copy_from_slice(&self.digest);
        bytes
    }

    pub fn from_bytes(bytes: &[u8; TRAILER_BYTES], delta: &str) -> Result<Self> {
        let mut fields = Fields(bytes);
        if fields.array::<8>() != *MAGIC {
            return Err(DeltaError::damaged(
                delta,
                "is torn: it does not end with a trailer (VMTDTAIL)",
            ));
        }
        let totals = DeltaTotals {
            frames: fields.u64(),
            extents: fields.u64(),
            data_bytes: fields.u64(),
            zero_bytes: fields.u64(),
            unallocated_bytes: fields.u64(),
            stored_bytes: fields.u64(),
        };
        let (end_position, index_stride, index_entries) =
            (fields.u64(), fields.u32(), fields.u32());
        let mut digest = [0; 32];
        digest.copy_from_slice(&bytes[DIGESTED_BYTES..]);
        let trailer = Self { totals, end_position, index_stride, index_entries, digest };
        if trailer.digested_bytes() != bytes[..DIGESTED_BYTES] {
            return Err(DeltaError::damaged(delta, "its trailer has bytes that should be zero"));
        }
        Ok(trailer)
    }
}
