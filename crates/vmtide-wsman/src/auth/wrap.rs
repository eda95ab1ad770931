//! Kerberos' sealed messages (RFC 4121 4.2.6.2), in the form that Windows splits in two.
//!
//! A token is a header of 16 bytes and what is sealed: a confounder, the message, the header again, a checksum. All of
//! that but the message is turned to the front (by 28 bytes: the second header and the checksum), so that the first 60
//! bytes are the "signature" and the rest is as long as the message. Messages are numbered; what comes out of its order
//! was replayed or left out, and is not read.

use picky_krb::constants::key_usages::{ACCEPTOR_SEAL, INITIATOR_SEAL};
use picky_krb::crypto::Cipher;
use zeroize::Zeroizing;

const HEADER_BYTES: usize = 16;

/// The second header and the checksum of the AES ciphers (RFC 3962).
const ROTATION: u16 = 28;

/// Header, second header, checksum, confounder.
const SIGNATURE_BYTES: usize = 60;

const TOKEN_ID: [u8; 2] = [5, 4];
const FILLER: u8 = 0xff;
const FROM_ACCEPTOR: u8 = 0b001;
const SEALED: u8 = 0b010;
const ACCEPTORS_KEY: u8 = 0b100;

/// Both directions of one connection.
pub(super) struct Wrap {
    cipher: Box<dyn Cipher + Send>,
    key: Zeroizing<Vec<u8>>,
    next: u64,
    /// The number of the host's next message; none before its first.
    expected: Option<u64>,
}

/// A cipher that may go to another thread: the library's are without state.
fn cipher_of(key: &[u8]) -> Option<Box<dyn Cipher + Send>> {
    use picky_krb::crypto::aes::{Aes128CtsHmacSha196, Aes256CtsHmacSha196};
    match key.len() {
        32 => Some(Box::new(Aes256CtsHmacSha196::new())),
        16 => Some(Box::new(Aes128CtsHmacSha196::new())),
        _ => None,
    }
}

impl Wrap {
    /// With the key that the host chose; our messages are numbered from `first` on. None where the key is of no AES
    /// cipher.
    pub fn new(key: Zeroizing<Vec<u8>>, first: u64) -> Option<Self> {
        Some(Self { cipher: cipher_of(&key)?, key, next: first, expected: None })
    }

    /// Seals a message: signature and data.
    pub fn seal(&mut self, plain: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        let header = header(SEALED | ACCEPTORS_KEY, 0, 0, self.next);
        self.next = self.next.checked_add(1)?;
        let payload = [plain, &header].concat();
        let mut sealed = self.cipher.encrypt(&self.key, INITIATOR_SEAL, &payload).ok()?;
        let turn = usize::from(ROTATION).checked_rem(sealed.len())?;
        sealed.rotate_right(turn);
        let mut token = header.to_vec();
        token.splice(6..8, ROTATION.to_be_bytes());
        token.extend_from_slice(&sealed);
        let data = token.split_off(SIGNATURE_BYTES.min(token.len()));
        Some((token, data))
    }

    /// Opens a message. An error says what is wrong with it.
    pub fn open(&mut self, signature: &[u8], data: &[u8]) -> Result<Vec<u8>, &'static str> {
        let (head, rest) = signature
            .split_first_chunk::<HEADER_BYTES>()
            .ok_or("a sealed message has no header")?;
        let [a, b, flags, filler, extra_high, extra_low, turn_high, turn_low, number @ ..] = *head;
        if [a, b] != TOKEN_ID || filler != FILLER || flags & SEALED == 0 {
            return Err("a message has another form than that of sealed ones");
        }
        if flags & FROM_ACCEPTOR == 0 {
            return Err("a message is one of our own");
        }
        let extra = u16::from_be_bytes([extra_high, extra_low]);
        let turn = usize::from(u16::from_be_bytes([turn_high, turn_low]));
        let number = u64::from_be_bytes(number);
        if self.expected.is_some_and(|expected| expected != number) {
            return Err("a message is not the next one");
        }
        let sealed = [rest, data].concat();
        // Shorter than a confounder and a checksum, and the library would have nothing to split.
        if sealed.len() < usize::from(ROTATION) {
            return Err("a sealed message is too short");
        }
        // Windows turns what has filler by the filler, too (MS-KILE 3.4.5.4.1). The checksum tells which it was.
        let with_filler = (extra > 0).then(|| turn + usize::from(extra));
        let mut plain = [Some(turn), with_filler]
            .into_iter()
            .flatten()
            .find_map(|turn| self.decrypt(&sealed, turn))
            .ok_or("a message was changed on the way")?;
        let tail = HEADER_BYTES + usize::from(extra);
        let length = plain.len().checked_sub(tail).ok_or("a sealed message is too short")?;
        let own = header(flags, extra, 0, number);
        if plain.get(plain.len() - HEADER_BYTES..) != Some(&own[..]) {
            return Err("the header of a message was changed on the way");
        }
        plain.truncate(length);
        self.expected = Some(number.wrapping_add(1));
        Ok(plain)
    }

    /// What is sealed, if it was turned by `turn`.
    fn decrypt(&self, sealed: &[u8], turn: usize) -> Option<Vec<u8>> {
        let mut sealed = sealed.to_vec();
        let turn = turn.checked_rem(sealed.len())?;
        sealed.rotate_left(turn);
        self.cipher.decrypt(&self.key, ACCEPTOR_SEAL, &sealed).ok()
    }
}

