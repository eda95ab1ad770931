//! The header: which disk, from which moment to which.

use super::{
    Fields, MAX_DISK_BYTES, MAX_FRAME_BYTES, MAX_HEADER_BYTES, MAX_STRING_BYTES, short_digest,
};
use crate::{DeltaError, Result};
use serde::Serialize;

const MAGIC: &[u8; 8] = b"VMTDELTA";

/// The version written, and the highest read.
const VERSION: u16 = 1;

/// The part before the strings, in bytes.
const FIXED_BYTES: usize = 88;

/// The part that says how long the header is, in bytes: what a reader of a stream takes first.
pub(crate) const PRELUDE_BYTES: usize = 16;

const DIGEST_BYTES: usize = 16;

const HAS_FINGERPRINT: u32 = 1;

/// The smallest frame, in bytes.
const MIN_FRAME_BYTES: u32 = 4096;

/// What a delta says of itself before its data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeltaHeader {
    /// The size of the disk that the delta is applied to, in bytes.
    pub base_size_bytes: u64,
    /// The size of the disk afterwards, in bytes.
    pub size_bytes: u64,
    /// The disk's logical sector, in bytes: a power of two from 512 to 65536.
    pub sector_size_bytes: u32,
    /// The unit in which changes were looked for, in bytes: a power of two from 512. For information:
    /// extents may begin and end anywhere.
    pub granularity_bytes: u32,
    /// The most data in one frame, in bytes: 4096 to [`MAX_FRAME_BYTES`].
    pub max_frame_bytes: u32,
    /// When the delta was made, in milliseconds since 1970-01-01 UTC; 0 where that is not known.
    pub created_ms: u64,
    /// BLAKE3 of all bytes of the base disk, where whoever made the delta took the time.
    #[serde(serialize_with = "hex_or_null")]
    pub base_fingerprint: Option<[u8; 32]>,
    /// The moment the changes are counted from: a tracking id, a restore point; empty where it has no
    /// name.
    pub base_id: String,
    /// The moment the delta leads to; empty where it has no name.
    pub new_id: String,
    /// The virtual machine, for people.
    pub vm: String,
    /// The disk, for people.
    pub disk: String,
}

fn hex_or_null<S: serde::Serializer>(
    digest: &Option<[u8; 32]>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    match digest {
        Some(digest) => serializer.collect_str(&blake3::Hash::from_bytes(*digest).to_hex()),
        None => serializer.serialize_none(),
    }
}

impl DeltaHeader {
    /// The header of a disk of this size before and after, with nothing else known.
    pub const fn new(base_size_bytes: u64, size_bytes: u64) -> Self {
        Self {
            base_size_bytes,
            size_bytes,
            sector_size_bytes: 512,
            granularity_bytes: 4096,
            max_frame_bytes: 1 << 20,
            created_ms: 0,
            base_fingerprint: None,
            base_id: String::new(),
            new_id: String::new(),
            vm: String::new(),
            disk: String::new(),
        }
    }

