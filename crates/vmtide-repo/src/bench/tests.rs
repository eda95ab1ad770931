use super::disk::SampleDisk;
use super::*;
use crate::backup::BackupOptions;
use crate::store::{LocalStore, ObjectStore};
use std::sync::Arc;
use vmtide_block::{BlockDevice, CancelToken};

fn sample() -> Vec<u8> {
    (0..3 << 20).map(|at: u32| u8::try_from((at >> 7) % 251).unwrap()).collect()
}

#[test]
fn a_store_is_measured_and_left_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("repository");
    let store: Arc<dyn ObjectStore> = Arc::new(LocalStore::create(&path).unwrap());
    store.put("packs/aa/kept", b"kept").unwrap();
    let names = || {
        let mut names: Vec<_> =
            std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    let sample = sample();
    let options =
        BackupOptions { workers: 2, pack_size_bytes: 4 << 20, ..BackupOptions::default() };
    let bench =
        StoreBench { store: Arc::clone(&store), sample: &sample, size_bytes: 10 << 20, options };
    let measured = measure_store(&bench, &CancelToken::new()).unwrap();
    let stage = |name: &str| measured.iter().find(|measured| measured.stage == name).unwrap();
    assert_eq!(stage("restore to nowhere").bytes, 10 << 20);
    assert!(stage("backup, everything new").left.unwrap() > 0.0);
    assert_eq!(stage("backup, nothing new").left, Some(0.0));
    assert_eq!(stage("put packs").operations, 2);
    assert!(stage("get 64 KiB of packs").latency.is_some());
    assert_eq!(names(), before, "nothing is left behind, not even a directory");

    // Also after the user has enough of it; and another run in between is refused.
    let cancel = CancelToken::new();
    cancel.cancel();
    measure_store(&bench, &cancel).unwrap_err();
    assert_eq!(names(), before);
    store.put("bench/packs/00/other", b"x").unwrap();
    let error = measure_store(&bench, &CancelToken::new()).unwrap_err();
    assert!(error.to_string().contains("bench/"), "{error}");
}

#[test]
fn every_block_of_the_disk_is_another_wherever_one_begins_to_read() {
    let sample = sample();
    let disk = SampleDisk::new(&sample, 7 << 20);
    let mut all = vec![0; 7 << 20];
    disk.read_at(&mut all, 0).unwrap();
    let mut part = vec![0; 10_000];
    disk.read_at(&mut part, 5_000_001).unwrap();
    assert!(part == all[5_000_001..5_010_001]);
    let blocks: std::collections::HashSet<_> = all.chunks(4096).collect();
    assert_eq!(blocks.len(), all.len() / 4096);
}

#[test]
fn every_stage_of_the_processor_has_a_figure() {
    let measured = measure_processor(&sample(), &CancelToken::new()).unwrap();
    assert!(measured.len() >= 12);
    assert!(measured.iter().all(|stage| stage.bytes > 0 && stage.bytes_per_second > 0.0));
    let level = measured.iter().find(|stage| stage.stage == "zstd 3").unwrap();
    assert!(level.left.is_some_and(|left| left < 0.5));
}

#[test]
fn percentiles_are_of_what_was_measured() {
    let times = (1..=101).map(Duration::from_millis).collect();
    let latency = Latency::of(times).unwrap();
    assert_eq!(latency, Latency { median_ms: 51.0, p90_ms: 91.0, p99_ms: 100.0, max_ms: 101.0 });
    assert_eq!(Latency::of(Vec::new()), None);
}

#[test]
fn the_index_of_many_chunks_takes_the_memory_it_may() {
    let store: Arc<dyn ObjectStore> = Arc::new(crate::store::MemoryStore::new());
    let measure =
        |entries| measure_index(Arc::clone(&store), entries, 500, &CancelToken::new()).unwrap();
    // A 64th of a TiB in chunks of 64 KiB, against next to nothing: the cache of pages is in both.
    let (few, many) = (1 << 12, 1 << 18);
    let (small, large) = (measure(few), measure(many));
    // 64 MiB for a TiB are 4 bytes for a chunk.
    let grown = large.memory_bytes - small.memory_bytes;
    assert!(grown < (many - few) * 4, "{small:?} {large:?}");
    assert!(large.stored_bytes > many * 24);
    let mut left = 0;
    store
        .list("bench/", &mut |_| {
            left += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(left, 0);
}
