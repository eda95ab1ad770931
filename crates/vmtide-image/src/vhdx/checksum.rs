//! The CRC-32C of headers, region tables and log entries (MS-VHDX 2.2.2, 2.2.3, 2.3.1).
//!
//! All three keep it in the four bytes at offset 4 and compute it over the whole structure with
//! those bytes as zeros.

use crate::bytes::{le_u32, put};

/// Where the checksum stands in every structure that has one.
const FIELD: usize = 4;

/// The checksum that `structure` should have, whatever it has.
pub(crate) fn checksum(structure: &[u8]) -> u32 {
    let (before, rest) = structure.split_at(FIELD.min(structure.len()));
    let after = rest.get(4..).unwrap_or_default();
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]), after)
}

/// Puts the right checksum into `structure`.
pub(crate) fn seal(structure: &mut [u8]) {
    let value = checksum(structure);
    put(structure, FIELD, &value.to_le_bytes());
}

/// The checksum that `structure` says it has.
pub(crate) fn stored(structure: &[u8]) -> u32 {
    le_u32(structure, FIELD)
}

/// Whether `structure` has the checksum it should have.
pub(crate) fn is_sealed(structure: &[u8]) -> bool {
    stored(structure) == checksum(structure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn castagnoli_with_its_own_field_as_zeros() {
        // RFC 3720 B.4: 32 bytes of zeros give 0x8a9136aa.
        let mut structure = [0u8; 32];
        assert_eq!(checksum(&structure), 0x8a91_36aa);
        structure[4..8].copy_from_slice(&[1, 2, 3, 4]);
        assert_eq!(checksum(&structure), 0x8a91_36aa);
        assert!(!is_sealed(&structure));
        seal(&mut structure);
        assert_eq!(stored(&structure), 0x8a91_36aa);
        assert!(is_sealed(&structure));
        structure[31] ^= 1;
        assert!(!is_sealed(&structure));
    }
}
