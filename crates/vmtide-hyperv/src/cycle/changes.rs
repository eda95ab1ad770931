//! Asking change tracking, page by page, and believing only an answer that keeps its own rules.

use crate::{ChangesError, HostFiles};
use vmtide_block::{ByteRange, CancelToken, RangeSet};
use vmtide_hypervisor::{FullReason, Result};

/// The most pages of one answer. A page is as much as the host's array holds or the way to it carries; a disk of
/// 64 TiB in slices of 1 GiB has 65,536. A host that needs more answers in doubt, instead of for ever.
const MAX_PAGES: usize = 1 << 20;

/// The smallest range, in bytes, that is asked for where answers to larger ones do not fit: as many ranges as 64 KiB can
/// hold fit into any answer.
const MIN_SLICE_BYTES: u64 = 64 * 1024;

/// The most ranges that are kept: 16 MiB of memory. Beyond, neighbours are read together.
const MAX_RANGES: usize = 1 << 20;

/// What changed on the disk at `path`, of `size_bytes`, since `tracking_id` was sealed.
///
/// The inner error is the reason to read the disk in full: whatever the host says instead of a whole, consistent
/// answer is one, and none is an empty answer.
///
/// # Errors
/// Only a cancelled job.
pub(crate) fn changed_since(
    files: &dyn HostFiles,
    path: &str,
    tracking_id: &str,
    size_bytes: u64,
    cancel: &CancelToken,
) -> Result<Result<RangeSet, FullReason>> {
    let mut changed = RangeSet::new();
    let mut offset = 0;
    let mut slice_bytes = u64::MAX;
    for _ in 0..MAX_PAGES {
        if offset >= size_bytes {
            return Ok(Ok(changed));
        }
        cancel.check()?;
        let asked = ByteRange::new(offset, slice_bytes.min(size_bytes - offset));
        let page = match files.changes(path, tracking_id, asked) {
            Ok(page) => page,
            Err(ChangesError::TooLarge(_)) if asked.length > MIN_SLICE_BYTES => {
                slice_bytes = (asked.length / 2).max(MIN_SLICE_BYTES);
                continue;
            }
            Err(error) => return Ok(Err(reason_of(error))),
        };
        let doubtful = |what: String| Ok(Err(FullReason::AnswerDoubtful(what)));
        if page.processed_bytes == 0 {
            return doubtful(format!("it made no progress at {offset}"));
        }
        if page.processed_bytes > asked.length {
            return doubtful(format!("{} bytes were processed of {asked}", page.processed_bytes));
        }
        if let Some(range) = page.ranges.iter().find(|range| {
            range.offset < asked.offset || range.checked_end().is_none_or(|end| end > size_bytes)
        }) {
            return doubtful(format!("{range} is outside of what was asked for, {asked}"));
        }
        changed = merged(changed, page.ranges, size_bytes);
        offset += page.processed_bytes;
    }
    if offset >= size_bytes {
        return Ok(Ok(changed));
    }
    Ok(Err(FullReason::AnswerDoubtful(format!("it is longer than {MAX_PAGES} pages"))))
}

/// Both sets. Pages come in order, so that adding to the end is the normal case and costs no copy.
fn merged(mut all: RangeSet, page: RangeSet, size_bytes: u64) -> RangeSet {
    for range in page.iter() {
        all.insert(range);
    }
    if all.as_slice().len() > MAX_RANGES { all.bounded(MAX_RANGES / 2, size_bytes) } else { all }
}

