//! The configuration of a repository, `vmtide.repo` (format §4): the first object a reader opens.

use crate::crypto::MasterKey;
use crate::document;
use crate::id::{parse_hex, to_hex};
use crate::store::ObjectStore;
use crate::{ObjectId, RepoError, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// The object's name.
pub(crate) const OBJECT_NAME: &str = "vmtide.repo";

/// What the document says it is.
const FORMAT: &str = "vmtide repository";

/// Chunk sizes in bytes. Below, maps and index outgrow their data; above, one changed sector stores
/// a megabyte, and a frame could hold no four chunks.
const CHUNK_SIZES_BYTES: RangeInclusive<u32> = (16 << 10)..=(1 << 20);

/// How a repository is encrypted. Cannot be changed later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Not at all: whoever can read the store can read the disks.
    None,
    /// AES-256-GCM, authenticated, with a key per object (format §3).
    Aes256Gcm,
}

impl fmt::Display for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Aes256Gcm => "aes-256-gcm",
        })
    }
}

impl FromStr for Encryption {
    type Err = RepoError;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "none" => Ok(Self::None),
            "aes-256-gcm" => Ok(Self::Aes256Gcm),
            _ => Err(RepoError::Invalid(format!(
                "{text:?} is no encryption; use aes-256-gcm or none"
            ))),
        }
    }
}

impl Serialize for Encryption {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What is decided once for a repository.
#[derive(Clone, Debug)]
pub struct RepositoryConfig {
    /// The repository's id, in the header of each of its objects.
    pub id: ObjectId,
    /// When it was made.
    pub created: Timestamp,
    /// The chunk size in bytes: a power of two from 16 KiB to 1 MiB.
    pub chunk_size_bytes: u32,
    /// How it is encrypted.
    pub encryption: Encryption,
    /// In clear, where there is no encryption.
    master_key: Option<MasterKey>,
}

/// The document's members, as they are written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Members {
    format: String,
    version: u32,
    id: ObjectId,
    created: Timestamp,
    chunk_size_bytes: u32,
    encryption: String,
    // Named so that a missing member is an error and not null.
    #[serde(deserialize_with = "Option::deserialize")]
    master_key: Option<String>,
}

impl RepositoryConfig {
    /// The configuration of a new repository, made now.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] for a chunk size that cannot be; `Io` where there is no randomness.
    pub(crate) fn new(
        chunk_size_bytes: u32,
        encryption: Encryption,
        master: &MasterKey,
    ) -> Result<Self> {
        if !is_chunk_size(chunk_size_bytes) {
            return Err(RepoError::Invalid(format!(
                "chunk size {chunk_size_bytes} is not a power of two from {} to {} bytes",
                CHUNK_SIZES_BYTES.start(),
                CHUNK_SIZES_BYTES.end()
            )));
        }
        let now = Timestamp::now();
        Ok(Self {
            id: ObjectId::random()?,
            created: Timestamp::from_second(now.as_second()).unwrap_or(now),
            chunk_size_bytes,
            encryption,
            master_key: (encryption == Encryption::None).then(|| master.clone()),
        })
    }

    /// The bytes of `vmtide.repo`.
    ///
    /// # Errors
    /// [`RepoError::Invalid`]; cannot happen with what this crate makes.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        document::encode(&Members {
            format: FORMAT.into(),
            version: document::VERSION,
            id: self.id,
            created: self.created,
            chunk_size_bytes: self.chunk_size_bytes,
            encryption: self.encryption.to_string(),
            master_key: self.master_key.as_ref().map(|key| to_hex(key.as_bytes())),
        })
    }

    /// The configuration in the bytes of `vmtide.repo`.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] where the bytes are not what was written or break the format;
    /// [`RepoError::Unsupported`] for another version or an unknown encryption.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let members: Members = document::decode(OBJECT_NAME, FORMAT, bytes)?;
        let damaged = |detail: String| Err(RepoError::damaged(OBJECT_NAME, detail));
        let Ok(encryption) = members.encryption.parse() else {
            return Err(RepoError::Unsupported {
                object: OBJECT_NAME.into(),
                what: format!("encryption {:?}", members.encryption),
            });
        };
        if !is_chunk_size(members.chunk_size_bytes) {
            return damaged(format!(
                "chunk_size_bytes is {}, which no repository can have",
                members.chunk_size_bytes
            ));
        }
        let mut key = [0; 32];
        let master_key = match (encryption, members.master_key) {
            (Encryption::Aes256Gcm, None) => None,
            (Encryption::None, Some(digits)) if parse_hex(&digits, &mut key).is_some() => {
                Some(MasterKey::from_bytes(key))
            }
            (Encryption::Aes256Gcm, Some(_)) => {
                return damaged("master_key is in clear in an encrypted repository".into());
            }
            (Encryption::None, _) => {
                return damaged("master_key is not 64 hex digits, and nothing is encrypted".into());
            }
        };
        Ok(Self {
            id: members.id,
            created: members.created,
            chunk_size_bytes: members.chunk_size_bytes,
            encryption,
            master_key,
        })
    }

    /// The master key, where there is no encryption.
    pub(crate) fn master_key(&self) -> Option<MasterKey> {
        self.master_key.clone()
    }
}

/// The bytes of a store's configuration.
///
/// # Errors
/// [`RepoError::NotFound`] where there is no repository, [`RepoError::Damaged`] where the object is
/// too long to be a configuration; those of the store.
pub(crate) fn read(store: &dyn ObjectStore) -> Result<Vec<u8>> {
    document::read(store, OBJECT_NAME).map_err(|error| match error {
        RepoError::NotFound { .. } => RepoError::NotFound {
            what: format!("repository at {}", store.location()),
            hint: format!("`vmtide init {}` makes one", store.location()),
        },
        error => error,
    })
}

fn is_chunk_size(bytes: u32) -> bool {
    bytes.is_power_of_two() && CHUNK_SIZES_BYTES.contains(&bytes)
}

#[cfg(test)]
mod tests;
