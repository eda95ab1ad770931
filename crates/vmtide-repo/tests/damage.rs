//! Damage is found and never restored: every byte of every object is flipped in turn, and objects
//! are cut and removed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests: a failed unwrap is a failed test, and sizes are small"
)]

use crate::common;

use common::every_kind;
use common::{Disk, commit, fast_options, reopen, repository};
use std::sync::Arc;
use vmtide_block::{BlockDevice, CancelToken, Progress};
use vmtide_repo::{
    ChangedRanges, DiskPlan, Level, MemoryStore, ObjectStore, PruneOptions, ReadData, RepoError,
    VerifyOptions, check_integrity,
};

/// A repository of one small point with data, zeros and repetition; and the disk in it.
fn small_world(encrypted: bool) -> (Arc<MemoryStore>, Vec<u8>) {
    let memory = Arc::new(MemoryStore::new());
    let store: Arc<dyn ObjectStore> = memory.clone();
    let repository = repository(&store, encrypted);
    let mut content = vec![0u8; 5 * 65_536 + 100];
    content[..65_536].fill(1);
    content[2 * 65_536..3 * 65_536].fill(2);
    content[5 * 65_536..].fill(3);
    let session = repository.begin_backup(&fast_options()).unwrap();
    let plan = DiskPlan { id: "disk0".into(), base: None, changed: ChangedRanges::Everything };
    let source = Disk::new(content.clone());
    let disk = session.store_disk(&source, &plan, &Progress::new(), &CancelToken::new()).unwrap();
    commit(session, vec![disk], Level::Full).unwrap();
    (memory, content)
}

/// Reads everything there is: either the true content or an error, never anything else. Answers
/// whether the damage was noticed by the restore, and whether verify found it.
fn restore_and_verify(store: &Arc<dyn ObjectStore>, content: &[u8]) -> (bool, bool) {
    let restored = || -> Result<(), RepoError> {
        let repository = reopen(store)?;
        let list = repository.points()?;
        if let Some((_, error)) = list.unreadable.into_iter().next() {
            return Err(error);
        }
        let Some(point) = list.points.first() else {
            return Err(RepoError::NotFound { what: "the point".into(), hint: String::new() });
        };
        let mut back = vec![0; content.len()];
        repository.open_disk(point, "disk0")?.read_at(&mut back, 0)?;
        assert!(back == content, "wrong bytes were restored without an error");
        Ok(())
    };
    let noticed = restored().is_err();
    // What cannot even be opened was found.
    let found = reopen(store).map_or(true, |repository| {
        let options = VerifyOptions { points: Vec::new(), read: ReadData::All, seed: None };
        repository
            .verify(&options, &Progress::new(), &CancelToken::new())
            .map_or(true, |report| !report.damage.is_empty())
    });
    (noticed, found)
}

/// Whether the check without a key finds anything.
fn found_without_key(store: &Arc<dyn ObjectStore>) -> bool {
    let report = check_integrity(store, &Progress::new(), &CancelToken::new());
    !report.unwrap().damage.is_empty()
}

fn flip_everything(encrypted: bool) {
    let (memory, content) = small_world(encrypted);
    let names = memory.names();
    for name in names.clone() {
        let original = memory.bytes(&name).unwrap();
        // Long objects are sampled; every structure is shorter than the step's first hundred.
        let positions = (0..original.len()).filter(|at| {
            original.len() < 2_000 || at % 97 == 0 || *at < 200 || *at + 700 > original.len()
        });
        for at in positions {
            let mut changed = original.to_vec();
            changed[at] ^= 1 << (at % 8);
            memory.replace(&name, &changed);
            let store: Arc<dyn ObjectStore> = memory.clone();
            let (noticed, found) = restore_and_verify(&store, &content);
            forget_traces(&memory, &names);
            // Neither the index nor a lease is needed for a restore.
            let needed = !name.starts_with("index/") && !name.starts_with("leases/");
            assert!(!needed || noticed, "{name}: a flip of byte {at} was not noticed");
            assert!(found, "{name}: verify did not find a flip of byte {at}");
            assert!(found_without_key(&store), "{name}: a flip of byte {at} passed without key");
        }
        memory.replace(&name, &original);
    }
    let store: Arc<dyn ObjectStore> = memory;
    assert_eq!(restore_and_verify(&store, &content), (false, false));
}

