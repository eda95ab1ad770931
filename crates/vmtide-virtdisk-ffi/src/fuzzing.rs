//! One call for the fuzz target `virtdisk_answers` (see `fuzz/README.md`), which this crate's tests run as well.

use crate::info::Answer;
use crate::{ChangeQuery, RawAnswer, RawRange, Result, TrackingId, for_each_change};
use std::cell::Cell;
use vmtide_block::{ByteRange, RangeSet};

/// Decodes `bytes` as every answer that Windows gives, and asserts what callers rely on.
///
/// # Panics
/// Where an answer to changes leads out of the range asked for, or leaves a part of it out silently.
pub fn answers(bytes: &[u8]) {
    let answer = Answer::new(bytes, "disk");
    if let Ok(size) = answer.size() {
        assert_eq!(size.virtual_bytes % u64::from(size.sector_bytes), 0, "whole sectors");
    }
    if let Ok(state) = answer.change_tracking() {
        let length = state.most_recent_id.map_or(0, |id| id.to_wide().len());
        assert!(length <= crate::tracking_id::MAX_UNITS_WITH_TERMINATOR, "ids have a limit");
    }
    let _ = (answer.parent(), answer.guid(), answer.storage_type(), answer.physical_disk());
    changes(bytes);
}

/// A disk that answers with what the bytes say: pages of at most 16 ranges.
struct Told<'a>(Cell<&'a [u8]>);

impl Told<'_> {
    fn number(&self) -> u64 {
        let bytes = self.0.get();
        let (first, rest) = bytes.split_at(bytes.len().min(8));
        self.0.set(rest);
        let mut word = [0; 8];
        for (to, from) in word.iter_mut().zip(first) {
            *to = *from;
        }
        u64::from_le_bytes(word)
    }
}

impl ChangeQuery for Told<'_> {
    fn path(&self) -> &str {
        "disk"
    }

    fn query(&self, _: &TrackingId, _: ByteRange, ranges: &mut [RawRange]) -> Result<RawAnswer> {
        let head = self.number();
        for range in ranges.iter_mut().take(16) {
            *range =
                RawRange { byte_offset: self.number(), byte_length: self.number(), reserved: 0 };
        }
        let [count, ..] = head.to_le_bytes();
        Ok(RawAnswer { range_count: u32::from(count), processed_bytes: head >> 8 })
    }
}

fn changes(bytes: &[u8]) {
    let disk = Told(Cell::new(bytes));
    let size = disk.number() >> 16;
    let asked = ByteRange::new(disk.number() >> 16, disk.number() >> 8);
    let Ok(id) = TrackingId::new("rctX:1", "disk") else { return };
    let window = asked.intersect(&ByteRange::new(0, size));
    let mut found = RangeSet::new();
    let mut at = window.offset;
    let _ = for_each_change(&disk, &id, asked, size, |range| {
        assert!(range.offset >= at, "in order");
        at = range.end();
        found.insert(range);
        Ok::<_, crate::VirtdiskError>(())
    });
    assert!(found.within(window) == found, "inside what was asked");
}

#[cfg(test)]
mod tests {
    use super::answers;
    use proptest::prelude::*;

    #[test]
    fn the_seeds_and_all_that_is_near_them_are_taken() {
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/virtdisk_answers");
        let mut seen = 0;
        for entry in std::fs::read_dir(seeds).unwrap() {
            let seed = std::fs::read(entry.unwrap().path()).unwrap();
            seen += 1;
            for at in 0..seed.len() {
                answers(&seed[..at]);
                for flip in [1, 0x80, 0xff] {
                    let mut bytes = seed.clone();
                    bytes[at] ^= flip;
                    answers(&bytes);
                }
            }
        }
        assert_eq!(seen, 4);
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
            answers(&bytes);
        }
    }
}
