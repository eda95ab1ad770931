//! What a disk is on Bacula's volumes.
//!
//! Bacula keeps blocks of a file with their offsets. A disk's data are blocks at their own offsets; what is
//! to be said about the disk are blocks from [`CONTROL_OFFSET`] on, where no disk reaches: a header, ranges
//! that became zero (a delta has to tell them, and without their bytes), and a trailer with the count and
//! the checksum of everything, so that a stream that lost its end, or a block, is not taken for a disk.
//! `docs/bacula-protocol.md` has the layout.

use crate::{BackendError, Result};
use serde::{Deserialize, Serialize};
use vmtide_block::ByteRange;
use xxhash_rust::xxh3::Xxh3;

/// Where records that are not disk content begin.
pub const CONTROL_OFFSET: u64 = 1 << 62;

/// The distance between two records: the most bytes of one, and the size of the daemon's blocks.
pub const BLOCK_BYTES: usize = 64 << 10;

/// The version of this layout.
const FORMAT: u32 = 1;

/// What every record begins with.
const MAGIC: &[u8; 7] = b"vmtide\0";

/// Magic, kind and length.
const RECORD_HEAD_BYTES: usize = 12;

/// Zero ranges in one record.
const ZEROS_IN_RECORD: usize = (BLOCK_BYTES - RECORD_HEAD_BYTES) / 16;

/// The most ranges that a delta may make zero; more come as data.
const MAX_RECORDS: u64 = 1 << 40;

/// Names the moment that a disk is of: 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MomentId(pub u64, pub u64);

impl MomentId {
    /// A new one, unique by chance.
    pub fn random() -> Self {
        let half = || {
            let digits = vmtide_hypervisor::JobId::random();
            // Zero means that there is none.
            u64::from_str_radix(digits.as_str(), 16).unwrap_or(1).max(1)
        };
        Self(half(), half())
    }

    /// Reads 32 digits; none where they are something else, or all are zero.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let (first, second) = text.split_at(16);
        let id = Self(u64::from_str_radix(first, 16).ok()?, u64::from_str_radix(second, 16).ok()?);
        (id.0 != 0).then_some(id)
    }
}

impl std::fmt::Display for MomentId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}{:016x}", self.0, self.1)
    }
}

/// The first record: what follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamHeader {
    /// The version of the layout.
    pub format: u32,
    /// The size of the disk in bytes.
    pub size_bytes: u64,
    /// The moment it is of.
    pub moment: String,
    /// The moment that it builds on; none for a whole disk.
    #[serde(default)]
    pub base: Option<String>,
}

/// The last record: what there was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamTrailer {
    /// Bytes of data.
    pub data_bytes: u64,
    /// Bytes that became zero.
    pub zero_bytes: u64,
    /// XXH3 (64 bits) of all data runs, each as its offset (8 bytes, little-endian) and its bytes; a run
    /// ends where the next data do not continue it. 16 hexadecimal digits.
    pub xxh3: String,
}

/// Counts and checks what is sent or received: the same on both sides.
#[derive(Default)]
pub struct Tally {
    hash: Xxh3,
    data_bytes: u64,
    zero_bytes: u64,
    next: Option<u64>,
}

impl Tally {
    /// Takes account of data.
    pub fn data(&mut self, offset: u64, bytes: &[u8]) {
        if self.next != Some(offset) {
            self.hash.update(&offset.to_le_bytes());
        }
        self.hash.update(bytes);
        self.data_bytes += bytes.len() as u64;
        self.next = Some(offset + bytes.len() as u64);
    }

    /// Takes account of a range that became zero.
    pub fn zero(&mut self, range: ByteRange) {
        self.zero_bytes += range.length;
    }

    /// Bytes of data so far.
    pub const fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// The trailer that this makes.
    pub fn trailer(&self) -> StreamTrailer {
        StreamTrailer {
            data_bytes: self.data_bytes,
            zero_bytes: self.zero_bytes,
            xxh3: format!("{:016x}", self.hash.digest()),
        }
    }
}

