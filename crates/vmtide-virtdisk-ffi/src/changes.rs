//! The pages of `QueryChangesVirtualDisk`, and everything that can be wrong with them.
//!
//! The function fills an array with ranges changed since an id. When the array is full it still *succeeds*, and
//! `ProcessedLength` says for how much of the range asked for the array speaks. A caller that asks once loses
//! the rest silently, so the pages are read to the end here. What an answer may look like, and what is made of it:
//!
//! | answer | what is done |
//! |---|---|
//! | an error | handed on; each class means that the disk is read in full |
//! | 0 bytes processed | an error: asking again would never end |
//! | fewer bytes processed than asked | the rest is asked for |
//! | more bytes processed than asked | as many as asked |
//! | more ranges than the array holds | an error: memory behind the array may have been written |
//! | a full array | believed up to the end of its last range only, which costs one call and can lose nothing |
//! | ranges unsorted, overlapping, empty, past the range asked for or past the disk | sorted, merged, cut |
//! | a full array, all before the range asked for | an error: nothing was learned |
//!
//! Making the answer larger than the truth is safe for a backup, making it smaller never is; so every repair
//! here goes outward, and every doubt is [`ErrorKind::TrackingLost`].

use crate::{ErrorKind, Result, TrackingId, VirtdiskError};
use vmtide_block::{ByteRange, RangeSet};

/// How many ranges one call may answer with: 96 KiB of memory. A million ranges take 245 calls.
pub const PAGE_RANGES: usize = 4096;
/// The most calls for one disk. A disk of 64 TiB in which every second block of 64 KiB changed takes 131,072; more
/// means answers in steps so small that the disk is read sooner than they are.
const MAX_CALLS: u64 = 1 << 20;

/// `QUERY_CHANGES_VIRTUAL_DISK_RANGE`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RawRange {
    /// The first byte of the virtual disk.
    pub byte_offset: u64,
    /// The number of bytes.
    pub byte_length: u64,
    /// Not used.
    pub reserved: u64,
}

/// What a call said besides the ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawAnswer {
    /// How many elements of the array were filled, as the call says.
    pub range_count: u32,
    /// `ProcessedLength`, in bytes.
    pub processed_bytes: u64,
}

/// A disk that can be asked what changed: `QueryChangesVirtualDisk` once.
pub trait ChangeQuery {
    /// The path, for errors.
    fn path(&self) -> &str;

    /// Fills `ranges` with what changed since `id` within `asked`.
    ///
    /// # Errors
    /// What Windows returns.
    fn query(
        &self,
        id: &TrackingId,
        asked: ByteRange,
        ranges: &mut [RawRange],
    ) -> Result<RawAnswer>;
}

/// What one call told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangesPage {
    /// Changed ranges: sorted, merged, inside the part that the page speaks for.
    pub ranges: RangeSet,
    /// How many bytes of the range asked for the page speaks for, from its beginning; 0 only where nothing was
    /// asked.
    pub processed_bytes: u64,
}

/// One page: what changed since `id` at the beginning of `asked`, which is cut at the disk's end.
///
/// # Errors
/// What Windows returns, and [`ErrorKind::TrackingLost`] for an answer that cannot be used.
pub fn read_page(
    disk: &impl ChangeQuery,
    id: &TrackingId,
    asked: ByteRange,
    virtual_size_bytes: u64,
) -> Result<ChangesPage> {
    read_page_into(disk, id, asked, virtual_size_bytes, &mut new_array(PAGE_RANGES))
}

/// All that changed since `id` within `asked`, page after page, in order; ranges that touch across pages are
/// handed over in pieces.
///
/// # Errors
/// As [`read_page`], and the errors of `visit`.
pub fn for_each_change<E: From<VirtdiskError>>(
    disk: &impl ChangeQuery,
    id: &TrackingId,
    asked: ByteRange,
    virtual_size_bytes: u64,
    visit: impl FnMut(ByteRange) -> Result<(), E>,
) -> Result<(), E> {
    within_calls(MAX_CALLS, disk, id, (asked, virtual_size_bytes), visit)
}

fn within_calls<E: From<VirtdiskError>>(
    max_calls: u64,
    disk: &impl ChangeQuery,
    id: &TrackingId,
    (asked, virtual_size_bytes): (ByteRange, u64),
    mut visit: impl FnMut(ByteRange) -> Result<(), E>,
) -> Result<(), E> {
    let asked = asked.intersect(&ByteRange::new(0, virtual_size_bytes));
    let mut array = new_array(PAGE_RANGES);
    let mut at = asked.offset;
    let mut calls = 0;
    while at < asked.end() {
        calls += 1;
        if calls > max_calls {
            let problem = format!("{max_calls} calls and only at byte {at} of {}", asked.end());
            return Err(unusable(disk, problem).into());
        }
        let rest = ByteRange::from_bounds(at, asked.end());
        let page = read_page_into(disk, id, rest, virtual_size_bytes, &mut array)?;
        page.ranges.iter().try_for_each(&mut visit)?;
        at += page.processed_bytes;
    }
    Ok(())
}

