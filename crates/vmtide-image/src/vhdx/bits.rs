//! Bits of a sector bitmap: one per sector, the lowest bit of the first byte first (MS-VHDX 2.4).

use std::ops::Range;

/// Whether the bit at `from` is set, and how many bits from it on, before `limit`, are the same.
/// Bits past the end of the bytes are not set.
pub(super) fn run(bytes: &[u8], from: u64, limit: u64) -> (bool, u64) {
    let is_set = bit(bytes, from);
    let whole = if is_set { u8::MAX } else { 0 };
    let mut at = from;
    while at < limit {
        if at.is_multiple_of(8)
            && limit - at >= 8
            && usize::try_from(at / 8).ok().and_then(|index| bytes.get(index)) == Some(&whole)
        {
            at += 8;
        } else if bit(bytes, at) == is_set {
            at += 1;
        } else {
            break;
        }
    }
    (is_set, at.max(from) - from)
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

fn bit(bytes: &[u8], at: u64) -> bool {
    usize::try_from(at / 8)
        .ok()
        .and_then(|index| bytes.get(index))
        .is_some_and(|byte| byte >> (at % 8) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

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
