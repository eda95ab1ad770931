//! The master key and what is derived from it.

use crate::envelope::ObjectKind;
use crate::{ChunkId, ObjectId, Result};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// The repository's secret: 32 random bytes, kept only sealed in key slots.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct MasterKey([u8; 32]);

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MasterKey(secret)")
    }
}

impl MasterKey {
    /// A new key from the operating system's random source.
    ///
    /// # Errors
    /// [`RepoError::Io`](crate::RepoError::Io) where there is no randomness.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 32];
        for half in bytes.chunks_exact_mut(16) {
            // Also in simulations, where ids follow from a seed: so does then where chunks end.
            half.copy_from_slice(&ObjectId::random()?.0);
        }
        Ok(Self(bytes))
    }

    /// The key with these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for sealing them in a key slot.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The keys that work with data.
    pub fn subkeys(&self) -> Subkeys {
        Subkeys {
            chunk_id: blake3::derive_key("vmtide v1 chunk id", &self.0),
            object_root: blake3::derive_key("vmtide v1 object key", &self.0),
            boundary_seed: boundary_seed(&self.0),
        }
    }
}

/// The keys derived from the master key.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Subkeys {
    chunk_id: [u8; 32],
    object_root: [u8; 32],
    boundary_seed: u64,
}

impl std::fmt::Debug for Subkeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Subkeys(secret)")
    }
}

impl Subkeys {
    /// The seed of the hash that decides where chunks end (format §6.1).
    pub const fn boundary_seed(&self) -> u64 {
        self.boundary_seed
    }

    /// The id of a chunk's content.
    pub fn chunk_id(&self, content: &[u8]) -> ChunkId {
        ChunkId(*blake3::keyed_hash(&self.chunk_id, content).as_bytes())
    }

    /// The key of one object.
    pub(super) fn object_key(&self, kind: ObjectKind, id: ObjectId) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.object_root);
        hasher.update(kind.magic()).update(&id.0);
        *hasher.finalize().as_bytes()
    }
}

fn boundary_seed(master: &[u8; 32]) -> u64 {
    let key = blake3::derive_key("vmtide v1 chunk boundary", master);
    let mut seed = [0; 8];
    seed.copy_from_slice(&key[..8]);
    u64::from_le_bytes(seed)
}