fn header(flags: u8, extra: u16, rotation: u16, number: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    let parts = [
        &TOKEN_ID[..],
        &[flags, FILLER],
        &extra.to_be_bytes(),
        &rotation.to_be_bytes(),
        &number.to_be_bytes(),
    ];
    for (to, from) in header.iter_mut().zip(parts.concat()) {
        *to = from;
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use picky_krb::crypto::CipherSuite;

    fn wrap() -> Wrap {
        Wrap::new(Zeroizing::new(vec![7; 32]), 9).unwrap()
    }

    /// A message as the host seals it: turned by `turn`, with `extra` bytes of filler.
    fn from_host(plain: &[u8], number: u64, turn: usize, extra: u16) -> (Vec<u8>, Vec<u8>) {
        turned(plain, number, turn, extra, turn)
    }

    /// The same, if it says that it is turned by `said`.
    fn turned(
        plain: &[u8],
        number: u64,
        turn: usize,
        extra: u16,
        said: usize,
    ) -> (Vec<u8>, Vec<u8>) {
        let flags = SEALED | ACCEPTORS_KEY | FROM_ACCEPTOR;
        let cipher = CipherSuite::Aes256CtsHmacSha196.cipher();
        let filler = vec![0; extra.into()];
        let payload = [plain, &filler, &header(flags, extra, 0, number)].concat();
        let mut sealed = cipher.encrypt(&[7; 32], ACCEPTOR_SEAL, &payload).unwrap();
        let length = sealed.len();
        sealed.rotate_right(turn % length);
        let said = u16::try_from(said).unwrap();
        let mut token = header(flags, extra, said, number).to_vec();
        token.extend(sealed);
        let data = token.split_off(SIGNATURE_BYTES);
        (token, data)
    }

    #[test]
    fn what_is_sealed_is_as_long_as_the_message() {
        let mut wrap = wrap();
        for (plain, number) in [(&b"message"[..], 9), (b"", 10), (&[1; 5000], 11)] {
            let (signature, data) = wrap.seal(plain).unwrap();
            assert_eq!((signature.len(), data.len()), (60, plain.len()));
            assert_eq!(signature[..8], [5, 4, 6, 0xff, 0, 0, 0, 28]);
            assert_eq!(signature[8..16], u64::to_be_bytes(number));
        }
    }

    #[test]
    fn messages_open_in_their_order_however_they_are_turned() {
        let mut wrap = wrap();
        for (number, turn, extra) in
            [(3, 28, 0), (4, 0, 0), (5, 12, 0), (6, 28, 16), (7, 40_000, 0)]
        {
            let (signature, data) = from_host(b"<answer/>", number, turn, extra);
            assert_eq!(wrap.open(&signature, &data).unwrap(), b"<answer/>", "{number}");
            assert!(wrap.open(&signature, &data).is_err(), "a replay was read");
        }
        let (signature, data) = turned(b"<windows/>", 8, 44, 16, 28);
        assert_eq!(wrap.open(&signature, &data).unwrap(), b"<windows/>");
        let (signature, data) = from_host(b"later", 10, 28, 0);
        assert!(wrap.open(&signature, &data).is_err(), "a message was left out");
    }

    #[test]
    fn changed_messages_do_not_open() {
        let (signature, data) = from_host(b"<answer/>", 3, 28, 0);
        for at in 0..signature.len() + data.len() {
            let mut token = [&signature[..], &data].concat();
            token[at] ^= 1;
            let (signature, data) = token.split_at(60);
            let opened = wrap().open(signature, data);
            // The number of the first message may be any, but it is in the second header as well.
            assert!(opened.is_err(), "{at}");
        }
        for length in 0..60 {
            assert!(wrap().open(&signature[..length], b"").is_err());
        }
        let own = wrap().seal(b"x").unwrap();
        assert!(wrap().open(&own.0, &own.1).is_err(), "our own message came back");
        assert!(Wrap::new(Zeroizing::new(vec![0; 24]), 0).is_none());
    }
}
