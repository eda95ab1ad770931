//! The sampled check of change tracking: blocks that are said to be unchanged are read from the
//! source and compared with the stored copy. A tracker that misses writes is the one fault that no
//! answer shows; this finds it with a probability that grows with every backup.

use crate::Result;
use vmtide_block::{BlockDevice, ByteRange, CancelToken, RangeSet, for_each_extent};
use vmtide_hypervisor::JobId;

/// The length of one sample: what most trackers track by, so that one sample sees one bit.
const SAMPLE_BYTES: u64 = 64 << 10;

/// The stretch of disk whose stored extents are asked for at once.
const WINDOW_BYTES: u64 = 1 << 30;

/// Compares `samples` blocks outside of `changed`, at random places. Answers with a block that
/// differs although it should not.
///
/// # Errors
/// Those of both devices, and of cancelling.
pub(crate) fn find_missed_change(
    source: &dyn BlockDevice,
    stored: &dyn BlockDevice,
    changed: &RangeSet,
    samples: u32,
    cancel: &CancelToken,
) -> Result<Option<ByteRange>> {
    let unchanged = changed.complement(source.size_bytes());
    let total_bytes = unchanged.total_bytes();
    if total_bytes == 0 {
        return Ok(None);
    }
    let seed = JobId::random();
    for number in 0..samples {
        cancel.check()?;
        let digest = blake3::hash(format!("{seed} {number}").as_bytes());
        let mut bits = [0; 8];
        bits.copy_from_slice(&digest.as_bytes()[..8]);
        let Some(block) = block_at(&unchanged, u64::from_le_bytes(bits) % total_bytes) else {
            continue;
        };
        if !same(source, stored, block)? {
            return Ok(Some(block));
        }
    }
    Ok(None)
}

/// Compares the last block that holds data and is said to be unchanged. A disk that was made smaller and
/// then as large as before has zeros at its end, and QEMU's bitmaps do not report them; whatever
/// was cut off, the last unchanged data lay in it. Answers with the block if it differs.
///
/// # Errors
/// Those of both devices, and of cancelling.
pub(crate) fn find_lost_end(
    source: &dyn BlockDevice,
    stored: &dyn BlockDevice,
    changed: &RangeSet,
    cancel: &CancelToken,
) -> Result<Option<ByteRange>> {
    let unchanged = changed.complement(stored.size_bytes().min(source.size_bytes()));
    for range in unchanged.as_slice().iter().rev() {
        let mut end = range.end();
        while end > range.offset {
            let window =
                ByteRange::from_bounds(end.saturating_sub(WINDOW_BYTES).max(range.offset), end);
            let mut last = None;
            for_each_extent(stored, window, cancel, |extent| {
                if !extent.kind.reads_as_zero() {
                    last = Some(extent.range);
                }
                Ok(())
            })?;
            if let Some(data) = last {
                let start = data.end().saturating_sub(SAMPLE_BYTES).max(data.offset);
                let block = ByteRange::from_bounds(start, data.end());
                return Ok((!same(source, stored, block)?).then_some(block));
            }
            end = window.offset;
        }
    }
    Ok(None)
}

/// The block around the n-th byte of a set, without what is not in the set.
fn block_at(set: &RangeSet, mut nth: u64) -> Option<ByteRange> {
    for range in set.iter() {
        if nth < range.length {
            let at = range.offset + nth;
            let block = ByteRange::new(at - at % SAMPLE_BYTES, SAMPLE_BYTES);
            return Some(block.intersect(&range));
        }
        nth -= range.length;
    }
    None
}

fn same(source: &dyn BlockDevice, stored: &dyn BlockDevice, block: ByteRange) -> Result<bool> {
    // A sample is short, so this does not fail.
    let length = usize::try_from(block.length).unwrap_or(0);
    let (mut one, mut other) = (vec![0; length], vec![0; length]);
    source.read_at(&mut one, block.offset)?;
    stored.read_at(&mut other, block.offset)?;
    Ok(one == other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::MemoryDevice;

    #[test]
    fn blocks_stay_inside_what_is_unchanged() {
        let set = RangeSet::from(vec![ByteRange::new(100, 50), ByteRange::new(200_000, 100_000)]);
        assert_eq!(block_at(&set, 0), Some(ByteRange::new(100, 50)));
        assert_eq!(block_at(&set, 49), Some(ByteRange::new(100, 50)));
        let next = block_at(&set, 50).unwrap();
        assert_eq!((next.offset, next.end()), (200_000, 4 << 16));
        assert_eq!(block_at(&set, 100_049).unwrap().end(), 300_000);
        assert_eq!(block_at(&set, 100_050), None);
    }

    #[test]
    fn an_end_that_was_cut_off_is_found_unless_it_is_known() {
        let mut bytes = vec![1; 400 << 10];
        bytes[300 << 10..].fill(0);
        let stored = MemoryDevice::from_bytes(bytes.clone());
        let find = |source: &[u8], changed: &RangeSet| {
            let source = MemoryDevice::from_bytes(source.to_vec());
            find_lost_end(&source, &stored, changed, &CancelToken::new()).unwrap()
        };
        assert_eq!(find(&bytes, &RangeSet::new()), None);
        bytes[290 << 10..].fill(0);
        assert_eq!(find(&bytes, &RangeSet::new()), Some(ByteRange::new(236 << 10, 64 << 10)));
        let told = RangeSet::from(vec![ByteRange::new(290 << 10, 10 << 10)]);
        assert_eq!(find(&bytes, &told), None);
        assert_eq!(find(&bytes, &RangeSet::full(400 << 10)), None);
    }

    #[test]
    fn a_missed_change_is_found_and_a_told_one_is_none() {
        let stored = MemoryDevice::new(256 << 10);
        let mut bytes = stored.to_bytes();
        bytes[200_000] = 1;
        let source = MemoryDevice::from_bytes(bytes);
        let find = |changed: &RangeSet, samples| {
            find_missed_change(&source, &stored, changed, samples, &CancelToken::new()).unwrap()
        };
        // Four blocks, 200 samples: missing one has a chance of 10^-25.
        assert_eq!(find(&RangeSet::new(), 200), Some(ByteRange::new(3 << 16, 1 << 16)));
        let told = RangeSet::from(vec![ByteRange::new(200_000, 1)]);
        assert_eq!(find(&told, 200), None);
        assert_eq!(find(&RangeSet::full(256 << 10), 200), None);
        assert_eq!(find(&RangeSet::new(), 0), None);
    }
}
