//! Sector bitmaps: which sectors of a differencing disk's block are its own (specification,
//! "Block Allocation Table and Data Blocks"). Bit 7 of byte 0 is sector 0.

use std::sync::atomic::{AtomicU8, Ordering};

/// The bitmap of one block. Bits are only ever set, by any number of threads; whoever sets one has
/// written the sector before.
pub(crate) struct Bitmap {
    bytes: Box<[AtomicU8]>,
}

impl Bitmap {
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        Self { bytes: bytes.iter().map(|byte| AtomicU8::new(*byte)).collect() }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.bytes.iter().map(|byte| byte.load(Ordering::Acquire)).collect()
    }

    fn byte(&self, index: u64) -> u8 {
        self.bytes.get(crate::bytes::length(index)).map_or(0, |byte| byte.load(Ordering::Acquire))
    }

    /// Whether the sector is this disk's own.
    pub(crate) fn get(&self, sector: u64) -> bool {
        self.byte(sector / 8) & (0x80 >> (sector % 8)) != 0
    }

    /// Whether the sectors from `first` on are this disk's own, and how many before `end` are the
    /// same; at least one.
    pub(crate) fn run(&self, first: u64, end: u64) -> (bool, u64) {
        let present = self.get(first);
        let uniform = if present { 0xff } else { 0 };
        let mut at = first + 1;
        while at < end {
            if at.is_multiple_of(8) && end - at >= 8 && self.byte(at / 8) == uniform {
                at += 8;
            } else if self.get(at) == present {
                at += 1;
            } else {
                break;
            }
        }
        (present, at - first)
    }

    /// Marks the sectors from `first` up to `end` as this disk's own; answers with whether one was
    /// not before.
    pub(crate) fn set(&self, first: u64, end: u64) -> bool {
        let mut changed = false;
        let mut at = first;
        while at < end {
            let byte_end = (at / 8 + 1) * 8;
            let stop = end.min(byte_end);
            // The bits of `at..stop` in their byte, the first one on the left.
            let mask = (0xffu16 >> (at % 8)) & (0xff00u16 >> (stop - (byte_end - 8)));
            let mask = u8::try_from(mask & 0xff).unwrap_or(0xff);
            if let Some(byte) = self.bytes.get(crate::bytes::length(at / 8)) {
                changed |= byte.fetch_or(mask, Ordering::AcqRel) & mask != mask;
            }
            at = stop;
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_leftmost_bit_is_the_first_sector() {
        let bitmap = Bitmap::from_bytes(&[0x80, 0x01]);
        assert_eq!(bitmap.run(0, 16), (true, 1));
        assert_eq!(bitmap.run(1, 16), (false, 14));
        assert_eq!(bitmap.run(15, 16), (true, 1));
    }

    proptest! {
        #[test]
        fn runs_and_sets_equal_a_vector(
            sets in prop::collection::vec((0..200u64, 0..80u64), 0..8),
            starts in prop::collection::vec(0..256u64, 1..8),
        ) {
            let bitmap = Bitmap::from_bytes(&[0; 32]);
            let mut model = [false; 256];
            for (first, count) in sets {
                let end = (first + count).min(256);
                let range = usize::try_from(first).unwrap()..usize::try_from(end).unwrap();
                let expected = model[range.clone()].iter().any(|bit| !bit);
                prop_assert_eq!(bitmap.set(first, end), expected);
                model[range].fill(true);
            }
            for first in starts {
                let at = usize::try_from(first).unwrap();
                let same = model[at..].iter().take_while(|bit| **bit == model[at]).count() as u64;
                prop_assert_eq!(bitmap.run(first, 256), (model[at], same));
            }
            let again = Bitmap::from_bytes(&bitmap.to_bytes());
            prop_assert!((0..256).all(|sector| again.get(sector) == model[usize::try_from(sector).unwrap()]));
        }
    }
}
