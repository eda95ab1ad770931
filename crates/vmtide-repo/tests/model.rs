//! Disks against a byte vector: whatever sequence of backups, forgets and prunes a repository went
//! through, every restore point still there reads back as the disk was at its moment.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests: a failed unwrap is a failed test, and sizes are small"
)]

use crate::common;

use common::{Disk, commit, fast_options, repository, store_point};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use vmtide_block::{
    BlockDevice, ByteRange, CancelToken, MAX_PIECE_BYTES, Progress, RangeSet, all_extents,
};
use vmtide_repo::{
    ChangedRanges, DiskPlan, Level, MemoryStore, ObjectStore, PruneOptions, ReadData, Repository,
    VerifyOptions,
};

/// One thing that happens to a disk and its repository.
#[derive(Clone, Debug)]
enum Step {
    /// The guest writes: offset, length and the byte; 0 makes zeros.
    Write(usize, usize, u8),
    /// The disk gets another size.
    Resize(usize),
    /// A backup; `true` trusts the tracked changes, `false` looks at everything.
    Backup(bool),
    /// Forgets the n-th of the points there are.
    Forget(usize),
    /// Prunes, rewriting packs below the percentage.
    Prune(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0..3_000_000usize, 1..400_000usize, 0..4u8).prop_map(|(o, l, b)| Step::Write(o, l, b)),
        1 => (1..3_000_000usize).prop_map(Step::Resize),
        4 => any::<bool>().prop_map(Step::Backup),
        1 => any::<usize>().prop_map(Step::Forget),
        1 => (0..=100u8).prop_map(Step::Prune),
    ]
}

struct World {
    repository: Repository,
    disk: Vec<u8>,
    tracked: RangeSet,
    last: Option<vmtide_repo::RestorePoint>,
    expected: BTreeMap<String, Vec<u8>>,
}

impl World {
    fn take(&mut self, step: &Step) {
        match step {
            Step::Write(offset, length, byte) => self.write(*offset, *length, *byte),
            Step::Resize(size) => {
                self.disk.resize(*size, 0);
                self.tracked = RangeSet::full(*size as u64);
            }
            Step::Backup(trust) => self.back_up(*trust),
            Step::Forget(number) => self.forget(*number),
            Step::Prune(percent) => {
                let options =
                    PruneOptions { repack_below_percent: *percent, ..PruneOptions::default() };
                self.repository.prune(&options, &Progress::new(), &CancelToken::new()).unwrap();
            }
        }
    }

    fn write(&mut self, offset: usize, length: usize, byte: u8) {
        let offset = offset % self.disk.len();
        let end = (offset + length).min(self.disk.len());
        // Content that differs from chunk to chunk, so that places cannot be confused.
        for (at, slot) in self.disk[offset..end].iter_mut().enumerate() {
            *slot = if byte == 0 { 0 } else { ((offset + at) >> 12) as u8 ^ byte };
        }
        self.tracked.insert(ByteRange::from_bounds(offset as u64, end as u64));
    }

    fn back_up(&mut self, trust: bool) {
        let base = self.last.as_ref().map(|point| point.disks[0].clone());
        let same_size = base.as_ref().is_some_and(|b| b.size_bytes == self.disk.len() as u64);
        let changed = if trust && same_size {
            ChangedRanges::Only(self.tracked.clone())
        } else {
            ChangedRanges::Everything
        };
        let source = Disk::new(self.disk.clone());
        let plan = DiskPlan { id: "disk0".into(), base: base.as_ref(), changed };
        let point = store_point(&self.repository, &source, &plan, Level::Incremental).unwrap();
        self.expected.insert(point.id.to_string(), self.disk.clone());
        self.tracked = RangeSet::new();
        self.last = Some(point);
    }

    fn forget(&mut self, number: usize) {
        let points = self.repository.points().unwrap().points;
        if points.is_empty() {
            return;
        }
        let point = &points[number % points.len()];
        self.repository.forget(&[point.id]).unwrap();
        self.expected.remove(&point.id.to_string());
        if self.last.as_ref().is_some_and(|last| last.id == point.id) {
            // Its map may go at the next prune: nobody may build on it any more.
            self.last = None;
        }
    }

