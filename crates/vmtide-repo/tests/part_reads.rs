//! Reads of a part of a frame: no less verified than those of all of it, and less work.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![allow(clippy::cast_possible_truncation, reason = "sizes are small")]

use crate::common;

use common::{Disk, commit, reopen, repository};
use std::sync::Arc;
use vmtide_block::{BlockDevice, CancelToken, Progress};
use vmtide_repo::{
    BackupOptions, ChangedRanges, Corruption, DiskPlan, FaultyStore, Level, MemoryStore,
    ObjectStore, PointDisk,
};

/// The frames that a backup makes of data in one piece are about so long, in bytes.
const FRAME: usize = 2 << 20;

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 8) as usize % limit
    }
}

/// What does not compress.
fn noise(bytes: usize) -> Vec<u8> {
    let mut source = Noise(0x9e37_79b9_7f4a_7c15);
    (0..bytes).map(|_| source.next().to_le_bytes()[3]).collect()
}

/// What does.
fn text(bytes: usize) -> Vec<u8> {
    let mut source = Noise(0x2545_f491_4f6c_dd1d);
    let mut words = String::new();
    while words.len() < bytes {
        words.push_str(&format!("{:x} ", source.below(4000) * 0x9e37));
    }
    words.truncate(bytes);
    words.into_bytes()
}

/// A store with one point of a disk, with the counter of its steps.
fn world(content: &[u8], encrypted: bool) -> (FaultyStore, Arc<dyn ObjectStore>) {
    let faulty = FaultyStore::new(Arc::new(MemoryStore::new()));
    let store: Arc<dyn ObjectStore> = Arc::new(faulty.clone());
    let repository = repository(&store, encrypted);
    let options = BackupOptions { workers: 1, ..BackupOptions::default() };
    let session = repository.begin_backup(&options).unwrap();
    let plan = DiskPlan { id: "disk".into(), base: None, changed: ChangedRanges::Everything };
    let source = Disk::new(content.to_vec());
    let disk = session.store_disk(&source, &plan, &Progress::new(), &CancelToken::new()).unwrap();
    commit(session, vec![disk], Level::Full).unwrap();
    (faulty, store)
}

fn open(store: &Arc<dyn ObjectStore>) -> Arc<PointDisk> {
    let repository = reopen(store).unwrap();
    let point = repository.latest("vm").unwrap().unwrap();
    repository.open_disk(&point, "disk").unwrap()
}

fn read(disk: &PointDisk, offset: usize, length: usize) -> vmtide_block::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    disk.read_at(&mut bytes, offset as u64).map(|()| bytes)
}

fn the_pack(store: &Arc<dyn ObjectStore>) -> String {
    let mut names = Vec::new();
    let mut note = |entry: vmtide_repo::ObjectEntry| {
        names.push(entry.name);
        Ok(())
    };
    store.list("packs/", &mut note).unwrap();
    assert_eq!(names.len(), 1);
    names.remove(0)
}

#[test]
fn reads_of_any_length_anywhere_by_many_threads_are_what_was_stored() {
    // More than is kept, so that frames come and go; with holes and frames of both kinds.
    let mut content = [noise(18 << 20), text(20 << 20)].concat();
    content[5 << 20..6 << 20].fill(0);
    content[30 << 20..(30 << 20) + 12_288].fill(0);
    for encrypted in [false, true] {
        let (_, store) = world(&content, encrypted);
        let disk = open(&store);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (disk, content) = (&disk, &content);
                scope.spawn(move || {
                    let mut places = Noise(thread * 977 + 5);
                    let mut near = 0usize;
                    for number in 0..150 {
                        let length = [512, 4096, 77, 130_000, 3 << 20][places.below(5)];
                        // Some go on where the last one ended, some back, most anywhere.
                        near = match number % 5 {
                            0 | 1 => near,
                            2 => near.saturating_sub(300_000),
                            _ => places.below(content.len()),
                        };
                        let offset = near.min(content.len() - length);
                        let bytes = read(disk, offset, length).unwrap();
                        assert!(bytes == content[offset..offset + length], "{length} at {offset}");
                        near = offset + length;
                    }
                });
            }
        });
    }
}

#[test]
fn a_chunk_that_its_id_verifies_is_read_without_those_beside_it() {
    let content = noise(FRAME);
    let (faulty, store) = world(&content, false);
    let damaged_at = FRAME - 5000;
    faulty
        .corrupt(&the_pack(&store), Corruption::FlipBit { offset: 64 + damaged_at as u64, bit: 3 });
    let disk = open(&store);
    assert!(read(&disk, 4096, 4096).unwrap() == content[4096..8192]);
    let error = read(&disk, damaged_at, 1).unwrap_err();
    assert!(error.to_string().contains("checksum"), "{error}");
    // The whole frame was looked at, and still what is right of it can be had.
    assert!(read(&disk, FRAME / 2, 100).unwrap() == content[FRAME / 2..FRAME / 2 + 100]);
    read(&disk, 0, FRAME).unwrap_err();
}

#[test]
fn what_its_tag_or_checksum_verifies_is_not_handed_out_where_any_of_it_is_changed() {
    for (content, encrypted) in [(text(FRAME), false), (text(FRAME), true), (noise(FRAME), true)] {
        let (faulty, store) = world(&content, encrypted);
        let name = the_pack(&store);
        let length = {
            let mut length = 0;
            let mut note = |entry: vmtide_repo::ObjectEntry| {
                length = entry.length_bytes;
                Ok(())
            };
            store.list("packs/", &mut note).unwrap();
            length
        };
        assert!(read(&open(&store), 0, 4096).unwrap() == content[..4096]);
        // Before, among and long after the bytes that are wanted, but before the directory.
        for offset in [64, 200, length / 2, length - 4000] {
            faulty.corrupt(&name, Corruption::FlipBit { offset, bit: 1 });
            let error = read(&open(&store), 0, 4096).unwrap_err();
            assert!(error.to_string().contains("frame 0"), "{offset}: {error}");
        }
    }
}

#[test]
fn who_reads_on_reads_each_frame_once() {
    for (content, encrypted) in [(noise(8 * FRAME), false), (text(8 * FRAME), true)] {
        let (faulty, store) = world(&content, encrypted);
        let disk = open(&store);
        assert!(read(&disk, 0, 4096).unwrap() == content[..4096]);
        let before = faulty.counts().reads;
        for offset in (4096..content.len()).step_by(4096) {
            assert!(read(&disk, offset, 4096).unwrap() == content[offset..offset + 4096]);
        }
        let reads = faulty.counts().reads - before;
        assert!((7..=10).contains(&reads), "{reads} reads for 8 frames");
    }
}

#[test]
fn who_comes_back_to_a_frame_again_and_again_has_all_of_it_in_the_end() {
    let content = noise(FRAME);
    let (faulty, store) = world(&content, false);
    let disk = open(&store);
    let mut places = Noise(11);
    let mut read_some = |count: usize| {
        let before = faulty.counts().reads;
        for _ in 0..count {
            let offset = places.below(FRAME - 100);
            assert!(read(&disk, offset, 100).unwrap() == content[offset..offset + 100]);
        }
        faulty.counts().reads - before
    };
    assert!(read_some(10) >= 3, "not all of it was read at once");
    read_some(200);
    assert_eq!(read_some(500), 0);
}
