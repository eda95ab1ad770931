//! Holds: what is held stays, whoever forgets and prunes meanwhile; and a credential without the
//! right to remove.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests: a failed unwrap is a failed test, and sizes are small"
)]

use crate::common;

use common::{Disk, PASSWORD, init_options, reopen, repository, store_point};
use jiff::{SignedDuration, Timestamp};
use std::sync::Arc;
use vmtide_block::{BlockDevice, CancelToken, Progress};
use vmtide_repo::{
    ChangedRanges, CopyOf, DenyStore, DiskPlan, FaultyStore, HoldOptions, Level, MemoryStore,
    ObjectId, ObjectStore, Origin, Password, PointDraft, PruneOptions, ReadData, RepoError,
    Repository, RestorePoint, Retention, RetentionMode, VerifyOptions,
};

fn content(seed: u8) -> Vec<u8> {
    (0..600_000u32).map(|at| ((at >> 13) as u8).wrapping_mul(31) ^ seed).collect()
}

fn full_plan() -> DiskPlan<'static> {
    DiskPlan { id: "disk0".into(), base: None, changed: ChangedRanges::Everything }
}

fn add_point(repository: &Repository, seed: u8) -> RestorePoint {
    store_point(repository, &Disk::new(content(seed)), &full_plan(), Level::Full).unwrap()
}

fn prune(repository: &Repository) -> Result<(), RepoError> {
    let options = PruneOptions { repack_below_percent: 100, ..PruneOptions::default() };
    repository.prune(&options, &Progress::new(), &CancelToken::new()).map(|_| ())
}

fn assert_restores(repository: &Repository, point: &RestorePoint, seed: u8) {
    let listed = repository.points().unwrap().points;
    let found = listed.iter().find(|found| found.id == point.id).expect("the point is listed");
    assert_eq!(found, point);
    let mut back = vec![0; content(seed).len()];
    repository.open_disk(found, "disk0").unwrap().read_at(&mut back, 0).unwrap();
    assert!(back == content(seed), "point {} changed", point.id);
    let options = VerifyOptions { points: Vec::new(), read: ReadData::All, seed: None };
    let report = repository.verify(&options, &Progress::new(), &CancelToken::new()).unwrap();
    assert_eq!(report.damage, []);
}

fn reason(text: &str) -> HoldOptions {
    HoldOptions { reason: text.into(), ..HoldOptions::default() }
}

#[test]
fn a_held_point_is_passed_over_with_the_reason_until_it_is_released() {
    let memory = MemoryStore::new();
    let store: Arc<dyn ObjectStore> = Arc::new(memory.clone());
    let repository = repository(&store, true);
    let (first, second) = (add_point(&repository, 0), add_point(&repository, 7));
    let hold = repository.hold(first.id, &reason("audit")).unwrap();
    assert_eq!((hold.point, hold.vm.as_str(), hold.reason.as_str()), (first.id, "vm", "audit"));
    let report = repository.forget(&[first.id, second.id]).unwrap();
    assert_eq!(report.forgotten, [second.id]);
    assert_eq!(report.held, [(first.id, hold.clone())]);
    assert_eq!(repository.points().unwrap().holds, std::slice::from_ref(&hold));
    prune(&repository).unwrap();
    assert_restores(&repository, &first, 0);
    // Two holds: the second still holds when the first is released.
    let other = repository.hold(first.id, &reason("")).unwrap();
    assert!(repository.release_hold(hold.id).unwrap());
    assert_eq!(repository.forget(&[first.id]).unwrap().forgotten, []);
    assert!(repository.release_hold(other.id).unwrap());
    assert_eq!(repository.forget(&[first.id]).unwrap().forgotten, [first.id]);
    prune(&repository).unwrap();
    let left = memory.names();
    assert!(
        !left.iter().any(|name| name.starts_with("packs/") || name.starts_with("hold")),
        "{left:?}"
    );
    let error = repository.release_hold(hold.id).unwrap_err();
    assert!(matches!(error, RepoError::NotFound { .. }), "{error}");
}