#[test]
fn a_flipped_bit_anywhere_is_noticed_with_encryption() {
    flip_everything(true);
}

#[test]
fn a_flipped_bit_anywhere_is_noticed_without_encryption() {
    flip_everything(false);
}

#[test]
fn cut_and_missing_objects_are_damage_and_name_themselves() {
    let (memory, content) = small_world(true);
    let store: Arc<dyn ObjectStore> = memory.clone();
    for name in memory.names() {
        if !["packs/", "maps/"].iter().any(|kind| name.starts_with(kind)) {
            continue;
        }
        let original = memory.bytes(&name).unwrap();
        for length in [0, 1, 63, 64, 100, original.len() / 2, original.len() - 1] {
            memory.replace(&name, &original[..length]);
            assert_eq!(
                restore_and_verify(&store, &content),
                (true, true),
                "{name} cut to {length}"
            );
        }
        store.remove(&name).unwrap();
        let repository = reopen(&store).unwrap();
        let point = repository.points().unwrap().points.remove(0);
        let mut back = vec![0; content.len()];
        let error = repository
            .open_disk(&point, "disk0")
            .map_err(vmtide_block::BlockError::from)
            .and_then(|disk| disk.read_at(&mut back, 0))
            .unwrap_err();
        assert!(error.to_string().contains(&name), "{error} should name {name}");
        // Prune must not take a hole for garbage around it.
        let outcome =
            repository.prune(&PruneOptions::default(), &Progress::new(), &CancelToken::new());
        assert!(matches!(outcome, Err(RepoError::Damaged { .. })), "{outcome:?}");
        memory.replace(&name, &original);
    }
    assert_eq!(restore_and_verify(&store, &content), (false, false));
}

#[test]
fn a_lost_index_costs_space_only_and_prune_makes_a_new_one() {
    let (memory, content) = small_world(true);
    let store: Arc<dyn ObjectStore> = memory.clone();
    for name in memory.names().into_iter().filter(|name| name.starts_with("index/")) {
        store.remove(&name).unwrap();
    }
    let repository = reopen(&store).unwrap();
    let source = Disk::new(content.clone());
    let plan = DiskPlan { id: "disk0".into(), base: None, changed: ChangedRanges::Everything };
    let again = common::store_point(&repository, &source, &plan, Level::Full).unwrap();
    assert!(again.disks[0].counts.new_bytes > 0, "nothing is known without an index");
    for name in memory.names().into_iter().filter(|name| name.starts_with("index/")) {
        store.remove(&name).unwrap();
    }
    repository.prune(&PruneOptions::default(), &Progress::new(), &CancelToken::new()).unwrap();
    let third = common::store_point(&repository, &source, &plan, Level::Full).unwrap();
    assert_eq!(third.disks[0].counts.new_bytes, 0, "prune rebuilt the index from the packs");
}

#[test]
fn a_key_of_another_repository_and_swapped_objects_do_not_open() {
    let (first, content) = small_world(true);
    let (second, _) = small_world(true);
    let of_kind = |memory: &MemoryStore, kind: &str| {
        memory.names().into_iter().find(|name| name.starts_with(kind)).unwrap()
    };
    for kind in ["packs/", "maps/", "points/"] {
        let (name, foreign) = (of_kind(&first, kind), of_kind(&second, kind));
        let original = first.bytes(&name).unwrap();
        first.replace(&name, &second.bytes(&foreign).unwrap());
        let store: Arc<dyn ObjectStore> = first.clone();
        assert_eq!(
            restore_and_verify(&store, &content),
            (true, true),
            "a foreign object as {name}"
        );
        first.replace(&name, &original);
    }
}

#[test]
fn a_repository_cannot_be_turned_into_an_unencrypted_one() {
    let (sealed, _) = small_world(true);
    let (clear, _) = small_world(false);
    sealed.replace("vmtide.repo", &clear.bytes("vmtide.repo").unwrap());
    let store: Arc<dyn ObjectStore> = sealed;
    assert!(matches!(reopen(&store), Err(RepoError::Damaged { .. })));
}

