//! The store that fails on purpose fails as it says, and leaves behind what a crash leaves.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test: what fails here fails the test"
)]

use crate::common;

use std::fs;
use std::sync::Arc;
use vmtide_repo::{
    Corruption, Fault, FaultyStore, LocalStore, MemoryStore, ObjectStore, RepoError, Result, Step,
    read_small,
};

/// Five changes, as a job makes them.
fn job(store: &dyn ObjectStore) -> Result<()> {
    store.put("packs/aa/1", &[1; 1000])?;
    store.put("packs/bb/2", &[2; 1000])?;
    store.put("maps/3", b"map")?;
    store.put("points/4", b"point")?;
    store.remove("packs/aa/1")
}

fn errno(error: &RepoError) -> Option<i32> {
    match error {
        RepoError::Io { source, .. } => source.raw_os_error(),
        _ => None,
    }
}

#[test]
fn a_crash_at_each_change_leaves_exactly_those_before() {
    let all = ["packs/aa/1", "packs/bb/2", "maps/3", "points/4"];
    for change in 0..5 {
        let inner = MemoryStore::new();
        let store = FaultyStore::crashing_at(Arc::new(inner.clone()), change);
        assert!(job(&store).is_err());
        assert!(store.has_crashed());
        let mut expected = all[..usize::try_from(change).unwrap()].to_vec();
        expected.sort_unstable();
        assert_eq!(inner.names(), expected);
        for dead in [
            store.put("points/later", b"").unwrap_err(),
            store.remove("packs/bb/2").unwrap_err(),
            store.open("packs/bb/2").map(drop).unwrap_err(),
            store.list("packs/", &mut |_| Ok(())).unwrap_err(),
            store.remove_unfinished().unwrap_err(),
        ] {
            assert!(matches!(dead, RepoError::Io { .. }), "{dead}");
        }
        assert_eq!(inner.names(), expected);
    }
    let store = FaultyStore::crashing_at(Arc::new(MemoryStore::new()), 5);
    job(&store).unwrap();
    assert_eq!((store.counts().changes, store.counts().writes), (5, 4));
}

#[test]
fn a_crash_leaves_unfinished_files_which_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let local = LocalStore::create(directory.path()).unwrap();
    let store = FaultyStore::crashing_at(Arc::new(local.clone()), 1);
    let mut waiting = store.create("packs/cc/9").unwrap();
    waiting.write(&vec![9; 5_000_000]).unwrap();
    assert!(job(&store).is_err());
    drop(waiting);
    let left = fs::read_dir(directory.path().join("tmp")).unwrap().count();
    assert_eq!(left, 2);
    common::make_older(&directory.path().join("tmp"));
    assert!(local.remove_unfinished().unwrap() > 0);
    let left = fs::read_dir(directory.path().join("tmp")).unwrap().count();
    assert_eq!(left, 0);
}

#[test]
fn a_full_disk_takes_nothing_more_but_gives_room() {
    let inner = MemoryStore::new();
    let store = FaultyStore::new(Arc::new(inner.clone()));
    store.plan(Step::Write, 1, Fault::NoSpace);
    let error = job(&store).unwrap_err();
    assert_eq!(errno(&error), Some(28), "{error}");
    assert_eq!(inner.names(), ["packs/aa/1"]);
    assert_eq!(errno(&store.put("x", b"").unwrap_err()), Some(28));
    store.remove("packs/aa/1").unwrap();
    assert!(inner.names().is_empty());
}

#[test]
fn one_step_can_fail_without_effect_or_after_it() {
    let inner = MemoryStore::new();
    let store = FaultyStore::new(Arc::new(inner.clone()));
    store.plan(Step::Change, 0, Fault::Io);
    store.plan(Step::Change, 1, Fault::LostAnswer);
    store.plan(Step::Read, 0, Fault::Io);
    assert_eq!(errno(&store.put("a", b"a").unwrap_err()), Some(5));
    assert!(inner.names().is_empty());
    store.put("a", b"a").unwrap_err();
    assert_eq!(inner.names(), ["a"]);
    assert_eq!(errno(&read_small(&store, "a", 9).unwrap_err()), Some(5));
    assert_eq!(read_small(&store, "a", 9).unwrap(), b"a");
}

#[test]
fn damage_shows_in_whatever_part_is_read() {
    let inner = MemoryStore::new();
    inner.put("maps/m", &[0; 100]).unwrap();
    let store = FaultyStore::new(Arc::new(inner));
    store.corrupt("maps/m", Corruption::FlipBit { offset: 50, bit: 3 });
    let reader = store.open("maps/m").unwrap();
    for (offset, length, expected) in
        [(0, 50, None), (0, 51, Some(50)), (45, 20, Some(5)), (51, 49, None)]
    {
        let mut part = vec![0; length];
        reader.read_at(&mut part, offset).unwrap();
        let found = part.iter().position(|byte| *byte != 0);
        assert_eq!(found, expected);
        assert!(found.is_none_or(|at| part[at] == 8));
    }
    store.corrupt("maps/m", Corruption::Truncate { length_bytes: 60 });
    let reader = store.open("maps/m").unwrap();
    assert_eq!(reader.length_bytes(), 60);
    reader.read_at(&mut [0; 10], 50).unwrap();
    assert!(reader.read_at(&mut [0; 10], 51).unwrap_err().is_damage());
    store.corrupt("maps/m", Corruption::Missing);
    assert!(matches!(store.open("maps/m"), Err(RepoError::NotFound { .. })));
}