    fn check(&self) {
        let points = self.repository.points().unwrap();
        assert!(points.unreadable.is_empty());
        assert_eq!(points.points.len(), self.expected.len());
        for point in &points.points {
            let disk = self.repository.open_disk(point, "disk0").unwrap();
            let expected = &self.expected[&point.id.to_string()];
            assert_eq!(disk.size_bytes(), expected.len() as u64);
            let mut content = vec![0xEE; expected.len()];
            disk.read_at(&mut content, 0).unwrap();
            assert!(content == *expected, "point {} differs", point.id);
            for extent in all_extents(&*disk).unwrap() {
                if extent.kind.reads_as_zero() {
                    let (start, end) = (extent.range.offset as usize, extent.range.end() as usize);
                    assert!(expected[start..end].iter().all(|byte| *byte == 0));
                }
            }
            check_storage_order(&disk, expected);
            // Reads that begin and end anywhere.
            for (offset, length) in
                [(1, 1), (65_535, 3), (70_001, 200_000), (expected.len() / 2, 99)]
            {
                let end = (offset + length).min(expected.len());
                if offset < end {
                    let mut part = vec![0; end - offset];
                    disk.read_at(&mut part, offset as u64).unwrap();
                    assert!(part == expected[offset..end]);
                }
            }
        }
        let options = VerifyOptions { points: Vec::new(), read: ReadData::All, seed: None };
        let report =
            self.repository.verify(&options, &Progress::new(), &CancelToken::new()).unwrap();
        assert_eq!(report.damage, []);
    }
}

/// All pieces together are the disk, and no byte comes twice.
fn check_storage_order(disk: &vmtide_repo::PointDisk, expected: &[u8]) {
    let got = Mutex::new((vec![0; expected.len()], RangeSet::new(), 0));
    let storage = disk.storage_order().unwrap();
    let take = |data: &[u8], offset: u64| {
        assert!(data.len() <= MAX_PIECE_BYTES && data.as_ptr().align_offset(4096) == 0);
        let mut got = got.lock().unwrap();
        let start = offset as usize;
        got.0[start..start + data.len()].copy_from_slice(data);
        got.1.insert(ByteRange::new(offset, data.len() as u64));
        got.2 += data.len() as u64;
        Ok(())
    };
    storage.read_all(3, &CancelToken::new(), &take).unwrap();
    let (content, ranges, bytes) = got.into_inner().unwrap();
    assert!(content == expected, "in the order of the packs the disk differs");
    assert_eq!(ranges.total_bytes(), bytes);
}

fn run(steps: &[Step], encrypted: bool) {
    let store: Arc<dyn ObjectStore> = Arc::new(MemoryStore::new());
    let mut world = World {
        repository: repository(&store, encrypted),
        disk: vec![0; 1_500_000],
        tracked: RangeSet::full(1_500_000),
        last: None,
        expected: BTreeMap::new(),
    };
    for step in steps {
        world.take(step);
    }
    world.check();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn every_point_reads_back_as_its_moment(
        steps in prop::collection::vec(step(), 1..30),
        encrypted in any::<bool>(),
    ) {
        run(&steps, encrypted);
    }
}

#[test]
fn equal_content_is_stored_once_across_disks_and_points() {
    let store: Arc<dyn ObjectStore> = Arc::new(MemoryStore::new());
    let repository = repository(&store, true);
    let content: Vec<u8> = (0..4_000_000u32).map(|at| (at >> 8) as u8 ^ (at >> 17) as u8).collect();
    let session = repository.begin_backup(&fast_options()).unwrap();
    let source = Disk::new(content);
    let mut disks = Vec::new();
    for id in ["a", "b"] {
        let plan = DiskPlan { id: id.into(), base: None, changed: ChangedRanges::Everything };
        disks.push(
            session.store_disk(&source, &plan, &Progress::new(), &CancelToken::new()).unwrap(),
        );
    }
    assert!(disks[0].counts().new_bytes > 0);
    assert_eq!(disks[1].counts().new_bytes, 0, "the second disk is the first one again");
    assert_eq!(disks[1].counts().read_bytes, 4_000_000);
    commit(session, disks, Level::Full).unwrap();

    // A full pass of another job finds everything in the index and stores nothing.
    let plan = DiskPlan { id: "a".into(), base: None, changed: ChangedRanges::Everything };
    let point = store_point(&repository, &source, &plan, Level::Full).unwrap();
    assert_eq!(point.disks[0].counts.new_bytes, 0);
    assert_eq!(point.disks[0].counts.stored_bytes, 0);
}