/// Opens everything there is: an error, or the true content and nothing else. Answers whether
/// anything but the full verification noticed.
fn all_points_or_error(store: &Arc<dyn ObjectStore>) -> bool {
    let read = || -> Result<(), RepoError> {
        let repository = reopen(store)?;
        let list = repository.points()?;
        if let Some((_, error)) = list.unreadable.into_iter().chain(list.unreadable_holds).next() {
            return Err(error);
        }
        let contents = every_kind::contents();
        if list.points.len() != contents.len() {
            return Err(RepoError::NotFound { what: "a point".into(), hint: String::new() });
        }
        for (point, content) in list.points.iter().zip(contents) {
            let mut back = vec![0; content.len()];
            repository.open_disk(point, "disk0")?.read_at(&mut back, 0)?;
            assert!(back == content, "wrong bytes were restored without an error");
        }
        Ok(())
    };
    read().is_err()
}

fn verify_finds(store: &Arc<dyn ObjectStore>) -> bool {
    reopen(store).map_or(true, |repository| {
        let options = VerifyOptions { points: Vec::new(), read: ReadData::All, seed: None };
        repository
            .verify(&options, &Progress::new(), &CancelToken::new())
            .map_or(true, |report| !report.damage.is_empty())
    })
}

#[test]
fn every_byte_of_every_kind_of_object_is_watched_over() {
    let memory = Arc::new(MemoryStore::new());
    let victim = every_kind::every_kind(&memory);
    let store: Arc<dyn ObjectStore> = memory.clone();
    let names = memory.names();
    for kind in every_kind::KINDS.iter().chain(&["released/"]) {
        assert!(names.iter().any(|name| name.starts_with(kind)), "no {kind} in {names:?}");
    }
    assert!(!all_points_or_error(&store) && !verify_finds(&store));
    // The pack that is on record already, and whose content was healed, is no news.
    for name in names.iter().filter(|name| **name != victim) {
        let original = memory.bytes(name).unwrap();
        let step = original.len().div_ceil(10).max(1);
        for at in (0..original.len()).step_by(step).chain([original.len() - 1]) {
            let mut changed = original.to_vec();
            changed[at] ^= 1 << (at % 8);
            memory.replace(name, &changed);
            all_points_or_error(&store);
            assert!(verify_finds(&store), "{name}: verify did not find a flip of byte {at}");
            assert!(found_without_key(&store), "{name}: a flip of byte {at} passed without key");
            forget_traces(&memory, &names);
        }
        for length in [0, original.len() - 1] {
            memory.replace(name, &original[..length]);
            all_points_or_error(&store);
            assert!(verify_finds(&store), "{name} cut to {length} bytes");
            forget_traces(&memory, &names);
        }
        memory.replace(name, &original);
    }
    assert!(!all_points_or_error(&store) && !verify_finds(&store));
}

/// Removes what looking wrote: leases, and damage put on record.
fn forget_traces(memory: &Arc<MemoryStore>, names: &[String]) {
    for name in memory.names() {
        if !names.contains(&name) {
            memory.remove(&name).unwrap();
        }
    }
}

#[test]
fn what_is_missing_of_what_a_point_needs_is_found() {
    let memory = Arc::new(MemoryStore::new());
    let victim = every_kind::every_kind(&memory);
    let store: Arc<dyn ObjectStore> = memory.clone();
    let needed = ["packs/", "maps/", "forward/", "healed/"];
    let names = memory.names();
    let mut missed = 0;
    for name in names.iter().filter(|name| **name != victim) {
        if !needed.iter().any(|kind| name.starts_with(kind)) {
            continue;
        }
        let original = memory.bytes(name).unwrap();
        store.remove(name).unwrap();
        // One forgotten point is still waiting for its removal: nobody misses what only it needs.
        let is_missed = all_points_or_error(&store);
        assert_eq!(verify_finds(&store), is_missed, "verify and {name}");
        missed += usize::from(is_missed);
        memory.replace(name, &original);
        // It is on record as damaged until somebody looks again, but there.
        assert!(!all_points_or_error(&store), "{name} is back");
        forget_traces(&memory, &names);
    }
    assert!(missed >= 8, "{missed} objects are needed");
}