    /// The bytes of the header.
    ///
    /// # Errors
    /// [`DeltaError::Unsupported`] for values that the format does not allow.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        self.check("a new delta")?;
        let strings = [&self.base_id, &self.new_id, &self.vm, &self.disk];
        let strings_bytes: usize = strings.iter().map(|text| 2 + text.len()).sum();
        let length = (FIXED_BYTES + strings_bytes).next_multiple_of(8) + DIGEST_BYTES;
        let mut out = Vec::with_capacity(length);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&0u16.to_le_bytes());
        out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
        let flags = if self.base_fingerprint.is_some() { HAS_FINGERPRINT } else { 0 };
        for value in [flags, self.sector_size_bytes, self.granularity_bytes, self.max_frame_bytes] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        for value in [self.base_size_bytes, self.size_bytes, self.created_ms] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(&self.base_fingerprint.unwrap_or_default());
        for text in strings {
            out.extend_from_slice(&u16::try_from(text.len()).unwrap_or(u16::MAX).to_le_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        out.resize(length - DIGEST_BYTES, 0);
        let digest = short_digest(&[&out]);
        out.extend_from_slice(&digest);
        Ok(out)
    }

    /// The length of the whole header, from its first [`PRELUDE_BYTES`] bytes.
    pub(crate) fn length_of(prelude: &[u8; PRELUDE_BYTES], delta: &str) -> Result<usize> {
        let mut fields = Fields(prelude);
        if fields.array::<8>() != *MAGIC {
            return Err(DeltaError::damaged(delta, "is no delta: it does not begin with VMTDELTA"));
        }
        let version = fields.u16();
        let _minor = fields.u16();
        if version != VERSION {
            return Err(DeltaError::unsupported(
                delta,
                format!("is of version {version} of the format, and this program reads {VERSION}"),
            ));
        }
        let length = usize::try_from(fields.u32()).unwrap_or(usize::MAX);
        if !(FIXED_BYTES + DIGEST_BYTES..=MAX_HEADER_BYTES).contains(&length) {
            return Err(DeltaError::damaged(delta, format!("its header has {length} bytes")));
        }
        Ok(length)
    }

    /// The header that `bytes`, all of it, are.
    ///
    /// # Errors
    /// [`DeltaError::Damaged`] and [`DeltaError::Unsupported`].
    pub fn from_bytes(bytes: &[u8], delta: &str) -> Result<Self> {
        let damaged = |detail: &str| DeltaError::damaged(delta, format!("its header {detail}"));
        let mut prelude = [0; PRELUDE_BYTES];
        prelude.copy_from_slice(bytes.get(..PRELUDE_BYTES).ok_or_else(|| damaged("is torn"))?);
        let length = Self::length_of(&prelude, delta)?;
        if bytes.len() != length {
            return Err(damaged("is torn"));
        }
        let (content, digest) = bytes.split_at(length - DIGEST_BYTES);
        if short_digest(&[content]) != digest {
            return Err(damaged("does not match its digest"));
        }
        let mut fields = Fields(&content[PRELUDE_BYTES..]);
        let flags = fields.u32();
        if flags & !HAS_FINGERPRINT != 0 {
            return Err(DeltaError::unsupported(
                delta,
                format!("has flags {flags:#x} that this version does not know"),
            ));
        }
        let mut header = Self::new(0, 0);
        header.sector_size_bytes = fields.u32();
        header.granularity_bytes = fields.u32();
        header.max_frame_bytes = fields.u32();
        header.base_size_bytes = fields.u64();
        header.size_bytes = fields.u64();
        header.created_ms = fields.u64();
        let fingerprint = fields.array::<32>();
        header.base_fingerprint = (flags & HAS_FINGERPRINT != 0).then_some(fingerprint);
        for text in [&mut header.base_id, &mut header.new_id, &mut header.vm, &mut header.disk] {
            let length = usize::from(fields.u16());
            let bytes = fields.0.get(..length).ok_or_else(|| damaged("ends inside a name"))?;
            *text = std::str::from_utf8(bytes)
                .map_err(|_| damaged("has a name that is not UTF-8"))?
                .into();
            fields.0 = &fields.0[length..];
        }
        header.check(delta)?;
        Ok(header)
    }

    /// Refuses what the format does not allow, written or read.
    fn check(&self, delta: &str) -> Result<()> {
        let refuse = |detail: String| Err(DeltaError::unsupported(delta, detail));
        for (what, size) in [("base", self.base_size_bytes), ("disk", self.size_bytes)] {
            if size > MAX_DISK_BYTES {
                return refuse(format!("the {what} has {size} bytes; at most {MAX_DISK_BYTES}"));
            }
        }
        let sector = self.sector_size_bytes;
        if !sector.is_power_of_two() || !(512..=65536).contains(&sector) {
            return refuse(format!("{sector} bytes are no sector"));
        }
        let granularity = self.granularity_bytes;
        if !granularity.is_power_of_two() || granularity < 512 {
            return refuse(format!("a granularity of {granularity} bytes is none"));
        }
        if !(MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&self.max_frame_bytes) {
            return refuse(format!(
                "frames of {} bytes; {MIN_FRAME_BYTES} to {MAX_FRAME_BYTES} are allowed",
                self.max_frame_bytes
            ));
        }
        for text in [&self.base_id, &self.new_id, &self.vm, &self.disk] {
            if text.len() > MAX_STRING_BYTES || text.chars().any(char::is_control) {
                return refuse(format!(
                    "a name or id has control characters or more than {MAX_STRING_BYTES} bytes"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> DeltaHeader {
        DeltaHeader {
            base_fingerprint: Some([7; 32]),
            base_id: "rctX:1".into(),
            new_id: "rctX:2".into(),
            vm: "wéb".into(),
            disk: "d0".into(),
            created_ms: 5,
            ..DeltaHeader::new(1 << 40, 2 << 40)
        }
    }

    #[test]
    fn a_header_comes_back_as_it_was_and_every_changed_bit_is_found() {
        let bytes = header().to_bytes().unwrap();
        assert_eq!(DeltaHeader::from_bytes(&bytes, "x").unwrap(), header());
        for at in 0..bytes.len() * 8 {
            let mut altered = bytes.clone();
            altered[at / 8] ^= 1 << (at % 8);
            // The minor version alone may be anything; it is under the digest all the same.
            DeltaHeader::from_bytes(&altered, "x").unwrap_err();
        }
        for length in 0..bytes.len() {
            DeltaHeader::from_bytes(&bytes[..length], "x").unwrap_err();
        }
    }

    #[test]
    fn what_the_format_does_not_allow_is_not_written() {
        let refused = |change: fn(&mut DeltaHeader)| {
            let mut header = header();
            change(&mut header);
            header.to_bytes().unwrap_err();
        };
        refused(|header| header.size_bytes = 1 << 56);
        refused(|header| header.sector_size_bytes = 513);
        refused(|header| header.granularity_bytes = 0);
        refused(|header| header.max_frame_bytes = MAX_FRAME_BYTES + 1);
        refused(|header| header.vm = "a\nb".into());
        refused(|header| header.disk = "x".repeat(5000));
    }
}
