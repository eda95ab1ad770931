//! Bits of a sector bitmap: one per sector, the lowest bit of the first byte first (MS-VHDX 2.4).

use std::ops::Range;

/// Whether the bit at `from` is set, and how many bits from it on, before `limit`, are the same.
/// Bits past the end of the bytes are not set.
pub(super) fn run(bytes: &[u8], from: u64, limit: u64) -> (bool, u64) {
    let is_set = word(bytes, from / 8) >> (from % 8) & 1 == 1;
    let mut at = from;
    while at < limit {
        // Eight bytes at a time, flipped where need be so that the run is one of ones.
        let (inside, flip) = (at % 8, if is_set { 0 } else { u64::MAX });
        let count = u64::from(((word(bytes, at / 8) ^ flip) >> inside).trailing_ones());
        at += count;
        if count < 64 - inside {
            break;
        }
    }
    (is_set, at.min(limit).max(from) - from)
}

/// The bits of eight bytes from the byte at `index`; those past the end are not set.
fn word(bytes: &[u8], index: u64) -> u64 {
    let rest = usize::try_from(index).ok().and_then(|index| bytes.get(index..)).unwrap_or_default();
    match rest.first_chunk() {
        Some(whole) => u64::from_le_bytes(*whole),
        None => rest.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
    }
}

/// The number of set bits among those from `from` up to and without `end`.
pub(super) fn count(bytes: &[u8], from: u64, end: u64) -> u64 {
    let (mut total, mut at) = (0, from);
    while at < end {
        let (is_set, bits) = run(bytes, at, end);
        total += if is_set { bits } else { 0 };
        at += bits.max(1);
    }
    total
}

/// Sets or clears bits; those past the end of the bytes are none.
pub(super) fn fill(bytes: &mut [u8], bits: Range<u64>, is_set: bool) {
    let mut at = bits.start;
    while at < bits.end {
        let Some(byte) = usize::try_from(at / 8).ok().and_then(|index| bytes.get_mut(index)) else {
            return;
        };
        let past = bits.end.min(at - at % 8 + 8);
        let (low, high) = (at % 8, past - (at - at % 8));
        let mask = u8::MAX << low & u8::MAX >> (8 - high);
        *byte = if is_set { *byte | mask } else { *byte & !mask };
        at = past;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_and_counts_are_those_of_the_bits_one_by_one() {
        // Runs from one bit to many words.
        let mut bytes = vec![0u8; 61];
        bytes[3..9].fill(0xff);
        bytes[9] = 0x07;
        bytes[20] = 0xa5;
        bytes[30..61].fill(0xff);
        bytes[40] = 0xfe;
        let mut bits: Vec<bool> =
            (0..bytes.len() * 8).map(|at| bytes[at / 8] >> (at % 8) & 1 == 1).collect();
        bits.resize(bits.len() + 80, false);
        for from in 0..bits.len() {
            for end in [from + 1, from + 7, from + 65, bits.len()] {
                let end = end.min(bits.len());
                let length = bits[from..end].iter().take_while(|bit| **bit == bits[from]).count();
                let found = run(&bytes, from as u64, end as u64);
                assert_eq!(found, (bits[from], length as u64), "{from}..{end}");
            }
        }
        let set = bits[5..450].iter().filter(|bit| **bit).count() as u64;
        assert_eq!(count(&bytes, 5, 450), set);
    }

    #[test]
    fn bits_are_filled_and_runs_are_found() {
        for (from, past) in [(0, 1), (0, 64), (3, 5), (3, 8), (7, 9), (8, 40), (5, 61), (9, 9)] {
            let mut bytes = [0u8; 8];
            fill(&mut bytes, from..past, true);
            let expected: u64 = (from..past).map(|bit| 1 << bit).sum();
            assert_eq!(u64::from_le_bytes(bytes), expected, "{from}..{past}");
            if from < past {
                assert_eq!(run(&bytes, from, 64), (true, past - from));
                assert_eq!(run(&bytes, from, from + 1), (true, 1));
                if from > 0 {
                    assert_eq!(run(&bytes, 0, 64), (false, from));
                }
            }
            let mut bytes = [0xff; 8];
            fill(&mut bytes, from..past, false);
            assert_eq!(u64::from_le_bytes(bytes), !expected, "{from}..{past}");
        }
        let mut bytes = [0xff; 2];
        fill(&mut bytes, 9..100, false);
        assert_eq!(bytes, [0xff, 1]);
        assert_eq!(run(&bytes, 9, 100), (false, 91));
    }
}
