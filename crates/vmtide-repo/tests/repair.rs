//! What `repair` makes right, and what `salvage` reads of what it cannot.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests: a failed unwrap is a failed test, and sizes are small"
)]

use crate::common;

use common::{Disk, reopen, repository, store_point};
use std::sync::Arc;
use vmtide_block::{BlockDevice, CancelToken, Progress};
use vmtide_repo::{
    ChangedRanges, DiskPlan, Level, MemoryStore, ObjectStore, PruneOptions, ReadData,
    RepairOptions, RepairReport, Repository, RestorePoint, VerifyOptions,
};

const MIB: usize = 1 << 20;

fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    let mut content = vec![0; bytes];
    hasher.finalize_xof().fill(&mut content);
    content
}

fn full(repository: &Repository, content: &[u8]) -> RestorePoint {
    let plan = DiskPlan { id: "disk0".into(), base: None, changed: ChangedRanges::Everything };
    store_point(repository, &Disk::new(content.to_vec()), &plan, Level::Full).unwrap()
}

fn repair(repository: &Repository, options: &RepairOptions<'_>) -> RepairReport {
    repository.repair(options, &Progress::new(), &CancelToken::new()).unwrap()
}

fn damage_after_reading(repository: &Repository) -> usize {
    let options = VerifyOptions { points: Vec::new(), read: ReadData::All, seed: None };
    repository.verify(&options, &Progress::new(), &CancelToken::new()).unwrap().damage.len()
}

fn new_world() -> (Arc<MemoryStore>, Arc<dyn ObjectStore>, Repository) {
    let memory = Arc::new(MemoryStore::new());
    let store: Arc<dyn ObjectStore> = memory.clone();
    let repository = repository(&store, true);
    (memory, store, repository)
}

fn names(memory: &MemoryStore, kind: &str) -> Vec<String> {
    memory.names().into_iter().filter(|name| name.starts_with(kind)).collect()
}

#[test]
fn an_index_that_is_gone_or_damaged_is_made_anew_from_the_packs() {
    let (memory, store, repository) = new_world();
    let content = noise(3 * MIB, 1);
    full(&repository, &content);
    for way in ["removed", "cut", "flipped"] {
        for name in names(&memory, "index/") {
            let bytes = memory.bytes(&name).unwrap();
            match way {
                "removed" => store.remove(&name).unwrap(),
                "cut" => memory.replace(&name, &bytes[..bytes.len() / 2]),
                _ => {
                    let mut bytes = bytes.to_vec();
                    bytes[100] ^= 1;
                    memory.replace(&name, &bytes);
                }
            }
        }
        let repository = reopen(&store).unwrap();
        let would =
            repair(&repository, &RepairOptions { dry_run: true, ..RepairOptions::default() });
        assert!(would.index_rebuilt.is_some(), "{way}");
        let before = memory.names();
        let done = repair(&repository, &RepairOptions::default());
        assert!(done.index_rebuilt.is_some() && done.packs_indexed > 0, "{way}: {done:?}");
        assert!(memory.names().len() == before.len() + 1, "{way}: nothing else is written");
        assert_eq!(done.damage, [], "{way}");
        let again = repair(&repository, &RepairOptions::default());
        assert_eq!(again.index_rebuilt, None, "{way}");
        let point = full(&reopen(&store).unwrap(), &content);
        assert_eq!(point.disks[0].counts.new_bytes, 0, "{way}: all is known again");
        let repository = reopen(&store).unwrap();
        repository.prune(&PruneOptions::default(), &Progress::new(), &CancelToken::new()).unwrap();
        assert_eq!(damage_after_reading(&repository), 0, "{way}");
    }
}

#[test]
fn a_second_repository_with_other_keys_heals() {
    for lost in [false, true] {
        let (memory, store, repository) = new_world();
        let (_, _, second) = new_world();
        let old = noise(5 * MIB, 1);
        let point = full(&repository, &old);
        full(&second, &old);
        // The VM went on: the next backup of it has nothing to heal with.
        let new = noise(5 * MIB, 2);
        full(&repository, &new);
        for name in names(&memory, "packs/") {
            let bytes = memory.bytes(&name).unwrap();
            if lost {
                store.remove(&name).unwrap();
            } else {
                let mut bytes = bytes.to_vec();
                bytes[1000] ^= 1;
                memory.replace(&name, &bytes);
            }
        }
        let repository = reopen(&store).unwrap();
        assert!(damage_after_reading(&repository) > 0);
        let options = RepairOptions { from: Some(&second), ..RepairOptions::default() };
        let objects = memory.names();
        let would = repair(&repository, &RepairOptions { dry_run: true, ..options });
        assert!(would.healed_bytes >= 4 * MIB as u64, "{lost}: {would:?}");
        assert_eq!(memory.names(), objects, "{lost}: a dry run writes nothing");
        let done = repair(&repository, &options);
        assert_eq!(done.healed_bytes, would.healed_bytes, "{lost}");
        let left: Vec<_> = done.damage.iter().flat_map(|damage| &damage.points).collect();
        assert!(!left.contains(&&point.id), "{lost}: {:?}", done.damage);
        let repository = reopen(&store).unwrap();
        let disk = repository.open_disk(&point, "disk0").unwrap();
        let mut back = vec![0; old.len()];
        disk.read_at(&mut back, 0).unwrap();
        assert!(back == old, "{lost}: the point is whole again");
    }
}

