//! Records: the head that all of them have, and the table of extents of a frame.

use super::{Fields, HEAD_BYTES, MAX_EXTENTS, ShortDigest};
use crate::{DeltaError, Result};
use vmtide_block::{Extent, ExtentKind};

const MAGIC: &[u8; 4] = b"VMTR";

/// The size of one entry of a frame's table, in bytes.
pub(crate) const EXTENT_BYTES: usize = 16;

/// The bits of an entry's second word that hold the length.
const LENGTH_MASK: u64 = (1 << 56) - 1;

const CHECKSUM_BYTES: usize = 8;

const HAS_BASE_DIGEST: u16 = 1;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// Extents with their data.
    Frame,
    /// The index; the last record.
    End,
}

/// How the data of a frame is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As it is.
    Plain,
    /// As one zstd frame.
    Zstd,
}

/// The head of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHead {
    /// What it is.
    pub kind: RecordKind,
    /// How its data is stored.
    pub encoding: Encoding,
    /// The number of extents; 0 in the end record.
    pub extent_count: u32,
    /// The size of what follows the table, in bytes: the stored data, or the index.
    pub stored_bytes: u32,
    /// The first byte of the disk that the frame speaks of.
    pub first: u64,
    /// The byte after the last one.
    pub end: u64,
    /// The size of the data before it was compressed, in bytes.
    pub data_bytes: u64,
    /// The digest of all that follows the head.
    pub body_digest: ShortDigest,
    /// The digest of what the base holds where this frame has data, where it is known.
    pub base_digest: Option<ShortDigest>,
}

impl RecordHead {
    /// The size of what follows the head, in bytes.
    pub fn body_bytes(&self) -> u64 {
        u64::from(self.extent_count) * EXTENT_BYTES as u64 + u64::from(self.stored_bytes)
    }

    /// The bytes of the head.
    pub fn to_bytes(self) -> [u8; HEAD_BYTES] {
        let mut out = Vec::with_capacity(HEAD_BYTES);
        out.extend_from_slice(MAGIC);
        out.push(match self.kind {
            RecordKind::Frame => 1,
            RecordKind::End => 2,
        });
        out.push(match self.encoding {
            Encoding::Plain => 0,
            Encoding::Zstd => 1,
        });
        let flags = if self.base_digest.is_some() { HAS_BASE_DIGEST } else { 0 };
        out.extend_from_slice(&flags.to_le_bytes());
        out.extend_from_slice(&self.extent_count.to_le_bytes());
        out.extend_from_slice(&self.stored_bytes.to_le_bytes());
        for value in [self.first, self.end, self.data_bytes] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(&self.body_digest);
        out.extend_from_slice(&self.base_digest.unwrap_or_default());
        out.resize(HEAD_BYTES - CHECKSUM_BYTES, 0);
        let checksum = checksum(&out);
        out.extend_from_slice(&checksum);
        let mut head = [0; HEAD_BYTES];
        head.copy_from_slice(&out);
        head
    }

    /// The head that `bytes` are. `at` is its position in the stream, for errors.
    ///
    /// # Errors
    /// [`DeltaError::Damaged`]; [`DeltaError::Unsupported`] for kinds, encodings and flags of later
    /// versions.
    pub fn from_bytes(bytes: &[u8; HEAD_BYTES], delta: &str, at: u64) -> Result<Self> {
        let damaged =
            |detail: &str| DeltaError::damaged(delta, format!("the record at byte {at} {detail}"));
        let mut fields = Fields(bytes);
        if fields.array::<4>() != *MAGIC {
            return Err(damaged("does not begin with VMTR"));
        }
        if checksum(&bytes[..HEAD_BYTES - CHECKSUM_BYTES]) != bytes[HEAD_BYTES - CHECKSUM_BYTES..] {
            return Err(damaged("has a head that does not match its checksum"));
        }
        let unknown = |what: &str, value: u16| {
            DeltaError::unsupported(
                delta,
                format!(
                    "the record at byte {at} has the {what} {value}, which this version does not know"
                ),
            )
        };
        let kind = match fields.u8() {
            1 => RecordKind::Frame,
            2 => RecordKind::End,
            other => return Err(unknown("kind", other.into())),
        };
        let encoding = match fields.u8() {
            0 => Encoding::Plain,
            1 => Encoding::Zstd,
            other => return Err(unknown("encoding", other.into())),
        };
        let flags = fields.u16();
        if flags & !HAS_BASE_DIGEST != 0 {
            return Err(unknown("flags", flags));
        }
        let mut head = Self {
            kind,
            encoding,
            extent_count: fields.u32(),
            stored_bytes: fields.u32(),
            first: fields.u64(),
            end: fields.u64(),
            data_bytes: fields.u64(),
            body_digest: fields.array(),
            base_digest: None,
        };
        let base_digest = fields.array();
        if flags & HAS_BASE_DIGEST != 0 {
            head.base_digest = Some(base_digest);
        }
        head.check().map_err(damaged)?;
        // One head, one form: what a later version puts into the zeros is not passed over.
        if head.to_bytes() != *bytes {
            return Err(damaged("has bytes that should be zero"));
        }
        Ok(head)
    }

