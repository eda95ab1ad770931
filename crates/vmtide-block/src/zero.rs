//! The zero scan that stands before everything else a backup does with a block.

/// Whether all bytes are zero. Runs at memory speed (the loop is vectorised by the compiler) and
/// stops at the first 128-byte group that is not, so that data costs next to nothing.
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut groups = bytes.chunks_exact(128);
    for group in &mut groups {
        if group.iter().fold(0u8, |all, byte| all | byte) != 0 {
            return false;
        }
    }
    groups.remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn finds_a_single_bit_wherever_it_is() {
        for length in [0, 1, 127, 128, 129, 4096, 4097] {
            let mut bytes = vec![0u8; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "bit at {at} of {length}");
                bytes[at] = 0;
            }
        }
    }
}
