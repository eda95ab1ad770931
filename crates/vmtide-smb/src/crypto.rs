//! Keys, signatures and encryption of SMB 3.1.1 (MS-SMB2 3.1.4).
//!
//! AES-GCM, HMAC and the hash are ring's. AES-CMAC (RFC 4493), with which servers before Windows Server 2022
//! sign, is here over the block cipher of `aes`, because ring has neither.

use crate::error::{Result, SmbError};
use crate::header::{FLAG_RESPONSE, FLAG_SIGNED, HEADER_BYTES, SIGNATURE_AT};
use aes::Aes128;
use aes::cipher::{Array, BlockCipherEncrypt, KeyInit};
use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, LessSafeKey, Nonce, UnboundKey};
use ring::{digest, hmac};
use std::sync::atomic::{AtomicU64, Ordering};
use zeroize::Zeroizing;

/// The hash over negotiation and login that keys depend on, so that nobody in between can change either.
#[derive(Clone)]
pub(crate) struct PreauthHash([u8; 64]);

impl PreauthHash {
    pub(crate) const fn new() -> Self {
        Self([0; 64])
    }

    pub(crate) fn add(&mut self, message: &[u8]) {
        let mut context = digest::Context::new(&digest::SHA512);
        context.update(&self.0);
        context.update(message);
        self.0.copy_from_slice(context.finish().as_ref());
    }
}

/// `SP800-108` in counter mode with HMAC-SHA-256: one block of it gives all keys that are needed.
fn derive(key: &[u8], label: &[u8], context: &[u8], bytes: usize) -> Zeroizing<Vec<u8>> {
    let mut input = Vec::with_capacity(label.len() + context.len() + 9);
    input.extend_from_slice(&1u32.to_be_bytes());
    input.extend_from_slice(label);
    input.push(0);
    input.extend_from_slice(context);
    let bits = u32::try_from(bytes * 8).unwrap_or(256);
    input.extend_from_slice(&bits.to_be_bytes());
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), &input);
    Zeroizing::new(tag.as_ref().iter().copied().take(bytes).collect())
}

/// How messages are signed (2.2.3.1.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signing {
    /// Every server has it.
    Cmac,
    /// Many times faster; since Windows Server 2022 and Samba 4.15.
    Gmac,
}

/// How messages are encrypted (2.2.3.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encryption {
    Aes128Gcm,
    Aes256Gcm,
}

impl Encryption {
    /// What people call it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Aes128Gcm => "AES-128-GCM",
            Self::Aes256Gcm => "AES-256-GCM",
        }
    }
}

/// The key that signs, in the form of its algorithm.
pub(crate) enum Signer {
    Cmac(Box<Cmac>),
    Gmac(Box<LessSafeKey>),
}

impl Signer {
    pub(crate) fn new(signing: Signing, session_key: &[u8], preauth: &PreauthHash) -> Result<Self> {
        let key = derive(session_key, b"SMBSigningKey\0", &preauth.0, 16);
        Ok(match signing {
            Signing::Cmac => Self::Cmac(Box::new(Cmac::new(&key)?)),
            Signing::Gmac => Self::Gmac(Box::new(aead(&AES_128_GCM, &key)?)),
        })
    }

    /// The signature of a message whose field of it is zero.
    fn signature(&self, parts: [&[u8]; 3], message_id: u64, is_response: bool) -> Result<[u8; 16]> {
        match self {
            Self::Cmac(key) => Ok(key.mac(&parts)),
            Self::Gmac(key) => {
                let mut nonce = [0; 12];
                nonce[..8].copy_from_slice(&message_id.to_le_bytes());
                nonce[8] = u8::from(is_response);
                let whole = parts.concat();
                let tag = key
                    .seal_in_place_separate_tag(
                        Nonce::assume_unique_for_key(nonce),
                        Aad::from(whole),
                        &mut [],
                    )
                    .map_err(|_| SmbError::protocol("a message cannot be signed"))?;
                let mut signature = [0; 16];
                signature.copy_from_slice(tag.as_ref());
                Ok(signature)
            }
        }
    }

    /// Signs a request, whose flags say that it is signed.
    pub(crate) fn sign(&self, message: &mut [u8], message_id: u64) -> Result<()> {
        let signature = self.signature([message, &[], &[]], message_id, false)?;
        if let Some(field) = message.get_mut(SIGNATURE_AT..HEADER_BYTES) {
            field.copy_from_slice(&signature);
        }
        Ok(())
    }

