//! How a disk is sent: as what differs from its previous version, or whole, and why.

use crate::digests::DigestReader;
use crate::job::Level;
use crate::moments::MomentLog;
use crate::send::Selection;
use crate::stream::MomentId;
use std::path::PathBuf;
use vmtide_block::RangeSet;
use vmtide_hypervisor::{Changes, FullReason};

/// What is known of the changes of a disk since the newest moment that was kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Since {
    /// The platform tracks them.
    Ranges(RangeSet),
    /// Digests of that moment tell them, while the disk is read.
    Digests(PathBuf),
    /// They are not known.
    Unknown(Reason),
}

/// Why a disk is sent whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// For the job's report.
    pub text: String,
    /// Whether something was lost that should be there.
    pub is_loss: bool,
}

impl Reason {
    fn expected(text: impl Into<String>) -> Self {
        Self { text: text.into(), is_loss: false }
    }

    fn loss(text: impl Into<String>) -> Self {
        Self { text: text.into(), is_loss: true }
    }
}

/// What the platform's answer, or the digests, are worth. The platform was asked about the newest moment of
/// `log`; its answer is held against the log once more, because a mistake would be a backup that silently
/// lacks something.
pub fn since_newest(log: &MomentLog, disk: &str, size_bytes: u64, changes: &Changes) -> Since {
    let Some(newest) = log.newest() else {
        return Since::Unknown(Reason::expected("nothing was backed up from here before"));
    };
    let Some(record) = newest.disks.get(disk) else {
        return Since::Unknown(Reason::expected("the newest backup did not have it"));
    };
    match changes {
        Changes::Ranges(_) if record.size_bytes != size_bytes => Since::Unknown(Reason::loss(
            format!("its size was {} bytes and is {size_bytes}", record.size_bytes),
        )),
        Changes::Ranges(ranges) if ranges.iter().any(|range| range.end() > size_bytes) => {
            Since::Unknown(Reason::loss("change tracking names bytes past its end"))
        }
        Changes::Ranges(ranges) => Since::Ranges(ranges.clone()),
        Changes::Everything(FullReason::NoTracking(_) | FullReason::NoTrackingId)
            if record.digests && record.size_bytes == size_bytes =>
        {
            let path = log.digest_path(disk, &newest.id);
            match DigestReader::open(&path, size_bytes) {
                Some(_) => Since::Digests(path),
                None => Since::Unknown(Reason::loss("the digests of the previous backup are gone")),
            }
        }
        Changes::Everything(reason) => {
            Since::Unknown(Reason { text: reason.to_string(), is_loss: reason.is_loss() })
        }
    }
}

/// What the catalogue has of a disk's previous version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Previous {
    /// Nothing.
    None,
    /// A file that is not one of vmtide's.
    Foreign,
    /// The disk at this moment.
    Moment(MomentId),
}

/// What is sent, the moment it builds on, and why it is whole where it is not the job's level.
pub type Decision = (Selection, Option<MomentId>, Option<Reason>);

/// Decides.
pub fn decide(
    log: &MomentLog,
    level: Level,
    disk: &str,
    size_bytes: u64,
    previous: Previous,
    since: &Since,
) -> Decision {
    let whole = |reason| (Selection::Whole, None, reason);
    if level == Level::Full {
        return whole(None);
    }
    let base = match previous {
        Previous::Moment(base) => base,
        Previous::None => return whole(Some(Reason::expected("the previous job did not have it"))),
        Previous::Foreign => {
            return whole(Some(Reason::loss("its previous version is not one of vmtide's")));
        }
    };
    let changed = match log.changed_since(base, disk, size_bytes) {
        Ok(changed) => changed,
        Err(text) => return whole(Some(Reason::loss(text))),
    };
    match since {
        Since::Ranges(ranges) => (Selection::Ranges(changed.union(ranges)), Some(base), None),
        Since::Digests(_) => (Selection::Compared(changed), Some(base), None),
        Since::Unknown(reason) => whole(Some(reason.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moments::{DiskMoment, Moment};
    use std::collections::BTreeMap;
    use vmtide_block::ByteRange;
    use vmtide_hypervisor::JobId;

    fn log_with(directory: &std::path::Path, changes: &[Option<Vec<(u64, u64)>>]) -> MomentLog {
        let mut log = MomentLog::open(directory, "vm", "/vm", &JobId::random()).unwrap();
        for changed in changes {
            let disk = DiskMoment {
                size_bytes: 1000,
                tracking: Some("t".into()),
                digests: false,
                changed: changed.clone(),
            };
            log.append(Moment {
                id: MomentId::random().to_string(),
                job: "J".into(),
                level: 'F',
                time: 0,
                disks: BTreeMap::from([("d".into(), disk)]),
            })
            .unwrap();
        }
        log
    }

    fn ranges(offset: u64, length: u64) -> RangeSet {
        RangeSet::from(vec![ByteRange::new(offset, length)])
    }

    #[test]
    fn only_what_is_known_makes_a_delta() {
        let directory = tempfile::tempdir().unwrap();
        let log = log_with(directory.path(), &[None, Some(vec![(0, 10)])]);
        let newest = MomentId::parse(&log.newest().unwrap().id).unwrap();
        let since = since_newest(&log, "d", 1000, &Changes::Ranges(ranges(500, 1)));
        assert_eq!(since, Since::Ranges(ranges(500, 1)));
        let of = |level, previous, since: &Since| {
            let (selection, base, reason) = decide(&log, level, "d", 1000, previous, since);
            let sent = match selection {
                Selection::Ranges(ranges) => Some(ranges),
                _ => None,
            };
            (sent, base, reason.map(|reason| reason.is_loss))
        };
        let known = Previous::Moment(newest);
        assert_eq!(
            of(Level::Incremental, known, &since),
            (Some(ranges(500, 1)), Some(newest), None)
        );
        assert_eq!(of(Level::Full, known, &since), (None, None, None));
        assert_eq!(of(Level::Incremental, Previous::None, &since), (None, None, Some(false)));
        assert_eq!(of(Level::Incremental, Previous::Foreign, &since), (None, None, Some(true)));
        let unknown = Previous::Moment(MomentId::random());
        assert_eq!(of(Level::Differential, unknown, &since), (None, None, Some(true)));
        let lost = since_newest(
            &log,
            "d",
            1000,
            &Changes::Everything(FullReason::TrackingLost("x".into())),
        );
        assert_eq!(of(Level::Incremental, known, &lost), (None, None, Some(true)));
    }

    #[test]
    fn an_answer_that_cannot_be_true_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let log = log_with(directory.path(), &[None]);
        let is_loss = |size, changes| match since_newest(&log, "d", size, &changes) {
            Since::Unknown(reason) => reason.is_loss,
            other => panic!("{other:?}"),
        };
        assert!(is_loss(1000, Changes::Ranges(ranges(999, 2))));
        assert!(is_loss(999, Changes::Ranges(ranges(0, 1))));
        assert!(!is_loss(1000, Changes::Everything(FullReason::NoTracking("x".into()))));
    }
}