#[test]
fn what_the_repository_has_twice_heals_without_a_source() {
    let (memory, store, repository) = new_world();
    let content = noise(3 * MIB, 1);
    let point = full(&repository, &content);
    // Stored again, because nothing was known.
    let index = names(&memory, "index/").remove(0);
    let bytes = memory.bytes(&index).unwrap();
    store.remove(&index).unwrap();
    let first = names(&memory, "packs/");
    full(&reopen(&store).unwrap(), &content);
    memory.replace(&index, &bytes);
    for name in &first {
        let mut bytes = memory.bytes(name).unwrap().to_vec();
        bytes[1000] ^= 1;
        memory.replace(name, &bytes);
    }
    let repository = reopen(&store).unwrap();
    assert!(damage_after_reading(&repository) > 0);
    let packs = names(&memory, "packs/").len();
    let done = repair(&repository, &RepairOptions::default());
    assert_eq!((done.damage.len(), done.healed_bytes), (0, 3 * MIB as u64), "{done:?}");
    assert_eq!(names(&memory, "packs/").len(), packs, "nothing is stored a third time");
    let mut back = vec![0; content.len()];
    let repository = reopen(&store).unwrap();
    repository.open_disk(&point, "disk0").unwrap().read_at(&mut back, 0).unwrap();
    assert!(back == content);
}

#[test]
fn unreadable_points_are_told_and_removed_only_when_asked() {
    let (memory, store, repository) = new_world();
    full(&repository, &noise(MIB, 1));
    let good = full(&repository, &noise(MIB, 2));
    let name =
        names(&memory, "points/").into_iter().find(|name| !name.ends_with(&good.id.to_string()));
    let name = name.unwrap();
    let mut bytes = memory.bytes(&name).unwrap().to_vec();
    bytes[70] ^= 1;
    memory.replace(&name, &bytes);
    let repository = reopen(&store).unwrap();
    let prune =
        || repository.prune(&PruneOptions::default(), &Progress::new(), &CancelToken::new());
    assert!(prune().is_err());
    let told = repair(&repository, &RepairOptions::default());
    assert_eq!((told.unreadable, told.removed.len()), (vec![name.clone()], 0));
    assert!(memory.bytes(&name).is_some());
    let done =
        repair(&repository, &RepairOptions { remove_unreadable: true, ..RepairOptions::default() });
    assert_eq!((done.removed, done.damage.len()), (vec![name], 0));
    prune().unwrap();
}

#[test]
fn salvage_reads_what_is_left_and_lists_what_is_not() {
    let (memory, store, repository) = new_world();
    let mut content = noise(7 * MIB, 1);
    content[3 * MIB..4 * MIB].fill(0);
    let point = full(&repository, &content);
    let salvage = || {
        let repository = reopen(&store).unwrap();
        let disk = repository.salvage_disk(&point, "disk0").unwrap();
        let mut back = vec![7; content.len()];
        disk.read_at(&mut back, 0).unwrap();
        let lost = disk.lost();
        for (at, (byte, expected)) in back.iter().zip(&content).enumerate() {
            let is_lost = lost.iter().any(|r| (r.offset..r.end()).contains(&(at as u64)));
            assert_eq!(*byte, if is_lost { 0 } else { *expected }, "byte {at}");
        }
        lost.total_bytes() as usize
    };
    assert_eq!(salvage(), 0);
    for name in names(&memory, "packs/") {
        let sound = memory.bytes(&name).unwrap();
        let mut bytes = sound.to_vec();
        bytes[1000] ^= 1;
        memory.replace(&name, &bytes);
        let lost = salvage();
        assert!((1..=3 * MIB).contains(&lost), "{lost} bytes lost with a frame of {name}");
        store.remove(&name).unwrap();
        let gone = salvage();
        assert!(gone >= lost && gone < 6 * MIB, "{gone} bytes lost with {name}");
        memory.replace(&name, &sound);
    }
    // A map of which nothing is left says nothing of any byte; a page says nothing of its blocks.
    let name = names(&memory, "maps/").remove(0);
    let sound = memory.bytes(&name).unwrap();
    let mut bytes = sound.to_vec();
    bytes[70] ^= 1;
    memory.replace(&name, &bytes);
    assert!(salvage() >= 6 * MIB);
    store.remove(&name).unwrap();
    assert_eq!(salvage(), content.len());
    memory.replace(&name, &sound);
    assert_eq!(salvage(), 0);
}
