//! Unsigned LEB128 numbers (as in DWARF and WebAssembly): seven bits a byte, the lowest first, the
//! top bit set on every byte but the last. Only the shortest form is accepted, so that a number has
//! one encoding.

/// The longest a `u64` can be.
const MAX_BYTES: usize = 10;

/// Appends a number.
pub(crate) fn write(mut value: u64, out: &mut Vec<u8>) {
    loop {
        let low = value.to_le_bytes()[0] & 0x7f;
        value >>= 7;
        if value == 0 {
            out.push(low);
            return;
        }
        out.push(low | 0x80);
    }
}

/// Takes a number from the front of `bytes`; `None` where they end inside it, it does not fit in
/// 64 bits, or is longer than it need be.
pub(crate) fn read(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for (index, &byte) in bytes.iter().take(MAX_BYTES).enumerate() {
        let low = u64::from(byte & 0x7f);
        if index == MAX_BYTES - 1 && low > 1 {
            return None;
        }
        value |= low << (7 * index);
        if byte & 0x80 == 0 {
            if byte == 0 && index > 0 {
                return None;
            }
            *bytes = &bytes[index + 1..];
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn reads_what_it_wrote(values in prop::collection::vec(any::<u64>(), 0..20), shift in 0u32..64) {
            let mut bytes = Vec::new();
            for value in &values {
                write(value >> shift, &mut bytes);
            }
            let mut rest = &bytes[..];
            for value in &values {
                prop_assert_eq!(read(&mut rest), Some(value >> shift));
            }
            prop_assert!(rest.is_empty());
        }
    }

    #[test]
    fn refuses_what_is_cut_too_long_or_too_large() {
        let refused: [&[u8]; 6] = [
            &[],
            &[0x80],
            &[0x80, 0x00],
            &[0xff, 0x80, 0x00],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02],
            &[0xff; 11],
        ];
        for bytes in refused {
            assert_eq!(read(&mut &bytes[..]), None, "{bytes:?}");
        }
        let largest = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
        assert_eq!(read(&mut &largest[..]), Some(u64::MAX));
    }
}