    /// What must hold of a head by itself.
    fn check(&self) -> Result<(), &'static str> {
        match self.kind {
            RecordKind::End if self.extent_count != 0 || self.encoding != Encoding::Plain => {
                return Err("is an end with extents");
            }
            RecordKind::End => return Ok(()),
            RecordKind::Frame => {}
        }
        if self.extent_count == 0 || self.extent_count > MAX_EXTENTS {
            return Err("has no extents, or more than allowed");
        }
        if self.first >= self.end {
            return Err("ends before it begins");
        }
        let fits = match self.encoding {
            Encoding::Plain => u64::from(self.stored_bytes) == self.data_bytes,
            Encoding::Zstd => u64::from(self.stored_bytes) < self.data_bytes,
        };
        if fits { Ok(()) } else { Err("stores more bytes than it has") }
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut out = [0; CHECKSUM_BYTES];
    out.copy_from_slice(&blake3::hash(bytes).as_bytes()[..CHECKSUM_BYTES]);
    out
}

/// Appends the table of `extents`.
pub(crate) fn encode_extents(extents: &[Extent], out: &mut Vec<u8>) {
    for extent in extents {
        let kind: u64 = match extent.kind {
            ExtentKind::Data => 1,
            ExtentKind::Zero => 2,
            ExtentKind::Unallocated => 3,
        };
        out.extend_from_slice(&extent.range.offset.to_le_bytes());
        out.extend_from_slice(&(kind << 56 | extent.range.length & LENGTH_MASK).to_le_bytes());
    }
}

/// The extents of a frame's table, which is in ascending order, without overlaps, within the bounds
/// of its head, and whose data is as long as the head says.
pub(crate) fn decode_extents(table: &[u8], head: &RecordHead) -> Result<Vec<Extent>, String> {
    let mut extents = Vec::with_capacity(table.len() / EXTENT_BYTES);
    let (mut at, mut data_bytes) = (head.first, 0u64);
    for entry in table.chunks_exact(EXTENT_BYTES) {
        let mut fields = Fields(entry);
        let (offset, packed) = (fields.u64(), fields.u64());
        let kind = match packed >> 56 {
            1 => ExtentKind::Data,
            2 => ExtentKind::Zero,
            3 => ExtentKind::Unallocated,
            other => return Err(format!("an extent of the unknown kind {other}")),
        };
        let length = packed & LENGTH_MASK;
        let is_first = extents.is_empty();
        if offset < at || is_first && offset != head.first || length == 0 {
            return Err(format!("an extent at byte {offset} that is empty or out of order"));
        }
        at = offset.checked_add(length).filter(|end| *end <= head.end).ok_or_else(|| {
            format!("an extent at byte {offset} that reaches past the end of the frame")
        })?;
        if kind == ExtentKind::Data {
            data_bytes = data_bytes.saturating_add(length);
        }
        extents.push(Extent::new(offset, length, kind));
    }
    if at != head.end || data_bytes != head.data_bytes {
        return Err("extents that are not what its head says".into());
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> RecordHead {
        RecordHead {
            kind: RecordKind::Frame,
            encoding: Encoding::Zstd,
            extent_count: 2,
            stored_bytes: 77,
            first: 4096,
            end: 20480,
            data_bytes: 4096,
            body_digest: [1; 16],
            base_digest: Some([2; 16]),
        }
    }

    #[test]
    fn a_head_comes_back_as_it_was_and_every_changed_bit_is_found() {
        let bytes = head().to_bytes();
        assert_eq!(RecordHead::from_bytes(&bytes, "x", 0).unwrap(), head());
        for at in 0..bytes.len() * 8 {
            let mut altered = bytes;
            altered[at / 8] ^= 1 << (at % 8);
            RecordHead::from_bytes(&altered, "x", 0).unwrap_err();
        }
    }

    #[test]
    fn tables_that_are_not_what_the_head_says_are_refused() {
        let table = |extents: &[Extent]| {
            let mut out = Vec::new();
            encode_extents(extents, &mut out);
            decode_extents(&out, &head())
        };
        let data = Extent::new(4096, 4096, ExtentKind::Data);
        let good = [data, Extent::new(12288, 8192, ExtentKind::Unallocated)];
        assert_eq!(table(&good).unwrap(), good);
        for bad in [
            vec![data],
            vec![good[1], data],
            vec![data, Extent::new(12288, 8193, ExtentKind::Zero)],
            vec![data, Extent::new(12288, 8192, ExtentKind::Data)],
            vec![data, Extent::new(8191, 12289, ExtentKind::Zero)],
            vec![Extent::new(8192, 4096, ExtentKind::Data), good[1]],
            vec![data, Extent::new(9000, 0, ExtentKind::Zero), good[1]],
            vec![data, Extent::new(u64::MAX, 8192, ExtentKind::Zero)],
        ] {
            table(&bad).unwrap_err();
        }
    }
}