/// A record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The beginning.
    Header(StreamHeader),
    /// Ranges that became zero.
    Zeros(Vec<ByteRange>),
    /// The end.
    Trailer(StreamTrailer),
}

impl Record {
    /// The header of a whole disk, or of a delta from `base`.
    pub fn header(size_bytes: u64, moment: MomentId, base: Option<MomentId>) -> Self {
        Self::Header(StreamHeader {
            format: FORMAT,
            size_bytes,
            moment: moment.to_string(),
            base: base.map(|base| base.to_string()),
        })
    }

    /// As it is written: one block.
    ///
    /// # Errors
    /// Never for what this crate makes.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let json = |value: serde_json::Result<Vec<u8>>| {
            value.map_err(|error| BackendError::Refused(format!("write a record: {error}")))
        };
        let (kind, payload) = match self {
            Self::Header(header) => (b'H', json(serde_json::to_vec(header))?),
            Self::Trailer(trailer) => (b'T', json(serde_json::to_vec(trailer))?),
            Self::Zeros(ranges) => {
                let mut payload = Vec::with_capacity(ranges.len() * 16);
                for range in ranges {
                    payload.extend_from_slice(&range.offset.to_le_bytes());
                    payload.extend_from_slice(&range.length.to_le_bytes());
                }
                (b'Z', payload)
            }
        };
        let mut bytes = MAGIC.to_vec();
        bytes.push(kind);
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&payload);
        Ok(bytes)
    }

    /// Reads a record; `None` while bytes of it are missing.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, String> {
        let Some(head) = bytes.get(..RECORD_HEAD_BYTES) else { return Ok(None) };
        if head.get(..7) != Some(MAGIC.as_slice()) {
            return Err("a record does not begin as one of vmtide's".into());
        }
        let kind = head.get(7).copied().unwrap_or(0);
        let length: [u8; 4] =
            head.get(8..).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default();
        let length = u32::from_le_bytes(length) as usize;
        if length > BLOCK_BYTES {
            return Err(format!("a record of {length} bytes"));
        }
        let Some(payload) = bytes.get(RECORD_HEAD_BYTES..RECORD_HEAD_BYTES + length) else {
            return Ok(None);
        };
        if bytes.len() > RECORD_HEAD_BYTES + length {
            return Err("a record with bytes after it".into());
        }
        let wrong = |error: serde_json::Error| format!("a record that cannot be read: {error}");
        match kind {
            b'H' => {
                let header: StreamHeader = serde_json::from_slice(payload).map_err(wrong)?;
                if header.format != FORMAT {
                    return Err(format!(
                        "format {} of the disk's stream is newer than this vmtide",
                        header.format
                    ));
                }
                Ok(Some(Self::Header(header)))
            }
            b'T' => Ok(Some(Self::Trailer(serde_json::from_slice(payload).map_err(wrong)?))),
            b'Z' => Ok(Some(Self::Zeros(parse_zeros(payload)?))),
            other => Err(format!("a record of the unknown kind {other}")),
        }
    }
}

fn parse_zeros(payload: &[u8]) -> Result<Vec<ByteRange>, String> {
    let (pairs, rest) = payload.as_chunks::<16>();
    if !rest.is_empty() {
        return Err("a record of zeros with a broken range".into());
    }
    pairs
        .iter()
        .map(|pair| {
            let number =
                |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX);
            let (offset, length) = pair.split_at(8);
            let range = ByteRange::new(number(offset), number(length));
            match range.checked_end() {
                Some(end) if end <= CONTROL_OFFSET => Ok(range),
                _ => Err(format!("a record that makes {range} zero")),
            }
        })
        .collect()
}

/// Gathers records with their offsets, zeros as many in one record as fit.
#[derive(Default)]
pub struct Records {
    zeros: Vec<ByteRange>,
    count: u64,
}