    /// Succeeds for an answer that is signed by who knows the key.
    pub(crate) fn verify(&self, message: &[u8], flags: u32, message_id: u64) -> Result<()> {
        let wrong = || SmbError::protocol("an answer whose signature is missing or wrong");
        let (Some(before), Some(found), Some(after)) = (
            message.get(..SIGNATURE_AT),
            message.get(SIGNATURE_AT..HEADER_BYTES),
            message.get(HEADER_BYTES..),
        ) else {
            return Err(wrong());
        };
        if flags & FLAG_SIGNED == 0 {
            return Err(wrong());
        }
        let is_response = flags & FLAG_RESPONSE != 0;
        let wanted = self.signature([before, &[0; 16], after], message_id, is_response)?;
        // Without a branch on the bytes, so that the time tells nothing of them.
        let differs = wanted.iter().zip(found).fold(0, |differs, (a, b)| differs | (a ^ b));
        if differs == 0 { Ok(()) } else { Err(wrong()) }
    }
}

/// AES-CMAC with a key of 128 bits (RFC 4493).
pub(crate) struct Cmac {
    cipher: Aes128,
    /// Added to the last block where it is whole.
    whole: [u8; 16],
    /// Added to the last block where it was filled up.
    filled: [u8; 16],
}

impl Cmac {
    pub(crate) fn new(key: &[u8]) -> Result<Self> {
        let cipher = Aes128::new_from_slice(key)
            .map_err(|_| SmbError::protocol("the signing key has a wrong length"))?;
        let mut zero = Array::from([0; 16]);
        cipher.encrypt_block(&mut zero);
        let whole = double(zero.into());
        Ok(Self { cipher, whole, filled: double(whole) })
    }

    /// The code of what `parts` are together.
    pub(crate) fn mac(&self, parts: &[&[u8]]) -> [u8; 16] {
        let mut state = Array::from([0u8; 16]);
        // The block that may be the last.
        let mut block = [0u8; 16];
        let mut filled = 0;
        for part in parts {
            for byte in *part {
                if filled == 16 {
                    xor(&mut state, &block);
                    self.cipher.encrypt_block(&mut state);
                    filled = 0;
                }
                if let Some(place) = block.get_mut(filled) {
                    *place = *byte;
                }
                filled += 1;
            }
        }
        if filled == 16 {
            xor(&mut block, &self.whole);
        } else {
            for (at, place) in block.iter_mut().enumerate().skip(filled) {
                *place = if at == filled { 0x80 } else { 0 };
            }
            xor(&mut block, &self.filled);
        }
        xor(&mut state, &block);
        self.cipher.encrypt_block(&mut state);
        state.into()
    }
}

fn xor(to: &mut [u8], with: &[u8; 16]) {
    for (to, with) in to.iter_mut().zip(with) {
        *to ^= with;
    }
}

/// Multiplication by x in GF(2^128), as RFC 4493 makes its subkeys.
fn double(block: [u8; 16]) -> [u8; 16] {
    let number = u128::from_be_bytes(block);
    let carry = if number >> 127 == 1 { 0x87 } else { 0 };
    ((number << 1) ^ carry).to_be_bytes()
}

fn aead(algorithm: &'static Algorithm, key: &[u8]) -> Result<LessSafeKey> {
    UnboundKey::new(algorithm, key)
        .map(LessSafeKey::new)
        .map_err(|_| SmbError::protocol("the session's key has a wrong length"))
}

/// The length of the header in front of an encrypted message (2.2.41).
pub(crate) const TRANSFORM_BYTES: usize = 52;
/// What an encrypted message begins with.
pub(crate) const TRANSFORM: [u8; 4] = *b"\xfdSMB";
/// Where the transform header has its signature and the nonce, which begins what is authenticated.
const TAG_AT: usize = 4;
const NONCE_AT: usize = 20;

/// Both directions of an encrypted session.
pub(crate) struct Cipher {
    seal: LessSafeKey,
    open: LessSafeKey,
    /// Counts sealed messages: each has a nonce of its own.
    nonce: AtomicU64,
}