fn new_array(ranges: usize) -> Vec<RawRange> {
    vec![RawRange::default(); ranges]
}

fn unusable(disk: &impl ChangeQuery, problem: String) -> VirtdiskError {
    VirtdiskError::Answer {
        operation: "query changes of",
        path: disk.path().to_owned(),
        problem: format!("{problem}; read the disk in full"),
        kind: ErrorKind::TrackingLost,
    }
}

fn read_page_into(
    disk: &impl ChangeQuery,
    id: &TrackingId,
    asked: ByteRange,
    virtual_size_bytes: u64,
    array: &mut [RawRange],
) -> Result<ChangesPage> {
    let asked = asked.intersect(&ByteRange::new(0, virtual_size_bytes));
    if asked.is_empty() {
        return Ok(ChangesPage { ranges: RangeSet::new(), processed_bytes: 0 });
    }
    let capacity = array.len();
    let answer = disk.query(id, asked, array)?;
    let filled =
        usize::try_from(answer.range_count).ok().and_then(|count| array.get(..count)).ok_or_else(
            || unusable(disk, format!("{} ranges in an array of {capacity}", answer.range_count)),
        )?;
    if answer.processed_bytes == 0 {
        return Err(unusable(disk, format!("0 of {} bytes processed", asked.length)));
    }
    let mut processed_bytes = answer.processed_bytes.min(asked.length);
    if filled.len() == capacity {
        let told = told_by_full_array(filled, asked);
        processed_bytes = processed_bytes.min(told);
        if processed_bytes == 0 {
            let problem =
                format!("{capacity} ranges, none of them in the range asked for, {asked}");
            return Err(unusable(disk, problem));
        }
    }
    let window = ByteRange::new(asked.offset, processed_bytes);
    let ranges = filled
        .iter()
        .map(|raw| ByteRange::new(raw.byte_offset, raw.byte_length).intersect(&window))
        .collect();
    Ok(ChangesPage { ranges, processed_bytes })
}