#[test]
fn an_incremental_reads_and_stores_only_what_changed() {
    let store: Arc<dyn ObjectStore> = Arc::new(MemoryStore::new());
    let repository = repository(&store, true);
    let mut content: Vec<u8> = (0..8u32 << 20).map(|at| (at >> 12) as u8 | 1).collect();
    let plan = DiskPlan { id: "disk0".into(), base: None, changed: ChangedRanges::Everything };
    let full = store_point(&repository, &Disk::new(content.clone()), &plan, Level::Full).unwrap();

    content[5_000_000..5_000_010].fill(0xAB);
    let source = Disk::new(content.clone());
    let changed = ChangedRanges::Only(RangeSet::from(vec![ByteRange::new(5_000_000, 10)]));
    let plan = DiskPlan { id: "disk0".into(), base: Some(&full.disks[0]), changed };
    let point = store_point(&repository, &source, &plan, Level::Incremental).unwrap();
    assert_eq!(point.disks[0].counts.read_bytes, 4096);
    assert_eq!(source.read_bytes(), 4096);
    assert_eq!(point.disks[0].counts.new_bytes, 4096);
    let changed = repository.changed_between(&full.disks[0], &point.disks[0]).unwrap();
    assert_eq!(changed.as_slice(), [ByteRange::new(5_000_000 / 4096 * 4096, 4096)]);

    repository.forget(&[full.id]).unwrap();
    repository.prune(&PruneOptions::default(), &Progress::new(), &CancelToken::new()).unwrap();
    let mut back = vec![0; content.len()];
    repository.open_disk(&point, "disk0").unwrap().read_at(&mut back, 0).unwrap();
    assert!(back == content, "the incremental stands without its full");
}

/// Bytes that neither repeat nor compress.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn the_smallest_and_the_largest_chunks_read_back() {
    for chunk_size_bytes in [16 << 10, 256 << 10, 1 << 20] {
        let store: Arc<dyn ObjectStore> = Arc::new(MemoryStore::new());
        let options = vmtide_repo::InitOptions { chunk_size_bytes, ..common::init_options(true) };
        let password = vmtide_repo::Password::new(common::PASSWORD);
        let repository = Repository::init(store, &options, Some(&password)).unwrap();
        // Long enough for frames of several of the longest chunks, with zeros between.
        let mut content = noise(40 << 20);
        content[9 << 20..11 << 20].fill(0);
        let plan = DiskPlan { id: "disk0".into(), base: None, changed: ChangedRanges::Everything };
        let source = Disk::new(content.clone());
        let point = store_point(&repository, &source, &plan, Level::Full).unwrap();
        let mut back = vec![0; content.len()];
        repository.open_disk(&point, "disk0").unwrap().read_at(&mut back, 0).unwrap();
        assert!(back == content, "chunks of {chunk_size_bytes} bytes");
    }
}

#[test]
fn a_damaged_pack_does_not_keep_prune_from_its_work() {
    let memory = MemoryStore::new();
    let store: Arc<dyn ObjectStore> = Arc::new(memory.clone());
    let repository = repository(&store, true);
    let mut content = noise(6 << 20);
    let plan = || DiskPlan { id: "disk0".into(), base: None, changed: ChangedRanges::Everything };
    let first =
        store_point(&repository, &Disk::new(content.clone()), &plan(), Level::Full).unwrap();
    // Of every pack of the first point something stays in use and something does not.
    for megabyte in 0..6 {
        content[megabyte << 20..(megabyte << 20) + 600_000].fill(0);
    }
    let second =
        store_point(&repository, &Disk::new(content.clone()), &plan(), Level::Full).unwrap();
    repository.forget(&[first.id]).unwrap();

    let packs: Vec<String> =
        memory.names().into_iter().filter(|name| name.starts_with("packs/")).collect();
    assert!(packs.len() > 3);
    let victim = packs.iter().max_by_key(|name| memory.bytes(name).unwrap().len()).unwrap();
    let original = memory.bytes(victim).unwrap();
    let mut damaged = original.to_vec();
    for at in (64..damaged.len() - 20_000).step_by(4096) {
        damaged[at] ^= 1;
    }
    memory.replace(victim, &damaged);

    let options = PruneOptions { repack_below_percent: 100, ..PruneOptions::default() };
    let report = repository.prune(&options, &Progress::new(), &CancelToken::new()).unwrap();
    assert_eq!(report.packs_damaged, 1);
    assert!(memory.bytes(victim).is_some(), "what is damaged is not removed");
    memory.replace(victim, &original);
    let mut back = vec![0; content.len()];
    repository.open_disk(&second, "disk0").unwrap().read_at(&mut back, 0).unwrap();
    assert!(back == content);
}
