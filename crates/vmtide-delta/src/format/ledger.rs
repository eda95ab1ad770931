//! What writer and readers keep while a delta goes by: the sums, the index, the digest of the whole,
//! and that frames follow each other. One piece of code on both sides, so that a reader checks a
//! trailer by making it.

use super::trailer::DeltaTotals;
use super::{
    HEAD_BYTES, INDEX_ENTRY_BYTES, MAX_INDEX_ENTRIES, RecordHead, RecordKind, Trailer, short_digest,
};
use vmtide_block::Extent;

/// The state of a delta up to some record.
pub(crate) struct Ledger {
    hasher: blake3::Hasher,
    totals: DeltaTotals,
    /// The first byte and the position of every `stride`th frame.
    index: Vec<(u64, u64)>,
    stride: u32,
    /// The number of frames that heads were seen of.
    frames: u64,
    /// The byte of the disk where the last frame ended.
    end: u64,
    size_bytes: u64,
    max_frame_bytes: u32,
    position: u64,
}

impl Ledger {
    /// After the header, which is `header_bytes`.
    pub fn new(header: &super::DeltaHeader, header_bytes: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(header_bytes);
        Self {
            hasher,
            totals: DeltaTotals::default(),
            index: Vec::new(),
            stride: 1,
            frames: 0,
            end: 0,
            size_bytes: header.size_bytes,
            max_frame_bytes: header.max_frame_bytes,
            position: header_bytes.len() as u64,
        }
    }

    /// Where the next record begins in the stream.
    pub const fn position(&self) -> u64 {
        self.position
    }

    /// Takes the head of the next record.
    pub fn add_head(&mut self, head: &RecordHead, bytes: &[u8; HEAD_BYTES]) -> Result<(), String> {
        if head.kind == RecordKind::Frame {
            if head.first < self.end || head.end > self.size_bytes {
                return Err(format!(
                    "bytes {} to {} of the disk, which is out of order or past its end",
                    head.first, head.end
                ));
            }
            if head.data_bytes > u64::from(self.max_frame_bytes) {
                return Err(format!("{} bytes of data, more than announced", head.data_bytes));
            }
            self.end = head.end;
            if self.frames.is_multiple_of(self.stride.into()) {
                self.add_to_index(head.first);
            }
            self.frames += 1;
        }
        self.hasher.update(bytes);
        self.position =
            self.position.saturating_add(HEAD_BYTES as u64).saturating_add(head.body_bytes());
        Ok(())
    }

    fn add_to_index(&mut self, first: u64) {
        if self.index.len() == MAX_INDEX_ENTRIES {
            let mut keep = false;
            self.index.retain(|_| {
                keep = !keep;
                keep
            });
            self.stride = self.stride.saturating_mul(2);
        }
        self.index.push((first, self.position));
    }

    /// Takes the extents of a frame, in any order of frames.
    pub fn add_extents(&mut self, extents: &[Extent], stored_bytes: u32) {
        self.totals.add(extents, stored_bytes);
    }

    /// Takes the sums of all frames at once, where another thread made them.
    pub fn set_totals(&mut self, totals: DeltaTotals) {
        self.totals = totals;
    }

    /// The index as it is stored.
    pub fn index_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.index.len() * INDEX_ENTRY_BYTES);
        for (first, position) in &self.index {
            out.extend_from_slice(&first.to_le_bytes());
            out.extend_from_slice(&position.to_le_bytes());
        }
        out
    }

    /// The head of the end record.
    pub fn end_head(&self, index: &[u8]) -> RecordHead {
        RecordHead {
            kind: RecordKind::End,
            encoding: super::Encoding::Plain,
            extent_count: 0,
            stored_bytes: u32::try_from(index.len()).unwrap_or(u32::MAX),
            first: 0,
            end: 0,
            data_bytes: 0,
            body_digest: short_digest(&[index]),
            base_digest: None,
        }
    }

    /// The trailer, once the end record, at `end_position`, was added.
    pub fn trailer(&self, end_position: u64) -> Trailer {
        let mut trailer = Trailer {
            totals: self.totals,
            end_position,
            index_stride: self.stride,
            index_entries: u32::try_from(self.index.len()).unwrap_or(u32::MAX),
            digest: [0; 32],
        };
        let mut hasher = self.hasher.clone();
        hasher.update(&trailer.digested_bytes());
        trailer.digest = *hasher.finalize().as_bytes();
        trailer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DeltaHeader;
    use crate::format::Encoding;

    #[test]
    fn the_index_stays_small_and_names_every_stride_th_frame() {
        let header = DeltaHeader::new(1 << 40, 1 << 40);
        let mut ledger = Ledger::new(&header, &[0; 104]);
        let count = MAX_INDEX_ENTRIES as u64 * 2 + 1;
        for frame in 0..count {
            let head = RecordHead {
                kind: RecordKind::Frame,
                encoding: Encoding::Plain,
                extent_count: 1,
                stored_bytes: 0,
                first: frame * 1024,
                end: frame * 1024 + 512,
                data_bytes: 0,
                body_digest: [0; 16],
                base_digest: None,
            };
            ledger.add_head(&head, &[0; HEAD_BYTES]).unwrap();
        }
        assert_eq!(ledger.stride, 4);
        for (entry, (first, position)) in ledger.index.iter().enumerate() {
            let frame = entry as u64 * 4;
            assert_eq!((*first, *position), (frame * 1024, 104 + frame * (96 + 16)));
        }
        assert_eq!(ledger.index.len() as u64, count.div_ceil(4));
    }
}