/// For how many bytes of `asked` a full array speaks by its last range, where its ranges are in order.
fn told_by_full_array(filled: &[RawRange], asked: ByteRange) -> u64 {
    let sorted = filled.is_sorted_by_key(|raw| raw.byte_offset);
    let end = filled
        .iter()
        .map(|raw| raw.byte_offset.saturating_add(raw.byte_length))
        .max()
        .unwrap_or_default();
    if sorted { end.saturating_sub(asked.offset) } else { asked.length }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const BLOCK: u64 = 65536;

    /// Spoils an answer to the range asked for.
    type Fault = fn(&mut RawAnswer, &mut [RawRange], ByteRange);

    /// A disk whose changes are known, that answers as the documentation says, or with a fault.
    struct Fake {
        changed: Vec<ByteRange>,
        /// How many ranges of the array it uses before it says "full".
        uses: usize,
        fault: Fault,
        calls: Cell<u64>,
    }

    impl Fake {
        fn new(changed: impl IntoIterator<Item = ByteRange>) -> Self {
            Self {
                changed: changed.into_iter().collect(),
                uses: usize::MAX,
                fault: |_, _, _| {},
                calls: Cell::new(0),
            }
        }

        /// Every second block of a disk of so many blocks.
        fn every_second(blocks: u64) -> Self {
            Self::new((0..blocks / 2).map(|n| ByteRange::new(2 * n * BLOCK, BLOCK)))
        }
    }

    impl ChangeQuery for Fake {
        fn path(&self) -> &str {
            "fake"
        }

        fn query(
            &self,
            _: &TrackingId,
            asked: ByteRange,
            ranges: &mut [RawRange],
        ) -> Result<RawAnswer> {
            self.calls.set(self.calls.get() + 1);
            let capacity = self.uses.min(ranges.len());
            let mut hits =
                self.changed.iter().map(|r| r.intersect(&asked)).filter(|r| !r.is_empty());
            let mut count = 0;
            let mut end = asked.offset;
            for (slot, hit) in ranges.iter_mut().take(capacity).zip(&mut hits) {
                *slot = RawRange { byte_offset: hit.offset, byte_length: hit.length, reserved: 0 };
                end = hit.end();
                count += 1;
            }
            if hits.next().is_none() {
                end = asked.end();
            }
            let mut answer = RawAnswer { range_count: count, processed_bytes: end - asked.offset };
            (self.fault)(&mut answer, ranges, asked);
            Ok(answer)
        }
    }

    fn id() -> TrackingId {
        TrackingId::new("rctX:1", "fake").unwrap()
    }

    fn all(disk: &Fake, size: u64) -> Result<RangeSet> {
        let mut out = RangeSet::new();
        for_each_change(disk, &id(), ByteRange::new(0, size), size, |range| {
            out.insert(range);
            Ok::<_, VirtdiskError>(())
        })?;
        Ok(out)
    }

    fn truth(disk: &Fake) -> RangeSet {
        disk.changed.iter().copied().collect()
    }

    #[test]
    fn arrays_that_fill_are_paged_to_the_end() {
        for blocks in [2, 8191, 8192, 8193, 30_000] {
            let disk = Fake::every_second(blocks);
            assert_eq!(all(&disk, blocks * BLOCK).unwrap(), truth(&disk), "{blocks}");
            assert_eq!(
                disk.calls.get(),
                (blocks / 2).div_ceil(4096).max(1) + u64::from(blocks / 2 % 4096 == 0),
                "{blocks}"
            );
        }
    }

    /// An implementation that uses less of the array than there is, and says how far it came.
    #[test]
    fn short_answers_are_continued() {
        for uses in [1, 3, 100] {
            let mut disk = Fake::every_second(1000);
            disk.uses = uses;
            assert_eq!(all(&disk, 1000 * BLOCK).unwrap(), truth(&disk), "{uses}");
        }
        let mut disk = Fake::every_second(64);
        disk.fault = |answer, _, asked| {
            answer.processed_bytes = answer.processed_bytes.min(asked.length.div_ceil(2));
        };
        assert_eq!(all(&disk, 64 * BLOCK).unwrap(), truth(&disk));
    }

    /// The worst trap: the array is full, and the call says that it speaks for everything.
    #[test]
    fn a_full_array_that_claims_everything_loses_nothing() {
        let mut disk = Fake::every_second(20_000);
        disk.fault = |answer, _, asked| answer.processed_bytes = asked.length;
        assert_eq!(all(&disk, 20_000 * BLOCK).unwrap(), truth(&disk));
    }

    #[test]
    fn answers_that_cannot_be_used_lose_the_tracking() {
        let faults: [(&str, Fault); 4] = [
            ("processed nothing", |answer, _, _| answer.processed_bytes = 0),
            ("more than the array", |answer, ranges, _| {
                answer.range_count = u32::try_from(ranges.len()).unwrap() + 1;
            }),
            ("as many as a number holds", |answer, _, _| answer.range_count = u32::MAX),
            ("full of what was not asked", |answer, ranges, _| {
                ranges.fill(RawRange::default());
                answer.range_count = u32::try_from(ranges.len()).unwrap();
            }),
        ];
        for (name, fault) in faults {
            let mut disk = Fake::every_second(10);
            disk.fault = fault;
            let error = all(&disk, 10 * BLOCK).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TrackingLost, "{name}");
            assert!(error.to_string().ends_with("read the disk in full"), "{error}");
        }
    }

    #[test]
    fn answers_in_tiny_steps_end() {
        let mut disk = Fake::new([]);
        disk.fault = |answer, _, _| answer.processed_bytes = 1;
        let whole = (ByteRange::new(0, 1 << 40), 1 << 40);
        let ended = within_calls(50, &disk, &id(), whole, |_| Ok::<_, VirtdiskError>(()));
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::TrackingLost);
        assert_eq!(disk.calls.get(), 50);
    }

    #[test]
    fn ranges_are_sorted_merged_and_cut() {
        let size = 10 * BLOCK;
        let mut disk = Fake::new([]);
        disk.fault = |answer, ranges, asked| {
            let told = [
                (8 * BLOCK, BLOCK),
                (3 * BLOCK, 0),
                (5 * BLOCK, 2 * BLOCK),
                (6 * BLOCK, BLOCK),
                (0, BLOCK),
                (9 * BLOCK, u64::MAX),
                (20 * BLOCK, BLOCK),
                (u64::MAX, u64::MAX),
            ];
            for (slot, (byte_offset, byte_length)) in ranges.iter_mut().zip(told) {
                *slot = RawRange { byte_offset, byte_length, reserved: 9 };
            }
            answer.range_count = 8;
            answer.processed_bytes = asked.length.saturating_add(1 << 40);
        };
        let expected = [(0, BLOCK), (5 * BLOCK, 2 * BLOCK), (8 * BLOCK, 2 * BLOCK)];
        let expected: RangeSet = expected.map(|(o, l)| ByteRange::new(o, l)).into_iter().collect();
        assert_eq!(all(&disk, size).unwrap(), expected);
        let part = ByteRange::new(BLOCK, 5 * BLOCK);
        let page = read_page(&disk, &id(), part, size).unwrap();
        assert_eq!(page.processed_bytes, part.length);
        assert_eq!(page.ranges.as_slice(), [ByteRange::new(5 * BLOCK, BLOCK)]);
    }

    #[test]
    fn nothing_is_asked_beyond_the_disk() {
        let disk = Fake::every_second(4);
        for asked in
            [ByteRange::new(0, 0), ByteRange::new(4 * BLOCK, 9), ByteRange::new(u64::MAX, 1)]
        {
            let page = read_page(&disk, &id(), asked, 4 * BLOCK).unwrap();
            assert_eq!((page.processed_bytes, page.ranges.is_empty()), (0, true));
        }
        assert_eq!(disk.calls.get(), 0);
        let page = read_page(&disk, &id(), ByteRange::new(BLOCK, u64::MAX), 4 * BLOCK).unwrap();
        assert_eq!(page.processed_bytes, 3 * BLOCK);
    }

    #[test]
    fn the_layout_is_that_of_the_interface() {
        assert_eq!(size_of::<RawRange>(), 24);
    }
}
