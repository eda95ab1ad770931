//! Keys, chunk ids and sealing (format §3).
//!
//! One master key; from it a key for chunk ids and, per object, a key of its own. An object's
//! sections are sealed with its key and numbered nonces, so a nonce can only repeat if an object id
//! does, and ids are 128 random bits. Nothing here does I/O.

mod cipher;
mod master_key;

pub use cipher::ObjectCipher;
pub use master_key::{MasterKey, Subkeys};

/// The bytes that sealing adds to a section of an encrypted repository: the AES-GCM tag.
pub const TAG_BYTES: usize = 16;

/// The unkeyed BLAKE3 of stored bytes, shortened to 16 bytes: finds damage without a key.
pub fn checksum(stored: &[u8]) -> [u8; 16] {
    let mut short = [0; 16];
    short.copy_from_slice(&blake3::hash(stored).as_bytes()[..16]);
    short
}

#[cfg(test)]
mod tests;
