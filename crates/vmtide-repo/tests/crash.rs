//! A crash at every moment: before each change that a job makes to the store, the job dies. Points
//! reported done stay whole, nothing half-done is visible, and the next run needs no repair.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests: a failed unwrap is a failed test, and sizes are small"
)]

use crate::common;

use common::{Disk, PASSWORD, init_options, reopen, repository, store_point};
use jiff::SignedDuration;
use std::sync::Arc;
use vmtide_block::{BlockDevice, CancelToken, Progress};
use vmtide_repo::{
    ChangedRanges, DiskPlan, FaultyStore, Level, MemoryStore, ObjectStore, Password, PruneOptions,
    ReadData, Repository, RestorePoint, VerifyOptions,
};

fn content(seed: u8) -> Vec<u8> {
    (0..1_200_000u32).map(|at| ((at >> 13) as u8).wrapping_mul(31) ^ seed).collect()
}

fn full_plan() -> DiskPlan<'static> {
    DiskPlan { id: "disk0".into(), base: None, changed: ChangedRanges::Everything }
}

fn assert_whole(repository: &Repository, points: &[(RestorePoint, Vec<u8>)]) {
    let list = repository.points().unwrap();
    assert!(list.unreadable.is_empty(), "{:?}", list.unreadable);
    for (point, content) in points {
        let mut back = vec![0; content.len()];
        repository.open_disk(point, "disk0").unwrap().read_at(&mut back, 0).unwrap();
        assert!(back == *content, "point {} changed", point.id);
    }
    let options = VerifyOptions { points: Vec::new(), read: ReadData::All, seed: None };
    let report = repository.verify(&options, &Progress::new(), &CancelToken::new()).unwrap();
    assert_eq!(report.damage, []);
}

/// Two points that share half of their content, the second in need of what the first stored.
fn two_points(store: &Arc<dyn ObjectStore>) -> Vec<(RestorePoint, Vec<u8>)> {
    let repository = repository(store, true);
    let first = content(0);
    let mut second = first.clone();
    second[300_000..900_000].copy_from_slice(&content(7)[300_000..900_000]);
    let mut points = Vec::new();
    for bytes in [first, second] {
        let point =
            store_point(&repository, &Disk::new(bytes.clone()), &full_plan(), Level::Full).unwrap();
        points.push((point, bytes));
    }
    points
}

/// Runs `job` on copies of a repository, dying before its first, second, … change of the store,
/// until it comes through; checks the points that must be whole after each death.
fn at_every_step(
    survivors: impl Fn(&[(RestorePoint, Vec<u8>)]) -> Vec<(RestorePoint, Vec<u8>)>,
    job: impl Fn(&Repository, &[(RestorePoint, Vec<u8>)]) -> Result<(), vmtide_repo::RepoError>,
) -> usize {
    let base = MemoryStore::new();
    let shared: Arc<dyn ObjectStore> = Arc::new(base.clone());
    let points = two_points(&shared);
    for step in 0.. {
        let memory = base.snapshot();
        let copy: Arc<dyn ObjectStore> = Arc::new(memory.clone());
        let faulty: Arc<dyn ObjectStore> = Arc::new(FaultyStore::crashing_at(copy.clone(), step));
        let outcome = reopen(&faulty).and_then(|repository| job(&repository, &points));
        let after = reopen(&copy).unwrap();
        let survivors = survivors(&points);
        assert_whole(&after, &survivors);
        // Nobody here can tell that the process is gone: its lease has to expire.
        memory.advance(SignedDuration::from_hours(2));
        // The next runs go on without repair: a backup, a prune, and all is still whole.
        let bytes = content(9);
        let next =
            store_point(&after, &Disk::new(bytes.clone()), &full_plan(), Level::Full).unwrap();
        after.prune(&PruneOptions::default(), &Progress::new(), &CancelToken::new()).unwrap();
        let mut all = survivors;
        all.push((next, bytes));
        assert_whole(&after, &all);
        if outcome.is_ok() {
            return step as usize;
        }
    }
    unreachable!("the loop ends when the job comes through")
}

#[test]
fn a_backup_may_die_anywhere() {
    let steps = at_every_step(<[_]>::to_vec, |repository, points| {
        let mut bytes = points[1].1.clone();
        bytes[..400_000].fill(0x55);
        bytes[800_000..].copy_from_slice(&content(3)[800_000..]);
        let plan = DiskPlan {
            id: "disk0".into(),
            base: Some(&points[1].0.disks[0]),
            changed: ChangedRanges::Everything,
        };
        store_point(repository, &Disk::new(bytes), &plan, Level::Incremental).map(|_| ())
    });
    assert!(steps >= 4, "only {steps} changes of the store were tried");
}

#[test]
fn forget_and_prune_may_die_anywhere() {
    let steps = at_every_step(
        |points| points[1..].to_vec(),
        |repository, points| {
            repository.forget(&[points[0].0.id])?;
            let options = PruneOptions { repack_below_percent: 100, ..PruneOptions::default() };
            repository.prune(&options, &Progress::new(), &CancelToken::new()).map(|_| ())
        },
    );
    assert!(steps >= 6, "only {steps} changes of the store were tried");
}

#[test]
fn init_may_die_anywhere() {
    for step in 0.. {
        let store: Arc<dyn ObjectStore> = Arc::new(MemoryStore::new());
        let faulty: Arc<dyn ObjectStore> = Arc::new(FaultyStore::crashing_at(store.clone(), step));
        let password = Password::new(PASSWORD);
        let done = Repository::init(faulty, &init_options(true), Some(&password)).is_ok();
        match reopen(&store) {
            Ok(repository) => assert_whole(&repository, &[]),
            // Not there at all: a second try must work.
            Err(_) => {
                assert!(!done);
                Repository::init(store.clone(), &init_options(true), Some(&password)).unwrap();
                assert_whole(&reopen(&store).unwrap(), &[]);
            }
        }
        if done {
            assert!(step >= 2);
            break;
        }
    }
}