fn reason_of(error: ChangesError) -> FullReason {
    match error {
        ChangesError::UnknownId(_) | ChangesError::NotTracked(_) => {
            FullReason::TrackingLost(error.to_string())
        }
        ChangesError::TooLarge(_) | ChangesError::Failed(_) => {
            FullReason::AnswerDoubtful(error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ChangePage, FileEntry, FrozenFile, NewDisk};
    use parking_lot::Mutex;
    use std::sync::Arc;
    use vmtide_block::WritableBlockDevice;
    use vmtide_hypervisor::HypervisorError;

    type Answer = std::result::Result<ChangePage, ChangesError>;

    /// Answers only questions for changes, by a function of the range.
    struct Script<F>(F, Mutex<usize>);

    impl<F: Fn(ByteRange) -> Answer + Send + Sync> HostFiles for Script<F> {
        fn changes(&self, _path: &str, _id: &str, range: ByteRange) -> Answer {
            *self.1.lock() += 1;
            (self.0)(range)
        }
        fn open_disk(&self, _path: &str) -> Result<FrozenFile> {
            unused()
        }
        fn read_file(&self, _path: &str, _limit: u64) -> Result<Option<Vec<u8>>> {
            unused()
        }
        fn list(&self, _directory: &str) -> Result<Option<Vec<FileEntry>>> {
            unused()
        }
        fn free_bytes(&self, _directory: &str) -> Result<Option<u64>> {
            unused()
        }
        fn create_directory(&self, _path: &str) -> Result<()> {
            unused()
        }
        fn write_file(&self, _path: &str, _content: &[u8]) -> Result<()> {
            unused()
        }
        fn create_disk(
            &self,
            _path: &str,
            _disk: &NewDisk,
        ) -> Result<Arc<dyn WritableBlockDevice>> {
            unused()
        }
        fn open_disk_writable(&self, _path: &str) -> Result<Arc<dyn WritableBlockDevice>> {
            unused()
        }
        fn remove_file(&self, _path: &str) -> Result<()> {
            unused()
        }
    }

    fn unused<T>() -> Result<T> {
        Err(HypervisorError::failed("use a script", "it answers only changes"))
    }

    fn ask(
        answer: impl Fn(ByteRange) -> Answer + Send + Sync,
    ) -> (Result<RangeSet, FullReason>, usize) {
        let script = Script(answer, Mutex::new(0));
        let cancel = CancelToken::new();
        let result = changed_since(&script, "x", "id", 10_000, &cancel).unwrap();
        let asked = *script.1.lock();
        (result, asked)
    }

    fn page(ranges: &[(u64, u64)], processed_bytes: u64) -> Answer {
        let ranges = ranges.iter().map(|(offset, length)| ByteRange::new(*offset, *length));
        Ok(ChangePage { ranges: ranges.collect(), processed_bytes })
    }

    #[test]
    fn pages_are_asked_for_until_the_end_of_the_disk() {
        // As a host does whose array holds one range.
        let (result, asked) = ask(|range| {
            let at = range.offset.next_multiple_of(1000);
            if at >= 9000 {
                page(&[], range.length)
            } else {
                page(&[(at, 10)], at + 10 - range.offset)
            }
        });
        let result = result.unwrap();
        assert_eq!((result.as_slice().len(), result.total_bytes(), asked), (9, 90, 10));
        assert!(ask(|range| page(&[], range.length)).0.unwrap().is_empty());
    }

    #[test]
    fn answers_that_do_not_fit_are_asked_for_in_smaller_pieces() {
        let script = Script(
            |range: ByteRange| {
                if range.length > 100_000 {
                    Err(ChangesError::TooLarge("x".into()))
                } else {
                    page(&[(range.offset, 1)], range.length)
                }
            },
            Mutex::new(0),
        );
        let result =
            changed_since(&script, "x", "id", 1_000_000, &CancelToken::new()).unwrap().unwrap();
        assert!(result.contains_range(&ByteRange::new(0, 1)) && result.as_slice().len() > 9);
        let never = ask(|_| Err(ChangesError::TooLarge("x".into()))).0;
        assert!(matches!(never, Err(FullReason::AnswerDoubtful(_))), "{never:?}");
    }

    #[test]
    fn answers_that_break_the_rules_are_never_believed() {
        let no_progress = |range: ByteRange| {
            if range.offset == 0 { page(&[(0, 10)], 5000) } else { page(&[], 0) }
        };
        for (name, (result, _)) in [
            ("no progress", ask(no_progress)),
            ("too much progress", ask(|range| page(&[], range.length + 1))),
            ("past the end", ask(|range| page(&[(9_999, 2)], range.length))),
            ("overflow", ask(|range| page(&[(1 << 63, 10)], range.length))),
            (
                "before",
                ask(
                    |range| if range.offset == 0 { page(&[], 5000) } else { page(&[(0, 1)], 5000) },
                ),
            ),
            ("failure", ask(|_| Err(ChangesError::Failed("0x5".into())))),
        ] {
            assert!(matches!(result, Err(FullReason::AnswerDoubtful(_))), "{name}: {result:?}");
        }
        let lost = ask(|_| Err(ChangesError::UnknownId("0xC03A0029".into()))).0;
        assert!(matches!(lost, Err(FullReason::TrackingLost(_))), "{lost:?}");
    }

    #[test]
    fn an_answer_that_never_ends_is_ended_and_a_cancelled_job_stops() {
        let script = Script(|_| page(&[], 1), Mutex::new(0));
        let cancel = CancelToken::new();
        let result = changed_since(&script, "x", "id", u64::MAX / 2, &cancel).unwrap();
        assert!(matches!(result, Err(FullReason::AnswerDoubtful(_))), "{result:?}");
        cancel.cancel();
        assert!(changed_since(&script, "x", "id", 10, &cancel).is_err());
    }
}
