//! What changed on a disk since an id: shared by `GetVirtualDiskChanges` and the local query.

use crate::faults::ChangesFault;
use crate::state::State;
use crate::tracking::{DISABLED, INVALID_ID, MISSING};
use vmtide_block::{ByteRange, RangeSet};

/// One answer: the ranges as they are sent, and how much of the question they cover.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ChangesAnswer {
    pub(crate) ranges: Vec<ByteRange>,
    pub(crate) processed_bytes: u64,
    /// Whether the last length is left out.
    pub(crate) unequal: bool,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoChanges {
    /// There is no such file.
    NotFound,
    /// The range is not one of the disk.
    BadRange,
    /// A Win32 code or HRESULT.
    Code(u32),
}

/// `ERROR_SHARING_VIOLATION` as an HRESULT.
pub(crate) const SHARING_VIOLATION: u32 = 0x8007_0020;

impl State {
    /// The changes of the disk at `path` within `range`.
    pub(crate) fn changes(
        &mut self,
        path: &str,
        id: &str,
        range: ByteRange,
    ) -> Result<ChangesAnswer, NoChanges> {
        let exists = self.local(path).is_some_and(|local| local.is_file());
        if !exists {
            return Err(NoChanges::NotFound);
        }
        if self.faults.unopenable.contains(path) {
            return Err(NoChanges::Code(SHARING_VIOLATION));
        }
        match self.faults.changes {
            Some(ChangesFault::InvalidId) => return Err(NoChanges::Code(INVALID_ID)),
            Some(ChangesFault::Disabled) => return Err(NoChanges::Code(DISABLED)),
            Some(ChangesFault::Missing) => return Err(NoChanges::Code(MISSING)),
            Some(ChangesFault::Code(code)) => return Err(NoChanges::Code(code)),
            _ => {}
        }
        let Some(key) = self.disk_of(path) else {
            return Err(NoChanges::Code(DISABLED));
        };
        if self.user_of(key).is_some() && self.disks[&key].live == path {
            return Err(NoChanges::Code(SHARING_VIOLATION));
        }
        let size_bytes = self.size_at(key, path);
        if range.checked_end().is_none_or(|end| end > size_bytes) || range.is_empty() {
            return Err(NoChanges::BadRange);
        }
        let disk = &self.disks[&key];
        let until = disk.files.get(path).and_then(|node| node.sealed);
        let changed = disk.tracking.since(id, until).map_err(NoChanges::Code)?;
        Ok(self.answer(&changed.clamp(size_bytes), range, size_bytes))
    }

    /// The size of the disk as the file at `path` has it.
    fn size_at(&self, key: u64, path: &str) -> u64 {
        let frozen = self.snapshots.values().flat_map(|snapshot| snapshot.disks.values());
        let mut frozen = frozen.filter(|frozen| frozen.disk == key && frozen.path == path);
        let held = frozen.next().map(|frozen| frozen.content.size_bytes());
        held.unwrap_or_else(|| self.disks[&key].content.size_bytes())
    }

    /// Puts an answer together as the faults want it.
    fn answer(&self, changed: &RangeSet, range: ByteRange, size_bytes: u64) -> ChangesAnswer {
        let faults = &self.faults;
        let unit = faults.over_report_bytes.unwrap_or(1);
        let set = changed.within(range).align_outward(unit, size_bytes).within(range);
        let mut ranges: Vec<ByteRange> = set.iter().collect();
        let mut processed_bytes = range.length;
        let page = faults.changes_page.unwrap_or(4096).max(1);
        if ranges.len() > page {
            processed_bytes = ranges[page].offset - range.offset;
            ranges.truncate(page);
        }
        if faults.changes == Some(ChangesFault::NothingProcessed) {
            processed_bytes = 0;
            ranges.clear();
        }
        if faults.unsorted_ranges && ranges.len() > 1 {
            ranges.reverse();
            ranges.push(ranges[0]);
        }
        if faults.ranges_outside {
            ranges.push(ByteRange::new(size_bytes, 4096));
        }
        let unequal = faults.changes == Some(ChangesFault::UnequalLists);
        ChangesAnswer { ranges, processed_bytes, unequal }
    }

    /// The most recent id of the disk as the file at `path` knows it.
    pub(crate) fn most_recent_id(&self, path: &str) -> Option<String> {
        let disk = self.disk_of(path).and_then(|key| self.disks.get(&key))?;
        if !disk.tracking.enabled {
            return None;
        }
        let sealed = disk.files.get(path).and_then(|node| node.sealed);
        let epoch = sealed.unwrap_or_else(|| disk.tracking.current());
        let shown = if self.faults.most_recent_differs { epoch + 7 } else { epoch };
        Some(disk.tracking.id(shown))
    }
}
