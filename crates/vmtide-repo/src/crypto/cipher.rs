//! Sealing and opening the sections of one object.

use super::{Subkeys, TAG_BYTES};
use crate::envelope::{HEADER_BYTES, Header};
use crate::{RepoError, Result};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroize;

/// Seals and opens the sections of one object: AES-256-GCM, or nothing at all in a repository
/// without encryption. Shared by threads.
///
/// The caller must not seal two different sections under one number.
#[derive(Debug)]
pub struct ObjectCipher {
    key: Option<LessSafeKey>,
    header: [u8; HEADER_BYTES],
    object: String,
}

impl ObjectCipher {
    /// The cipher of the object that `header` begins.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] where the key cannot be used; cannot happen with 32-byte keys.
    pub fn new(subkeys: &Subkeys, header: &Header) -> Result<Self> {
        let key = if header.sealed {
            let mut bytes = subkeys.object_key(header.kind, header.id);
            let unbound = UnboundKey::new(&AES_256_GCM, &bytes)
                .map_err(|_| RepoError::Invalid("the object key cannot be used".into()));
            bytes.zeroize();
            Some(LessSafeKey::new(unbound?))
        } else {
            None
        };
        Ok(Self { key, header: header.encode(), object: header.object_name() })
    }

    /// The bytes that sealing adds.
    pub const fn overhead_bytes(&self) -> usize {
        if self.key.is_some() { TAG_BYTES } else { 0 }
    }

    /// Seals `data` in place as section `section`; the tag is appended.
    ///
    /// # Errors
    /// [`RepoError::Invalid`] where the section is too long for AES-GCM (64 GiB).
    pub fn seal(&self, section: u64, associated: &[u8], data: &mut Vec<u8>) -> Result<()> {
        let Some(key) = &self.key else { return Ok(()) };
        key.seal_in_place_append_tag(nonce(section), self.associated(section, associated), data)
            .map_err(|_| RepoError::Invalid(format!("section too long in {}", self.object)))
    }

    /// Opens section `section` in place and returns the part of `stored` that is the content.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] where the bytes are not those that were sealed there.
    pub fn open<'a>(
        &self,
        section: u64,
        associated: &[u8],
        stored: &'a mut [u8],
    ) -> Result<&'a mut [u8]> {
        let Some(key) = &self.key else {
            return Ok(stored);
        };
        key.open_in_place(nonce(section), self.associated(section, associated), stored).map_err(
            |_| {
                RepoError::damaged(
                    &self.object,
                    format!("section {section} does not open: its bytes were changed"),
                )
            },
        )
    }

    fn associated(&self, section: u64, more: &[u8]) -> Aad<Vec<u8>> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + 8 + more.len());
        bytes.extend_from_slice(&self.header);
        bytes.extend_from_slice(&section.to_le_bytes());
        bytes.extend_from_slice(more);
        Aad::from(bytes)
    }
}

fn nonce(section: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&section.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}