impl Cipher {
    pub(crate) fn new(
        encryption: Encryption,
        full_session_key: &[u8],
        preauth: &PreauthHash,
    ) -> Result<Self> {
        let short = full_session_key.get(..16).unwrap_or(full_session_key);
        let (algorithm, key, bytes) = match encryption {
            Encryption::Aes128Gcm => (&AES_128_GCM, short, 16),
            Encryption::Aes256Gcm => (&AES_256_GCM, full_session_key, 32),
        };
        let seal = derive(key, b"SMBC2SCipherKey\0", &preauth.0, bytes);
        let open = derive(key, b"SMBS2CCipherKey\0", &preauth.0, bytes);
        Ok(Self {
            seal: aead(algorithm, &seal)?,
            open: aead(algorithm, &open)?,
            nonce: AtomicU64::new(1),
        })
    }

    /// The server's side of [`new`](Self::new).
    #[cfg(test)]
    pub(crate) fn of_server(
        encryption: Encryption,
        full_session_key: &[u8],
        preauth: &PreauthHash,
    ) -> Result<Self> {
        let Self { seal, open, nonce } = Self::new(encryption, full_session_key, preauth)?;
        Ok(Self { seal: open, open: seal, nonce })
    }

    /// Encrypts the message that stands in `frame` from `start` on, in front of which are
    /// [`TRANSFORM_BYTES`] for its header.
    pub(crate) fn seal(&self, frame: &mut [u8], start: usize, session_id: u64) -> Result<()> {
        let failed = || SmbError::protocol("a message cannot be encrypted");
        let (head, body) = frame.split_at_mut_checked(start).ok_or_else(failed)?;
        let at = start.checked_sub(TRANSFORM_BYTES).ok_or_else(failed)?;
        let header = head.get_mut(at..).ok_or_else(failed)?;
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&self.nonce.fetch_add(1, Ordering::Relaxed).to_le_bytes());
        let size = u32::try_from(body.len()).map_err(|_| failed())?;
        header.fill(0);
        for (at, bytes) in [
            (0, &TRANSFORM[..]),
            (NONCE_AT, &nonce),
            (36, &size.to_le_bytes()),
            // "Encrypted".
            (42, &1u16.to_le_bytes()),
            (44, &session_id.to_le_bytes()),
        ] {
            header.get_mut(at..at + bytes.len()).ok_or_else(failed)?.copy_from_slice(bytes);
        }
        let aad = header.get(NONCE_AT..).ok_or_else(failed)?.to_vec();
        let tag = self
            .seal
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(aad), body)
            .map_err(|_| failed())?;
        header.get_mut(TAG_AT..NONCE_AT).ok_or_else(failed)?.copy_from_slice(tag.as_ref());
        Ok(())
    }

    /// Decrypts a message with its transform header; the message itself is behind that afterwards.
    pub(crate) fn open(&self, frame: &mut [u8], session_id: u64) -> Result<()> {
        let wrong = || SmbError::protocol("an encrypted answer that is damaged or forged");
        let (header, body) = frame.split_at_mut_checked(TRANSFORM_BYTES).ok_or_else(wrong)?;
        let field = |at: usize, length: usize| header.get(at..at + length).ok_or_else(wrong);
        let size = u32::try_from(body.len()).map_err(|_| wrong())?;
        if field(36, 4)? != size.to_le_bytes()
            || field(42, 2)? != 1u16.to_le_bytes()
            || field(44, 8)? != session_id.to_le_bytes()
        {
            return Err(wrong());
        }
        let mut nonce = [0; 12];
        nonce.copy_from_slice(field(NONCE_AT, 12)?);
        let mut tag = [0; 16];
        tag.copy_from_slice(field(TAG_AT, 16)?);
        let aad = field(NONCE_AT, 32)?.to_vec();
        self.open
            .open_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(aad),
                tag.into(),
                body,
                0..,
            )
            .map_err(|_| wrong())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16);
        digits.chunks(2).map(|pair| byte(pair).unwrap()).collect()
    }

    #[test]
    fn cmac_gives_the_examples_of_its_rfc() {
        let key = hex("2b7e151628aed2a6abf7158809cf4f3c");
        let message = hex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51\
             30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710");
        let cmac = Cmac::new(&key).unwrap();
        for (length, code) in [
            (0, "bb1d6929e95937287fa37d129b756746"),
            (16, "070a16b46b4d4144f79bdd9dd04a287c"),
            (40, "dfa66747de9ae63030ca32611497c827"),
            (64, "51f0bebf7e3b9d92fc49741779363cfe"),
        ] {
            let (head, tail) = message[..length].split_at(length / 3);
            assert_eq!(cmac.mac(&[head, &[], tail]).to_vec(), hex(code), "{length} bytes");
        }
    }

    /// The keys of "SMB 2 and SMB 3 security in Windows 10: the anatomy of signing and cryptographic keys"
    /// (Microsoft's blog), its example of dialect 3.1.1.
    #[test]
    fn keys_are_derived_as_windows_does() {
        let session_key = hex("270E1BA896585EEB7AF3472D3B4C75A7");
        let preauth = hex("0DD13628CC3ED218EF9DF9772D436D0887AB9814BFAE63A80AA845F36909DB79\
             28622DDDAD522D9751640A459762C5A9D6BB084CBB3CE6BDADEF5D5BCE3C6C01");
        for (label, key) in [
            (&b"SMBSigningKey\0"[..], "73FE7A9A77BEF0BDE49C650D8CCB5F76"),
            (b"SMBC2SCipherKey\0", "629BCBC54422A0F572B97F45989B6073"),
            (b"SMBS2CCipherKey\0", "E2AF0DCEFAC68DA71A0DFBD0D1350D74"),
        ] {
            assert_eq!(derive(&session_key, label, &preauth, 16)[..], hex(key)[..]);
        }
    }

    #[test]
    fn sealed_messages_open_and_changed_ones_do_not() {
        for encryption in [Encryption::Aes128Gcm, Encryption::Aes256Gcm] {
            let cipher = Cipher::new(encryption, &[7; 32], &PreauthHash::new()).unwrap();
            let mut frame = vec![0; TRANSFORM_BYTES];
            frame.extend_from_slice(b"a message of some length");
            cipher.seal(&mut frame, TRANSFORM_BYTES, 42).unwrap();
            assert_ne!(&frame[TRANSFORM_BYTES..], b"a message of some length");
            // The server's direction has a key of its own.
            let error = cipher.open(&mut frame.clone(), 42).unwrap_err();
            assert!(error.to_string().contains("forged"), "{error}");
            let mirror = Cipher {
                seal: aead(cipher.seal.algorithm(), &vec![0; cipher.seal.algorithm().key_len()])
                    .unwrap(),
                open: aead(
                    cipher.seal.algorithm(),
                    &derive(
                        if encryption == Encryption::Aes128Gcm { &[7; 16] } else { &[7; 32] },
                        b"SMBC2SCipherKey\0",
                        &[0; 64],
                        cipher.seal.algorithm().key_len(),
                    ),
                )
                .unwrap(),
                nonce: AtomicU64::new(0),
            };
            for at in [4, 21, 36, 45, TRANSFORM_BYTES + 3] {
                let mut changed = frame.clone();
                changed[at] ^= 1;
                assert!(mirror.open(&mut changed, 42).is_err(), "byte {at}");
            }
            assert!(mirror.open(&mut frame[..20].to_vec(), 42).is_err());
            assert!(mirror.open(&mut frame.clone(), 43).is_err());
            mirror.open(&mut frame, 42).unwrap();
            assert_eq!(&frame[TRANSFORM_BYTES..], b"a message of some length");
        }
    }

    #[test]
    fn signatures_are_of_every_byte() {
        for signing in [Signing::Cmac, Signing::Gmac] {
            let signer = Signer::new(signing, &[3; 16], &PreauthHash::new()).unwrap();
            let mut message = vec![5; 200];
            message[SIGNATURE_AT..HEADER_BYTES].fill(0);
            signer.sign(&mut message, 9).unwrap();
            signer.verify(&message, FLAG_SIGNED, 9).unwrap();
            assert!(signer.verify(&message, 0, 9).is_err());
            for at in [0, 47, 48, 63, 64, 199] {
                let mut changed = message.clone();
                changed[at] ^= 0x80;
                assert!(signer.verify(&changed, FLAG_SIGNED, 9).is_err(), "byte {at}");
            }
            assert!(signer.verify(&message[..60], FLAG_SIGNED, 9).is_err());
        }
    }
}
