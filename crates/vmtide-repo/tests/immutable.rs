//! Restore points that nobody can remove: what each needs is kept until its time, with few requests.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test: what fails here fails the test")]

use crate::common;

use common::{Disk, commit, fast_options, init_options};
use jiff::{SignedDuration, Timestamp};
use std::sync::Arc;
use vmtide_block::{CancelToken, Progress};
use vmtide_repo::{
    BackupOptions, ChangedRanges, DiskPlan, FaultyStore, Immutability, Level, LocalStore,
    MemoryStore, ObjectStore, PointDraft, RepoError, Repository, RestorePoint, RetentionMode,
    TrackingRecord,
};

fn bytes(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    (0..length).map(|_| next()).collect()
}

fn back_up(
    repository: &Repository,
    content: &[u8],
    base: Option<&RestorePoint>,
    hours: i64,
) -> Result<RestorePoint, RepoError> {
    let duration = SignedDuration::from_hours(hours);
    let immutability = Immutability::new(RetentionMode::Compliance, duration).unwrap();
    let options = BackupOptions { immutability: Some(immutability), ..fast_options() };
    let session = repository.begin_backup(&options)?;
    let plan = DiskPlan {
        id: "d".into(),
        base: base.and_then(|point| point.disk_record("d")),
        changed: ChangedRanges::Everything,
    };
    let disk = Disk::new(content.to_vec());
    let stored = session.store_disk(&disk, &plan, &Progress::new(), &CancelToken::new())?;
    session.commit(PointDraft {
        vm: "vm".into(),
        level: Level::Full,
        parent: base.map(|point| point.id),
        consistency: "crash".into(),
        tags: Default::default(),
        host: "host".into(),
        source: "test".into(),
        started: Timestamp::now(),
        config: serde_json::Value::Null,
        warnings: Vec::new(),
        disks: vec![vmtide_repo::DiskDraft {
            stored,
            tracking: TrackingRecord::default(),
            changed_bytes: None,
        }],
    })
}

/// That what the point needs is kept until then at least: all of its disk is in all packs here.
fn must_be_kept(store: &MemoryStore, point: &RestorePoint) {
    let until = point.immutable.unwrap().until;
    let needed = |name: &String| {
        let id = name.rsplit('/').next().unwrap_or_default();
        ["packs/", "keys/", "vmtide.repo"].iter().any(|prefix| name.starts_with(prefix))
            || id == point.id.to_string()
            || point.disks.iter().flat_map(|disk| &disk.map).any(|map| id == map.to_string())
    };
    let names: Vec<_> = store.names().into_iter().filter(needed).collect();
    assert!(names.len() > 5, "{names:?}");
    for name in names {
        let kept = store.retained_until(&name);
        assert!(kept >= Some(until), "{name} is kept until {kept:?}, not {until}");
    }
}

#[test]
fn all_that_a_point_needs_is_kept_and_extended_only_when_needed() {
    let store = MemoryStore::new();
    let counting = FaultyStore::new(Arc::new(store.clone()));
    let password = vmtide_repo::Password::new(common::PASSWORD);
    let repository =
        Repository::init(Arc::new(counting.clone()), &init_options(true), Some(&password)).unwrap();
    let mut content = bytes(3 << 20, 1);
    let first = back_up(&repository, &content, None, 24 * 30).unwrap();
    let until = first.immutable.unwrap().until;
    assert!(until.duration_since(Timestamp::now()) >= SignedDuration::from_hours(24 * 30));
    must_be_kept(&store, &first);

    // In the same period: nothing but what is new.
    content[1000] ^= 1;
    let before = counting.counts().changes;
    let second = back_up(&repository, &content, Some(&first), 24 * 30).unwrap();
    let changes = counting.counts().changes - before;
    assert!(changes <= 8, "{changes} changes of the store for one changed byte");
    must_be_kept(&store, &second);

    // For longer: all that is taken over is extended, and what is only found by its content.
    let third = back_up(&repository, &content, Some(&second), 24 * 90).unwrap();
    assert!(third.immutable.unwrap().until > until);
    must_be_kept(&store, &third);
    let fourth = back_up(&repository, &content, None, 24 * 365).unwrap();
    must_be_kept(&store, &fourth);

    let report = repository.forget(&[first.id]).unwrap();
    assert!(report.forgotten.is_empty(), "{report:?}");
    assert_eq!(report.locked.len(), 1, "{report:?}");
    let read = repository.points().unwrap().points;
    assert_eq!(read.len(), 4);
    assert_eq!(read.iter().find(|point| point.id == first.id).unwrap().immutable, first.immutable);
}

#[test]
fn a_directory_cannot_and_says_so_before_anything_is_promised() {
    let directory = tempfile::tempdir().unwrap();
    let store: Arc<dyn ObjectStore> =
        Arc::new(LocalStore::create(directory.path().join("r")).unwrap());
    let repository = common::repository(&store, false);
    let error = back_up(&repository, &bytes(1 << 20, 2), None, 24).unwrap_err();
    assert!(error.to_string().contains("Object Lock"), "{error}");
    assert!(repository.points().unwrap().points.is_empty());
    let session = repository.begin_backup(&fast_options()).unwrap();
    assert_eq!(commit(session, Vec::new(), Level::Full).unwrap().immutable, None);
}