#[test]
fn a_hold_stands_in_for_a_point_that_was_removed_while_it_was_put() {
    let memory = MemoryStore::new();
    let store: Arc<dyn ObjectStore> = Arc::new(memory.clone());
    let repository = repository(&store, true);
    let (first, second) = (add_point(&repository, 0), add_point(&repository, 7));
    let hold = repository.hold(first.id, &reason("audit")).unwrap();
    // Whoever looked for holds just before removes the point now.
    store.remove(&format!("points/{}", first.id)).unwrap();
    prune(&repository).unwrap();
    assert_restores(&repository, &first, 0);
    assert_restores(&repository, &second, 7);
    assert_eq!(repository.forget(&[first.id]).unwrap().forgotten, []);
    // It can be held once more, and the last hold to go takes the point with it.
    let other = repository.hold(first.id, &reason("more")).unwrap();
    repository.release_hold(hold.id).unwrap();
    prune(&repository).unwrap();
    assert_restores(&repository, &first, 0);
    repository.release_hold(other.id).unwrap();
    assert_eq!(repository.points().unwrap().points, [second]);
}

#[test]
fn holding_what_is_not_there_leaves_nothing() {
    let memory = MemoryStore::new();
    let store: Arc<dyn ObjectStore> = Arc::new(memory.clone());
    let repository = repository(&store, true);
    let point = add_point(&repository, 0);
    repository.forget(&[point.id]).unwrap();
    let error = repository.hold(point.id, &reason("late")).unwrap_err();
    assert!(matches!(error, RepoError::NotFound { .. }), "{error}");
    for bad in [reason("two\nlines"), reason(&"x".repeat(1001))] {
        assert!(matches!(repository.hold(point.id, &bad), Err(RepoError::Invalid(_))));
    }
    let past = Timestamp::now() - SignedDuration::from_secs(1);
    let over = HoldOptions { until: Some(past), ..HoldOptions::default() };
    assert!(matches!(repository.hold(point.id, &over), Err(RepoError::Invalid(_))));
    assert!(!memory.names().iter().any(|name| name.starts_with("holds/")));
}

