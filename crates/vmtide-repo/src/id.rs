//! Names of things: random object ids and content-derived chunk ids.

use crate::{RepoError, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A random 16-byte id, written as 32 lower-case hexadecimal digits.
///
/// Names packs, segments, restore points, key slots and repositories. Random, because a name that
/// nobody else will ever choose needs no lock and keys its own encryption (format §3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub [u8; 16]);

impl ObjectId {
    /// A new id from the operating system's random source.
    ///
    /// # Errors
    /// [`RepoError::Io`] where the system has no randomness to give: nothing may be written then,
    /// because object keys would repeat.
    pub fn random() -> Result<Self> {
        #[cfg(feature = "simulation")]
        if let Some(id) = crate::simulation::random_id() {
            return Ok(id);
        }
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)
            .map_err(|error| RepoError::io("get random bytes", std::io::Error::other(error)))?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ObjectId {
    type Err = RepoError;

    fn from_str(text: &str) -> Result<Self> {
        let mut bytes = [0; 16];
        parse_hex(text, &mut bytes)
            .ok_or_else(|| RepoError::Invalid(format!("{text:?} is not an id of 32 hex digits")))?;
        Ok(Self(bytes))
    }
}

impl Serialize for ObjectId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ObjectId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The name of a chunk's content: keyed BLAKE3, 32 bytes (format §3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub [u8; 32]);

impl ChunkId {
    /// The first 16 bytes, by which index segments are sorted (format §8).
    pub fn prefix(&self) -> [u8; 16] {
        let mut prefix = [0; 16];
        prefix.copy_from_slice(&self.0[..16]);
        prefix
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(8).try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str("…")
    }
}

/// The unit of places: disks and packs are sequences of blocks of this many bytes (format §1).
/// It is the block size of nearly every file system, so equal files are equal sequences of blocks.
pub const BLOCK_BYTES: usize = 4096;

/// Where content is: the n-th block of a pack (format §6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    /// The pack.
    pub pack: ObjectId,
    /// The block's number in the pack, from 0.
    pub ordinal: u32,
}

/// Fills `out` from hexadecimal digits of either case; `None` where the text is not exactly that.
pub(crate) fn parse_hex(text: &str, out: &mut [u8]) -> Option<()> {
    let digits = text.as_bytes();
    if digits.len() != out.len() * 2 {
        return None;
    }
    let value = |digit: u8| char::from(digit).to_digit(16).and_then(|v| u8::try_from(v).ok());
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(())
}

/// The bytes as lower-case hexadecimal digits.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
