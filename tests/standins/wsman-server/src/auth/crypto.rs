//! What NTLM is made of: MD4 (RFC 1320), HMAC-MD5 (RFC 2104), RC4. None of it protects anything today.

use md5::{Digest, Md5};

/// MD5 of several pieces.
pub fn md5(pieces: &[&[u8]]) -> [u8; 16] {
    let mut digest = Md5::new();
    for piece in pieces {
        digest.update(piece);
    }
    digest.finalize().into()
}

/// HMAC with MD5 of several pieces.
pub fn hmac_md5(key: &[u8], pieces: &[&[u8]]) -> [u8; 16] {
    let mut block = [0u8; 64];
    let hashed = md5(&[key]);
    let key = if key.len() > block.len() { &hashed[..] } else { key };
    for (to, from) in block.iter_mut().zip(key) {
        *to = *from;
    }
    let inner_pad = block.map(|byte| byte ^ 0x36);
    let outer_pad = block.map(|byte| byte ^ 0x5c);
    let mut inner: Vec<&[u8]> = vec![&inner_pad];
    inner.extend_from_slice(pieces);
    let inner = md5(&inner);
    md5(&[&outer_pad, &inner])
}

/// MD4.
pub fn md4(message: &[u8]) -> [u8; 16] {
    let mut padded = message.to_vec();
    padded.push(0x80);
    while padded.len() % 64 != 56 {
        padded.push(0);
    }
    let bits = u64::try_from(message.len()).unwrap_or_default().wrapping_mul(8);
    padded.extend_from_slice(&bits.to_le_bytes());
    let mut state: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
    for block in padded.chunks_exact(64) {
        let mut words = [0u32; 16];
        for (word, bytes) in words.iter_mut().zip(block.chunks_exact(4)) {
            *word = bytes.iter().rev().fold(0, |sum, byte| (sum << 8) | u32::from(*byte));
        }
        md4_block(&mut state, &words);
    }
    let mut out = [0; 16];
    for (to, from) in out.chunks_exact_mut(4).zip(state) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    out
}

/// One block: three rounds of sixteen steps, each with its function, its order of words and its shifts.
fn md4_block(state: &mut [u32; 4], words: &[u32; 16]) {
    const ORDER: [[usize; 16]; 3] = [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15],
        [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15],
    ];
    const SHIFTS: [[u32; 4]; 3] = [[3, 7, 11, 19], [3, 5, 9, 13], [3, 9, 11, 15]];
    const ADDED: [u32; 3] = [0, 0x5a82_7999, 0x6ed9_eba1];
    let [mut a, mut b, mut c, mut d] = *state;
    for round in 0..3 {
        for step in 0..16 {
            let mixed = match round {
                0 => (b & c) | (!b & d),
                1 => (b & c) | (b & d) | (c & d),
                _ => b ^ c ^ d,
            };
            let sum = a
                .wrapping_add(mixed)
                .wrapping_add(words[ORDER[round][step]])
                .wrapping_add(ADDED[round])
                .rotate_left(SHIFTS[round][step % 4]);
            (a, b, c, d) = (d, sum, b, c);
        }
    }
    for (sum, part) in state.iter_mut().zip([a, b, c, d]) {
        *sum = sum.wrapping_add(part);
    }
}

/// RC4 with its state.
#[derive(Clone)]
pub struct Rc4 {
    table: [u8; 256],
    i: u8,
    j: u8,
}

impl Rc4 {
    /// A fresh state. The key has at least one byte.
    pub fn new(key: &[u8]) -> Self {
        let mut table = [0u8; 256];
        for (byte, value) in table.iter_mut().zip(0..=255) {
            *byte = value;
        }
        let mut j = 0u8;
        for (i, key) in (0..256usize).zip(key.iter().cycle()) {
            j = j.wrapping_add(table[i]).wrapping_add(*key);
            table.swap(i, usize::from(j));
        }
        Self { table, i: 0, j: 0 }
    }

    /// Encrypts or decrypts what comes next.
    pub fn apply(&mut self, data: &mut [u8]) {
        for byte in data {
            self.i = self.i.wrapping_add(1);
            self.j = self.j.wrapping_add(self.table[usize::from(self.i)]);
            self.table.swap(usize::from(self.i), usize::from(self.j));
            let sum = self.table[usize::from(self.i)].wrapping_add(self.table[usize::from(self.j)]);
            *byte ^= self.table[usize::from(sum)];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn md4_as_in_rfc_1320() {
        assert_eq!(hex(&md4(b"")), "31d6cfe0d16ae931b73c59d7e0c089c0");
        assert_eq!(hex(&md4(b"message digest")), "d9130a8164549fe818874806e1c7014b");
        let long =
            b"12345678901234567890123456789012345678901234567890123456789012345678901234567890";
        assert_eq!(hex(&md4(long)), "e33b4ddc9c38f2199c3e7b164fcc0536");
    }

    #[test]
    fn hmac_md5_as_in_rfc_2202() {
        assert_eq!(
            hex(&hmac_md5(&[0x0b; 16], &[b"Hi ", b"There"])),
            "9294727a3638bb1c13f48ef8158bfc9d"
        );
        let long = [0xaa; 80];
        let text: &[u8] = b"Test Using Larger Than Block-Size Key - Hash Key First";
        assert_eq!(hex(&hmac_md5(&long, &[text])), "6b1ab7fe4bd7bf8f0b62e6ce61b9d0cd");
    }

    #[test]
    fn rc4_as_in_rfc_6229() {
        let mut zeros = [0; 16];
        Rc4::new(&[1, 2, 3, 4, 5]).apply(&mut zeros);
        assert_eq!(hex(&zeros), "b2396305f03dc027ccc3524a0a1118a8");
    }
}
