//! What is read of one disk: the hypervisor's answer, believed only where nothing speaks against
//! it. Any doubt means reading the disk in full, with the reason.

use crate::Result;
use crate::base::BaseChoice;
use vmtide_block::{BlockDevice, RangeSet};
use vmtide_hypervisor::{Changes, DiskId, FrozenDisk, FullReason};
use vmtide_repo::{DiskCounts, Level, Repository};

/// What is read of one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DiskChanges {
    /// All of it.
    Everything(FullReason),
    /// These ranges; the rest is as in the base.
    Ranges(RangeSet),
}

impl DiskChanges {
    /// The bytes of disk that storing it covers, in whole units of `unit_bytes`.
    pub fn bytes_to_look_at(&self, size_bytes: u64, unit_bytes: u64) -> u64 {
        match self {
            Self::Everything(_) => size_bytes,
            Self::Ranges(ranges) => ranges.align_outward(unit_bytes, size_bytes).total_bytes(),
        }
    }

    /// Why everything is read, where it is.
    pub fn full_reason(&self) -> Option<&FullReason> {
        match self {
            Self::Everything(reason) => Some(reason),
            Self::Ranges(_) => None,
        }
    }
}

/// Decides for one disk. The hypervisor has checked its own answer; this checks it once more
/// against what the repository knows, because an adapter's mistake here would be a silently
/// incomplete restore point.
pub(crate) fn decide(disk: &FrozenDisk, base: &BaseChoice) -> DiskChanges {
    let size_bytes = disk.device.size_bytes();
    let stored = base.stored_base(&disk.id);
    match (&disk.changes, stored) {
        (Changes::Everything(reason), _) => DiskChanges::Everything(explain(reason.clone(), base)),
        (Changes::Ranges(_), None) => {
            DiskChanges::Everything(explain(FullReason::FirstBackup, base))
        }
        (Changes::Ranges(_), Some(stored)) if stored.size_bytes != size_bytes => {
            DiskChanges::Everything(FullReason::Resized {
                from_bytes: stored.size_bytes,
                to_bytes: size_bytes,
            })
        }
        (Changes::Ranges(ranges), Some(_)) => {
            if let Some(doubt) = &base.doubt {
                return DiskChanges::Everything(FullReason::AnswerDoubtful(doubt.clone()));
            }
            if ranges.iter().any(|range| range.end() > size_bytes) {
                return DiskChanges::Everything(FullReason::AnswerDoubtful(format!(
                    "changes past the end of the disk of {size_bytes} bytes"
                )));
            }
            DiskChanges::Ranges(ranges.clone())
        }
    }
}

/// A hypervisor that gets no base cannot know whether that is because the user wants a full backup
/// or because there is none.
fn explain(reason: FullReason, base: &BaseChoice) -> FullReason {
    match reason {
        FullReason::FirstBackup if base.full_requested => FullReason::Requested,
        other => other,
    }
}

/// How much a differential's disk differs from the last full backup: what differed already at the
/// newest restore point, and what changed since. None where the level asks for no such figure or
/// the full backup does not have the disk.
///
/// Where the disk was read in full only the number of bytes that differ from the newest point is
/// known and not where they are, so the answer is then an upper bound.
///
/// # Errors
/// Those of reading disk maps.
pub(crate) fn bytes_since_full(
    repository: &Repository,
    base: &BaseChoice,
    disk: &DiskId,
    changes: &DiskChanges,
    counts: DiskCounts,
) -> Result<Option<u64>> {
    if base.level != Level::Differential {
        return Ok(None);
    }
    let full = base.parent.as_ref().and_then(|point| point.disk_record(base.id_in_base(disk)));
    let (Some(full), Some(newest)) = (full, base.stored_base(disk)) else {
        return Ok(None);
    };
    let before = repository.changed_between(full, newest)?;
    let bytes = match changes {
        DiskChanges::Ranges(ranges) => before.union(ranges).total_bytes(),
        DiskChanges::Everything(_) => before.total_bytes().saturating_add(counts.changed_bytes),
    };
    Ok(Some(bytes.min(counts.size_bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use vmtide_block::{ByteRange, MemoryDevice};
    use vmtide_hypervisor::TrackingId;
    use vmtide_repo::{DiskRecord, TrackingRecord};

    fn base_of(size_bytes: Option<u64>, full_requested: bool) -> BaseChoice {
        let newest = size_bytes.map(|size_bytes| {
            crate::points::tests::point_with(DiskRecord {
                id: "d0".into(),
                size_bytes,
                map: Vec::new(),
                counts: DiskCounts::default(),
                tracking: TrackingRecord::default(),
            })
        });
        BaseChoice {
            level: Level::Incremental,
            parent: None,
            newest,
            full_requested,
            notes: Vec::new(),
            doubt: None,
            moved: std::collections::BTreeMap::new(),
        }
    }

    fn disk_with(changes: Changes) -> FrozenDisk {
        FrozenDisk {
            id: DiskId("d0".into()),
            device: Arc::new(MemoryDevice::new(1000)),
            changes,
            tracking: Some(TrackingId("t".into())),
        }
    }

    #[test]
    fn only_an_answer_beyond_doubt_is_used() {
        let ranges = |end| Changes::Ranges(RangeSet::from(vec![ByteRange::new(0, end)]));
        let used = decide(&disk_with(ranges(1000)), &base_of(Some(1000), false));
        assert_eq!(used.full_reason(), None);
        assert_eq!(used.bytes_to_look_at(1000, 4096), 1000);

        let reason = |changes, base: &BaseChoice| match decide(&disk_with(changes), base) {
            DiskChanges::Everything(reason) => reason,
            DiskChanges::Ranges(ranges) => panic!("trusted {ranges:?}"),
        };
        assert!(matches!(
            reason(ranges(1001), &base_of(Some(1000), false)),
            FullReason::AnswerDoubtful(_)
        ));
        assert_eq!(
            reason(ranges(10), &base_of(Some(999), false)),
            FullReason::Resized { from_bytes: 999, to_bytes: 1000 }
        );
        let doubted = BaseChoice { doubt: Some("x".into()), ..base_of(Some(1000), false) };
        assert_eq!(reason(ranges(10), &doubted), FullReason::AnswerDoubtful("x".into()));
        assert_eq!(reason(ranges(10), &base_of(None, false)), FullReason::FirstBackup);
        assert_eq!(reason(ranges(10), &base_of(None, true)), FullReason::Requested);
        let lost = FullReason::TrackingLost("gone".into());
        let told = Changes::Everything(lost.clone());
        assert_eq!(reason(told, &base_of(Some(1000), false)), lost);
    }
}