#[test]
fn a_hold_ends_by_itself_and_is_tidied_up() {
    let memory = MemoryStore::new();
    let store: Arc<dyn ObjectStore> = Arc::new(memory.clone());
    let repository = repository(&store, false);
    let point = add_point(&repository, 0);
    let soon = Timestamp::now() + SignedDuration::from_secs(3);
    let options = HoldOptions { until: Some(soon), ..HoldOptions::default() };
    repository.hold(point.id, &options).unwrap();
    assert_eq!(repository.forget(&[point.id]).unwrap().held.len(), 1);
    while Timestamp::now() <= soon {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(repository.points().unwrap().holds, []);
    assert_eq!(repository.holds().unwrap().holds.len(), 1, "it is listed, as over");
    assert_eq!(repository.forget(&[point.id]).unwrap().forgotten, [point.id]);
    let kept = memory.names().iter().any(|name| name.starts_with("holds/"));
    assert!(kept, "should this clock be wrong, the hold is in force again");
}

#[test]
fn junk_in_the_place_of_a_release_releases_nothing_and_stops_nothing() {
    let memory = MemoryStore::new();
    let store: Arc<dyn ObjectStore> = Arc::new(memory.clone());
    let repository = repository(&store, true);
    let (point, other) = (add_point(&repository, 0), add_point(&repository, 7));
    let hold = repository.hold(point.id, &reason("audit")).unwrap();
    memory.replace(&format!("released/{}", hold.id), b"junk");
    let list = repository.holds().unwrap();
    assert_eq!((list.holds.len(), list.unreadable.len()), (1, 0));
    let report = repository.forget(&[point.id, other.id]).unwrap();
    assert_eq!((report.held.len(), report.forgotten), (1, vec![other.id]));
    prune(&repository).unwrap();
    let deny: Arc<dyn ObjectStore> = Arc::new(DenyStore::new(Arc::clone(&store)));
    let error = reopen(&deny).unwrap().release_hold(hold.id).unwrap_err();
    assert!(matches!(error, RepoError::Denied { .. }), "{error}");
    assert!(repository.release_hold(hold.id).unwrap());
    assert_eq!(repository.holds().unwrap().holds, []);
}

#[test]
fn two_that_release_a_hold_write_the_same_bytes() {
    let memory = MemoryStore::new();
    let store: Arc<dyn ObjectStore> = Arc::new(memory.clone());
    let repository = repository(&store, true);
    let point = add_point(&repository, 0);
    let hold = repository.hold(point.id, &reason("")).unwrap();
    let name = format!("released/{}", hold.id);
    let release = || {
        let copy = memory.snapshot();
        let deny: Arc<dyn ObjectStore> = Arc::new(DenyStore::new(Arc::new(copy.clone())));
        assert!(!reopen(&deny).unwrap().release_hold(hold.id).unwrap());
        copy.bytes(&name).unwrap().to_vec()
    };
    let first = release();
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert!(first == release(), "one key and nonce sealed two texts");
}

#[test]
fn a_hold_tells_its_point_where_the_object_of_the_point_is_damaged() {
    let memory = MemoryStore::new();
    let store: Arc<dyn ObjectStore> = Arc::new(memory.clone());
    let repository = repository(&store, true);
    let point = add_point(&repository, 0);
    let hold = repository.hold(point.id, &reason("audit")).unwrap();
    let name = format!("points/{}", point.id);
    let mut bytes = memory.bytes(&name).unwrap().to_vec();
    bytes[70] ^= 1;
    memory.replace(&name, &bytes);
    let mut list = reopen(&store).unwrap().points().unwrap();
    assert_eq!((&list.points[..], list.unreadable.len()), (std::slice::from_ref(&point), 1));
    assert!(list.first_lost().is_none());
    let repository = reopen(&store).unwrap();
    prune(&repository).unwrap();
    let mut back = vec![0; content(0).len()];
    repository.open_disk(&list.points[0], "disk0").unwrap().read_at(&mut back, 0).unwrap();
    assert!(back == content(0));
    repository.release_hold(hold.id).unwrap();
    assert!(reopen(&store).unwrap().points().unwrap().first_lost().is_some());
}

#[test]
fn what_was_forgotten_before_an_error_is_told() {
    let memory = MemoryStore::new();
    let store: Arc<dyn ObjectStore> = Arc::new(memory.clone());
    let repository = repository(&store, true);
    let (first, second) = (add_point(&repository, 0), add_point(&repository, 7));
    let faulty: Arc<dyn ObjectStore> = Arc::new(FaultyStore::crashing_at(store, 1));
    let report = reopen(&faulty).unwrap().forget(&[first.id, second.id]).unwrap();
    assert_eq!(report.forgotten, [first.id]);
    assert!(report.failed.is_some());
    assert_eq!(repository.points().unwrap().points, [second]);
}

#[test]
fn a_damaged_hold_stops_forget_and_prune_and_can_be_removed() {
    let memory = MemoryStore::new();
    let store: Arc<dyn ObjectStore> = Arc::new(memory.clone());
    let repository = repository(&store, true);
    let (point, other) = (add_point(&repository, 0), add_point(&repository, 7));
    let hold = repository.hold(point.id, &reason("audit")).unwrap();
    let name = format!("holds/{}", hold.id);
    let good = memory.bytes(&name).unwrap();
    for at in 0..good.len() {
        let mut flipped = good.to_vec();
        flipped[at] ^= 1 << (at % 8);
        memory.replace(&name, &flipped);
        let list = repository.points().unwrap();
        assert_eq!((list.points.len(), list.holds.len()), (2, 0), "byte {at}");
        assert_eq!(list.unreadable_holds[0].0, name, "byte {at}");
    }
    let error = repository.forget(&[other.id]).unwrap_err();
    assert!(matches!(error, RepoError::Damaged { .. } | RepoError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains(&name), "{error}");
    assert!(prune(&repository).is_err());
    let options = VerifyOptions { points: Vec::new(), read: ReadData::None, seed: None };
    let report = repository.verify(&options, &Progress::new(), &CancelToken::new()).unwrap();
    assert!(report.damage.iter().any(|damage| damage.object == name), "{:?}", report.damage);
    repository.release_hold(hold.id).unwrap();
    assert_eq!(repository.forget(&[other.id]).unwrap().forgotten, [other.id]);
    prune(&repository).unwrap();
    assert_restores(&repository, &point, 0);
}

#[test]
fn hold_forget_and_release_may_die_anywhere() {
    let base = MemoryStore::new();
    let shared: Arc<dyn ObjectStore> = Arc::new(base.clone());
    let first = repository(&shared, true);
    let points = [add_point(&first, 0), add_point(&first, 7)];
    for step in 0.. {
        let copy: Arc<dyn ObjectStore> = Arc::new(base.snapshot());
        let faulty: Arc<dyn ObjectStore> = Arc::new(FaultyStore::crashing_at(copy.clone(), step));
        let job = |repository: &Repository| -> Result<(), RepoError> {
            let hold = repository.hold(points[0].id, &reason("audit"))?;
            repository.forget(&[points[0].id])?;
            repository.release_hold(hold.id)?;
            repository.hold(points[1].id, &reason("audit"))?;
            repository.forget(&[points[0].id, points[1].id])?;
            Ok(())
        };
        let outcome = reopen(&faulty).and_then(|repository| job(&repository));
        let after = reopen(&copy).unwrap();
        let list = after.points().unwrap();
        assert!(list.unreadable.is_empty() && list.unreadable_holds.is_empty());
        assert_restores(&after, &points[1], 7);
        prune(&after).unwrap();
        assert_restores(&after, &points[1], 7);
        if outcome.is_ok() {
            assert!(step >= 4, "only {step} changes of the store were tried");
            assert_eq!(list.holds.len(), 1);
            return;
        }
    }
}

#[test]
fn a_credential_that_may_not_remove_does_all_but_forget_prune_and_removing_keys() {
    let memory = MemoryStore::new();
    let full: Arc<dyn ObjectStore> = Arc::new(memory.clone());
    let deny: Arc<dyn ObjectStore> = Arc::new(DenyStore::new(Arc::clone(&full)));
    let password = Password::new(PASSWORD);
    Repository::init(Arc::clone(&deny), &init_options(true), Some(&password)).unwrap();
    let writer = reopen(&deny).unwrap();
    // Enough backups for the index to be compacted.
    let points: Vec<_> = (0..36).map(|seed| add_point(&writer, seed)).collect();
    assert_restores(&writer, &points[3], 3);
    let kdf = init_options(true).kdf;
    let key = writer.add_key("second", &Password::new("two"), &kdf).unwrap();

    let denied = |error: RepoError, words: &[&str]| {
        assert!(matches!(error, RepoError::Denied { .. }), "{error}");
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)) && !text.contains('\n'), "{text}");
    };
    let before = memory.names();
    denied(writer.forget(&[points[0].id]).unwrap_err(), &["forget", "may not remove"]);
    assert_eq!(writer.points().unwrap().points.len(), 36);
    denied(writer.remove_key(key.id).unwrap_err(), &["key"]);
    assert_eq!(writer.keys().unwrap().keys.len(), 2);

    // Holds work; a release is written beside what cannot be removed.
    let hold = writer.hold(points[0].id, &reason("audit")).unwrap();
    let admin = reopen(&full).unwrap();
    assert_eq!(admin.forget(&[points[0].id]).unwrap().held.len(), 1);
    assert!(!writer.release_hold(hold.id).unwrap());
    assert!(!writer.release_hold(hold.id).unwrap(), "twice is no error");
    assert_eq!(writer.holds().unwrap().holds, []);
    assert!(before.iter().all(|name| memory.bytes(name).is_some()), "nothing was removed");
    assert_eq!(admin.forget(&[points[0].id]).unwrap().forgotten, [points[0].id]);
    let left = memory.names();
    assert!(
        !left.iter().any(|name| name.starts_with("hold") || name.starts_with("releas")),
        "{left:?}"
    );
    prune(&admin).unwrap();
    assert_restores(&writer, &points[35], 35);
}