impl Records {
    /// The block of a record, with its offset.
    ///
    /// # Errors
    /// Where there are more records than offsets for them.
    pub fn block(&mut self, record: &Record) -> Result<(u64, Vec<u8>)> {
        if self.count >= MAX_RECORDS {
            return Err(BackendError::Refused("the disk is too scattered for one stream".into()));
        }
        let offset = CONTROL_OFFSET + self.count * BLOCK_BYTES as u64;
        self.count += 1;
        Ok((offset, record.bytes()?))
    }

    /// Adds a range that became zero; answers with a record when one is full.
    pub fn add_zero(&mut self, range: ByteRange) -> Option<Record> {
        match self.zeros.last_mut() {
            Some(last) if last.end() == range.offset => last.length += range.length,
            _ => self.zeros.push(range),
        }
        // The last one may still grow.
        (self.zeros.len() > ZEROS_IN_RECORD).then(|| {
            let last = self.zeros.pop();
            let full = std::mem::replace(&mut self.zeros, last.into_iter().collect());
            Record::Zeros(full)
        })
    }

    /// What is left of the zeros.
    pub fn last_zeros(&mut self) -> Option<Record> {
        let zeros = std::mem::take(&mut self.zeros);
        (!zeros.is_empty()).then_some(Record::Zeros(zeros))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_as_they_were_and_never_by_half() {
        let records = [
            Record::header(1 << 40, MomentId::random(), Some(MomentId::random())),
            Record::Zeros(vec![ByteRange::new(0, 5), ByteRange::new(1 << 61, 1)]),
            Record::Trailer(Tally::default().trailer()),
        ];
        for record in records {
            let bytes = record.bytes().unwrap();
            assert_eq!(Record::parse(&bytes), Ok(Some(record)));
            for end in 0..bytes.len() {
                assert_eq!(Record::parse(&bytes[..end]), Ok(None));
            }
            let mut longer = bytes.clone();
            longer.push(0);
            Record::parse(&longer).unwrap_err();
            for at in 0..RECORD_HEAD_BYTES {
                let mut broken = bytes.clone();
                broken[at] ^= 0xff;
                assert_ne!(Record::parse(&broken), Record::parse(&bytes));
            }
        }
    }

    #[test]
    fn the_checksum_does_not_depend_on_how_the_stream_is_cut() {
        let sum = |pieces: &[(u64, &[u8])]| {
            let mut tally = Tally::default();
            for (offset, bytes) in pieces {
                tally.data(*offset, bytes);
            }
            tally.trailer()
        };
        let whole = sum(&[(0, b"abcdef"), (10, b"xy")]);
        assert_eq!(whole, sum(&[(0, b"ab"), (2, b"cdef"), (10, b"x"), (11, b"y")]));
        assert_ne!(whole, sum(&[(0, b"abcdef"), (11, b"xy")]));
        assert_ne!(whole, sum(&[(0, b"abcdef")]));
    }

    #[test]
    fn zeros_are_gathered() {
        let mut records = Records::default();
        let mut all = Vec::new();
        for at in 0..2 * ZEROS_IN_RECORD as u64 {
            if let Some(Record::Zeros(zeros)) = records.add_zero(ByteRange::new(at * 10, 5)) {
                assert_eq!(zeros.len(), ZEROS_IN_RECORD);
                assert!(Record::Zeros(zeros.clone()).bytes().unwrap().len() <= BLOCK_BYTES);
                all.extend(zeros);
            }
        }
        if let Some(Record::Zeros(zeros)) = records.last_zeros() {
            all.extend(zeros);
        }
        assert_eq!(all.len(), 2 * ZEROS_IN_RECORD);
        assert!(records.add_zero(ByteRange::new(0, 4)).is_none());
        assert!(records.add_zero(ByteRange::new(4, 4)).is_none());
        assert_eq!(records.last_zeros(), Some(Record::Zeros(vec![ByteRange::new(0, 8)])));
    }
}
