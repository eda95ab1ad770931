//! One key slot: the master key sealed with a key from a password (format §5).

use super::{KdfParameters, recovery};
use crate::crypto::MasterKey;
use crate::document;
use crate::id::{parse_hex, to_hex};
use crate::password::Password;
use crate::{ObjectId, RepoError, Result};
use jiff::Timestamp;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// What the document says it is.
const FORMAT: &str = "vmtide key slot";

/// What the associated data begins with.
const ASSOCIATED: &[u8] = b"vmtide key slot";

const ALGORITHM: &str = "argon2id";

/// Argon2 1.3, as RFC 9106 has it.
const ALGORITHM_VERSION: u32 = 19;

/// The master key and its tag.
const SEALED_BYTES: usize = 48;

/// Labels are for people, on one line.
const MAX_LABEL_BYTES: usize = 200;

/// A key slot, without what is secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeySlotInfo {
    /// The slot's id, by which it is removed.
    pub id: ObjectId,
    /// What its maker called it.
    pub label: String,
    /// When it was made.
    pub created: Timestamp,
    /// What one guess of its password costs.
    pub kdf: KdfParameters,
}

/// A key slot as it is stored.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub info: KeySlotInfo,
    /// The repository it belongs to. An interrupted `init` leaves slots of one that never was.
    pub repository: ObjectId,
    salt: [u8; 16],
    sealed: [u8; SEALED_BYTES],
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Members {
    format: String,
    version: u32,
    id: ObjectId,
    repository: ObjectId,
    label: String,
    created: Timestamp,
    kdf: KdfMembers,
    sealed_master_key: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KdfMembers {
    algorithm: String,
    version: u32,
    memory_kib: u32,
    iterations: u32,
    lanes: u32,
    salt: String,
}

impl Slot {
    /// Seals the master key under a password, in a slot with a new id and salt.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] for an empty password, parameters or a label that cannot be; `Io`
    /// where there is no randomness or memory.
    pub fn seal(
        repository: ObjectId,
        config_bytes: &[u8],
        master: &MasterKey,
        label: &str,
        password: &Password,
        kdf: &KdfParameters,
    ) -> Result<Self> {
        check_label(label).map_err(RepoError::Invalid)?;
        if password.is_empty() {
            return Err(RepoError::Invalid("an empty password protects nothing".into()));
        }
        let id = ObjectId::random()?;
        let ObjectId(salt) = ObjectId::random()?;
        let key = cipher(&kdf.derive(&recovery::canonical(password), &salt)?)?;
        let mut sealed = [0; SEALED_BYTES];
        sealed[..32].copy_from_slice(master.as_bytes());
        let tag = key
            .seal_in_place_separate_tag(nonce(), associated(id, config_bytes), &mut sealed[..32])
            .map_err(|_| RepoError::Invalid("the master key cannot be sealed".into()))?;
        sealed[32..].copy_from_slice(tag.as_ref());
        let now = Timestamp::now();
        Ok(Self {
            info: KeySlotInfo {
                id,
                label: label.to_owned(),
                created: Timestamp::from_second(now.as_second()).unwrap_or(now),
                kdf: *kdf,
            },
            repository,
            salt,
            sealed,
        })
    }

    /// The master key, or None where the password is another. A recovery key opens however it is written.
    ///
    /// # Errors
    /// `Io` where the memory to derive the key is not to be had.
    pub fn open(&self, config_bytes: &[u8], password: &Password) -> Result<Option<MasterKey>> {
        let password = recovery::canonical(password);
        let key = cipher(&self.info.kdf.derive(&password, &self.salt)?)?;
        let mut sealed = Zeroizing::new(self.sealed);
        let associated = associated(self.info.id, config_bytes);
        let Ok(opened) = key.open_in_place(nonce(), associated, &mut sealed[..]) else {
            return Ok(None);
        };
        let mut master = Zeroizing::new([0; 32]);
        master.copy_from_slice(opened);
        Ok(Some(MasterKey::from_bytes(*master)))
    }

    /// The bytes of the object.
    ///
    /// # Errors
    /// [`RepoError::Invalid`]; cannot happen with what this crate makes.
    pub fn encode(&self) -> Result<Vec<u8>> {
        document::encode(&Members {
            format: FORMAT.into(),
            version: document::VERSION,
            id: self.info.id,
            repository: self.repository,
            label: self.info.label.clone(),
            created: self.info.created,
            kdf: KdfMembers {
                algorithm: ALGORITHM.into(),
                version: ALGORITHM_VERSION,
                memory_kib: self.info.kdf.memory_kib,
                iterations: self.info.kdf.iterations,
                lanes: self.info.kdf.lanes,
                salt: to_hex(&self.salt),
            },
            sealed_master_key: to_hex(&self.sealed),
        })
    }

    /// The slot `id` in the bytes of its object.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] where the bytes are not what was written, break the format, or ask for
    /// more than a reader gives; [`RepoError::Unsupported`] for another version or algorithm.
    pub fn decode(id: ObjectId, bytes: &[u8]) -> Result<Self> {
        let name = super::object_name(id);
        let damaged = |detail: String| RepoError::damaged(&name, detail);
        let members: Members = document::decode(&name, FORMAT, bytes)?;
        if members.kdf.algorithm != ALGORITHM || members.kdf.version != ALGORITHM_VERSION {
            return Err(RepoError::Unsupported {
                object: name,
                what: format!(
                    "key derivation {:?} version {}",
                    members.kdf.algorithm, members.kdf.version
                ),
            });
        }
        if members.id != id {
            return Err(damaged(format!("it is slot {} under another name", members.id)));
        }
        check_label(&members.label).map_err(damaged)?;
        let kdf = KdfParameters {
            memory_kib: members.kdf.memory_kib,
            iterations: members.kdf.iterations,
            lanes: members.kdf.lanes,
        };
        kdf.check().map_err(|detail| damaged(format!("kdf asks for {detail}")))?;
        let (mut salt, mut sealed) = ([0; 16], [0; SEALED_BYTES]);
        parse_hex(&members.kdf.salt, &mut salt)
            .ok_or_else(|| damaged("salt is not 32 hex digits".into()))?;
        parse_hex(&members.sealed_master_key, &mut sealed)
            .ok_or_else(|| damaged("sealed_master_key is not 96 hex digits".into()))?;
        Ok(Self {
            info: KeySlotInfo { id, label: members.label, created: members.created, kdf },
            repository: members.repository,
            salt,
            sealed,
        })
    }
}

fn check_label(label: &str) -> Result<(), String> {
    if label.len() <= MAX_LABEL_BYTES && !label.chars().any(char::is_control) {
        return Ok(());
    }
    Err(format!("the label of a key is one line of at most {MAX_LABEL_BYTES} bytes"))
}

fn cipher(key: &Zeroizing<[u8; 32]>) -> Result<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, &key[..])
        .map(LessSafeKey::new)
        .map_err(|_| RepoError::Invalid("the slot key cannot be used".into()))
}

/// Zero: the salt is random, so a slot key seals once.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

fn associated(id: ObjectId, config_bytes: &[u8]) -> Aad<Vec<u8>> {
    let mut bytes = ASSOCIATED.to_vec();
    bytes.extend_from_slice(&id.0);
    bytes.extend_from_slice(blake3::hash(config_bytes).as_bytes());
    Aad::from(bytes)
}