#[test]
fn prune_without_the_right_to_remove_is_denied_and_loses_nothing() {
    let full: Arc<dyn ObjectStore> = Arc::new(MemoryStore::new());
    let admin = repository(&full, true);
    let (first, second) = (add_point(&admin, 0), add_point(&admin, 7));
    admin.forget(&[first.id]).unwrap();
    let deny: Arc<dyn ObjectStore> = Arc::new(DenyStore::new(Arc::clone(&full)));
    let writer = reopen(&deny).unwrap();
    let error = prune(&writer).unwrap_err();
    assert!(matches!(error, RepoError::Denied { .. }), "{error}");
    assert_restores(&writer, &second, 7);
    let third = add_point(&writer, 9);
    prune(&admin).unwrap();
    assert_restores(&admin, &second, 7);
    assert_restores(&admin, &third, 9);
}

#[test]
fn what_the_store_keeps_is_passed_over_and_said() {
    let store: Arc<dyn ObjectStore> = Arc::new(MemoryStore::new());
    let repository = repository(&store, true);
    let (first, second) = (add_point(&repository, 0), add_point(&repository, 7));
    let hold = repository.hold(second.id, &reason("audit")).unwrap();
    let until = Timestamp::now() + SignedDuration::from_hours(1);
    let kept = Retention { mode: RetentionMode::Compliance, until };
    store.retain(&format!("points/{}", first.id), &kept).unwrap();
    store.retain(&format!("holds/{}", hold.id), &kept).unwrap();
    let report = repository.forget(&[first.id]).unwrap();
    assert_eq!((report.forgotten.len(), report.locked.len()), (0, 1));
    assert!(report.locked[0].1.contains(&format!("{until:.0}")[..10]), "{}", report.locked[0].1);
    assert!(!repository.release_hold(hold.id).unwrap());
    assert_eq!(repository.forget(&[second.id]).unwrap().forgotten, [second.id]);
    assert_eq!(repository.points().unwrap().points, [first]);
}

#[test]
fn a_point_is_later_than_a_parent_that_only_a_hold_tells() {
    let store: Arc<dyn ObjectStore> = Arc::new(MemoryStore::new());
    let repository = repository(&store, true);
    let draft = |parent| PointDraft {
        vm: "vm".into(),
        level: Level::Full,
        parent,
        consistency: "crash".into(),
        tags: std::collections::BTreeMap::new(),
        host: String::new(),
        source: String::new(),
        started: Timestamp::now(),
        config: serde_json::Value::Null,
        warnings: Vec::new(),
        disks: Vec::new(),
    };
    let begin = || repository.begin_backup(&common::fast_options()).unwrap();
    // Of a host whose clock was ahead of ours.
    let origin = Origin { repository: ObjectId([1; 16]), point: ObjectId([2; 16]) };
    let time = "2099-01-01T00:00:00Z".parse().unwrap();
    let parent = begin().commit_copy(draft(None), CopyOf { origin, time }).unwrap();
    repository.hold(parent.id, &reason("audit")).unwrap();
    store.remove(&format!("points/{}", parent.id)).unwrap();
    let next = begin().commit(draft(Some(parent.id))).unwrap();
    assert!(next.time > parent.time, "{} after {}", next.time, parent.time);
}
