//! Copies of restore points in another repository: byte for byte the same, reading only what
//! changed, whatever crashes or is damaged.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests: a failed unwrap is a failed test"
)]

use crate::support;

use jiff::Timestamp;
use std::collections::BTreeMap;
use std::sync::Arc;
use support::{Recorder, content};
use vmtide_block::{CancelToken, MemoryDevice, Progress};
use vmtide_engine::{CopyJob, CopySummary, EngineError, Event, JobContext, copy};
use vmtide_repo::{
    BackupOptions, ChangedRanges, DiskDraft, DiskPlan, DiskRecord, Fault, FaultyStore, InitOptions,
    KdfParameters, Level, MemoryStore, ObjectStore, Password, PointDraft, ReadData, Repository,
    RestorePoint, Step, TrackingRecord, VerifyOptions,
};

const MIB: usize = 1 << 20;

/// A repository in memory.
struct World {
    memory: MemoryStore,
    repository: Repository,
}

impl World {
    fn new(chunk_size_bytes: u32) -> Self {
        let memory = MemoryStore::new();
        let options = InitOptions {
            kdf: KdfParameters { memory_kib: 64, iterations: 1, lanes: 1 },
            chunk_size_bytes,
            ..InitOptions::default()
        };
        let password = Password::new("secret");
        let repository =
            Repository::init(Arc::new(memory.clone()), &options, Some(&password)).unwrap();
        Self { memory, repository }
    }

    /// What is found after a crash now.
    fn snapshot(&self) -> Self {
        let memory = self.memory.snapshot();
        Self { repository: open(Arc::new(memory.clone())), memory }
    }

    fn points(&self) -> Vec<RestorePoint> {
        let list = self.repository.points().unwrap();
        assert!(list.unreadable.is_empty(), "{:?}", list.unreadable);
        list.points
    }
}

fn open(store: Arc<dyn ObjectStore>) -> Repository {
    Repository::open(store, &mut || Ok(Password::new("secret"))).unwrap()
}

fn options() -> BackupOptions {
    BackupOptions { workers: 2, pack_size_bytes: 256 << 10, ..BackupOptions::default() }
}

/// Bytes that neither compress nor repeat, others for each seed.
fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; size];
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
    bytes
}

/// Backs disks up, compared with those of `base`.
fn add(
    repository: &Repository,
    vm: &str,
    disks: &[(&str, &[u8])],
    base: Option<&RestorePoint>,
) -> RestorePoint {
    let session = repository.begin_backup(&options()).unwrap();
    let (progress, cancel) = (Progress::new(), CancelToken::new());
    let mut drafts = Vec::new();
    for (id, bytes) in disks {
        let plan = DiskPlan {
            id: (*id).into(),
            base: base.and_then(|point| point.disk_record(id)),
            changed: ChangedRanges::Everything,
        };
        let device = MemoryDevice::from_bytes(bytes.to_vec());
        drafts.push(DiskDraft {
            stored: session.store_disk(&device, &plan, &progress, &cancel).unwrap(),
            tracking: TrackingRecord { used: true, reason: None, id: Some("moment".into()) },
            changed_bytes: None,
        });
    }
    let draft = PointDraft {
        vm: vm.into(),
        level: if base.is_some() { Level::Incremental } else { Level::Full },
        parent: base.map(|point| point.id),
        consistency: "fs".into(),
        tags: BTreeMap::from([("job".into(), "nightly".into())]),
        host: "host".into(),
        source: "test".into(),
        started: "2026-11-20T03:00:00Z".parse().unwrap(),
        config: serde_json::json!({ "name": vm }),
        warnings: vec!["one".into()],
        disks: drafts,
    };
    let point = session.commit(draft).unwrap();
    // Moments are told apart by milliseconds.
    std::thread::sleep(std::time::Duration::from_millis(2));
    point
}

fn try_copy(
    source: &Repository,
    target: &Repository,
    points: &[RestorePoint],
) -> vmtide_engine::Result<CopySummary> {
    let job =
        CopyJob { source, target, points: points.to_vec(), options: options(), dry_run: false };
    let (progress, cancel, observer) = (Progress::new(), CancelToken::new(), Recorder::default());
    let summary =
        copy(&job, JobContext { progress: &progress, cancel: &cancel, observer: &observer })?;
    let events = observer.0.lock();
    let copied = events.iter().filter(|event| matches!(event, Event::PointCopied { .. })).count();
    assert_eq!(copied, summary.copied.len());
    Ok(summary)
}

fn run(source: &World, target: &World, points: &[RestorePoint]) -> CopySummary {
    try_copy(&source.repository, &target.repository, points).unwrap()
}

/// Checks that `target` has each point of `source` once, the same to the byte, and nothing damaged.
fn assert_same(source: &World, target: &World, points: &[RestorePoint]) {
    let there = target.points();
    assert_eq!(there.len(), points.len());
    for point in points {
        let origin = source.repository.origin_of(point);
        let found: Vec<_> =
            there.iter().filter(|it| target.repository.origin_of(it) == origin).collect();
        assert_eq!(found.len(), 1, "{} is there once", point.id);
        let found = found[0];
        assert_ne!(found.id, point.id);
        let facts = |point: &RestorePoint| {
            let disks: Vec<_> = point
                .disks
                .iter()
                .map(|disk: &DiskRecord| (disk.id.clone(), disk.size_bytes))
                .collect();
            let words =
                [&point.vm, &point.consistency, &point.host, &point.source].map(String::clone);
            let times: [Timestamp; 2] = [point.time, point.started];
            (words, times, point.level, point.tags.clone(), point.config.clone(), disks)
        };
        assert_eq!(facts(found), facts(point));
        for disk in &point.disks {
            let open = |world: &World, point: &RestorePoint| {
                content(&*world.repository.open_disk(point, &disk.id).unwrap())
            };
            assert!(open(target, found) == open(source, point), "{} of {}", disk.id, point.id);
            assert_eq!(found.disk_record(&disk.id).unwrap().tracking.id, None);
        }
    }
    let report = target
        .repository
        .verify(
            &VerifyOptions { read: ReadData::All, ..VerifyOptions::default() },
            &Progress::new(),
            &CancelToken::new(),
        )
        .unwrap();
    assert_eq!(report.damage, []);
}

/// Three points of one VM, each with a little changed, and one of another that shares content.
fn four_points(world: &World) -> Vec<RestorePoint> {
    let repository = &world.repository;
    let mut disk = noise(1, 3 * MIB);
    disk[MIB..MIB + 300_000].fill(0);
    let first = add(repository, "web", &[("d0", &disk), ("d1", &noise(2, MIB))], None);
    disk[2 * MIB..2 * MIB + 8192].copy_from_slice(&noise(3, 8192));
    let second = add(repository, "web", &[("d0", &disk), ("d1", &noise(2, MIB))], Some(&first));
    let other = add(repository, "db", &[("d0", &disk)], None);
    disk[100_000..112_288].copy_from_slice(&noise(4, 12_288));
    let third = add(repository, "web", &[("d0", &disk), ("d1", &noise(2, MIB))], Some(&second));
    vec![first, second, other, third]
}

#[test]
fn all_is_copied_once_and_increments_read_only_what_changed() {
    let (source, target) = (World::new(65_536), World::new(32_768));
    let points = four_points(&source);
    let summary = run(&source, &target, &points[..1]);
    assert_eq!((summary.copied.len(), summary.present.len()), (1, 0));
    let summary = run(&source, &target, &points);
    assert_eq!((summary.copied.len(), summary.present.len()), (3, 1));
    assert_eq!(summary.present[0].from, points[0].id);
    let copied = |number: usize| {
        summary.copied.iter().find(|copied| copied.from == points[number].id).unwrap()
    };
    // 8 KiB and 12 KiB changed, at most a block more at each end; the second disk not at all.
    for (number, changed) in [(1, 8192), (3, 12_288)] {
        let disks = &copied(number).disks;
        assert!((changed..=changed + 2 * 65_536 * 4).contains(&disks[0].read_bytes), "{disks:?}");
        assert!(disks[0].base.is_some() && disks[1].read_bytes == 0, "{disks:?}");
    }
    // What both VMs have is stored once.
    let db = &copied(2).disks[0];
    assert!(db.base.is_none() && db.read_bytes > 2_000_000, "{db:?}");
    // The copy of the VM's second point was cut into chunks around its changes, this one from its beginning:
    // until the cuts meet again, two chunks at either end of a change may be new (at most 128 KiB each).
    assert!(db.new_bytes < 6 * 131_072, "{db:?}");
    assert_same(&source, &target, &points);
    // Maps are shared, and parents are the copies of parents.
    let there = target.points();
    let web: Vec<_> = there.iter().filter(|point| point.vm == "web").collect();
    assert_eq!(web[1].disks[1].map, web[0].disks[1].map);
    assert_eq!(web[2].parent, Some(web[1].id));
    let before = target.memory.names();
    let again = run(&source, &target, &points);
    assert_eq!((again.copied.len(), again.present.len()), (0, 4));
    assert_eq!(target.memory.names().len(), before.len());
}

#[test]
fn any_order_and_any_selection_builds_on_what_is_there() {
    let (source, target) = (World::new(65_536), World::new(65_536));
    let points = four_points(&source);
    run(&source, &target, &points[3..]);
    let summary = run(&source, &target, &points[..1]);
    let disks = &summary.copied[0].disks;
    assert!(disks[0].base.is_some() && disks[0].read_bytes < 1_000_000, "{disks:?}");
    assert_eq!(target.points()[0].parent, None);
    // The points that the source has forgotten meanwhile cannot be compared with.
    source.repository.forget(&[points[0].id, points[3].id]).unwrap();
    let summary = run(&source, &target, &points[1..3]);
    assert!(summary.copied[0].disks[0].base.is_none());
    assert!(summary.copied[0].disks[0].new_bytes < 1_500_000, "{:?}", summary.copied[0]);
    assert_eq!(target.points().len(), 4);
    let there = target.points();
    let disk = target.repository.open_disk(&there[1], "d0").unwrap();
    let here = source.repository.open_disk(&points[1], "d0").unwrap();
    assert!(content(&*disk) == content(&*here));
}

#[test]
fn a_point_is_itself_by_whatever_way_it_came() {
    let [a, b, c] = [World::new(65_536), World::new(65_536), World::new(65_536)];
    let points = four_points(&a);
    run(&a, &b, &points);
    run(&b, &c, &b.points());
    assert_same(&a, &c, &points);
    assert_eq!(run(&a, &c, &points).present.len(), 4, "by way of b they are there");
    assert_eq!(run(&c, &a, &c.points()).present.len(), 4, "and nothing goes back");
    // What was forgotten at home can come back.
    a.repository.forget(&[points[0].id]).unwrap();
    let summary = run(&c, &a, &c.points());
    assert_eq!((summary.copied.len(), summary.present.len()), (1, 3));
    assert_eq!(run(&c, &a, &c.points()).present.len(), 4);
}

#[test]
fn the_same_repository_is_refused_even_as_other_files() {
    let world = World::new(65_536);
    let points = four_points(&world);
    for target in [&world, &world.snapshot()] {
        let error = try_copy(&world.repository, &target.repository, &points).unwrap_err();
        assert!(matches!(error, EngineError::Usage(_)), "{error}");
    }
    assert_eq!(world.points().len(), 4);
}

#[test]
fn resized_added_and_removed_disks_are_copied_as_they_are() {
    let (source, target) = (World::new(65_536), World::new(65_536));
    let repository = &source.repository;
    let big = noise(1, 2 * MIB + 700);
    let first = add(repository, "web", &[("d0", &big[..MIB + 512])], None);
    let second = add(repository, "web", &[("d0", &big), ("d1", &[])], Some(&first));
    let third =
        add(repository, "web", &[("d0", &big[..5000]), ("d2", &[0; 70_000])], Some(&second));
    let points = [first, second, third];
    for number in 0..3 {
        run(&source, &target, &points[..=number]);
    }
    assert_same(&source, &target, &points);
}

#[test]
fn a_dry_run_copies_nothing_and_says_what_it_would() {
    let (source, target) = (World::new(65_536), World::new(65_536));
    let points = four_points(&source);
    run(&source, &target, &points[..1]);
    let before = target.memory.names();
    let job = CopyJob {
        source: &source.repository,
        target: &target.repository,
        points: points.clone(),
        options: options(),
        dry_run: true,
    };
    let (progress, cancel, observer) = (Progress::new(), CancelToken::new(), Recorder::default());
    let summary =
        copy(&job, JobContext { progress: &progress, cancel: &cancel, observer: &observer });
    let summary = summary.unwrap();
    assert_eq!((summary.copied.len(), summary.present.len()), (3, 1));
    assert!(summary.copied[0].point.is_none() && summary.copied[0].disks[0].read_bytes < 1_000_000);
    assert_eq!(target.memory.names(), before);
}

#[test]
fn a_copy_may_die_before_any_change_of_the_target() {
    let (source, empty) = (World::new(65_536), World::new(65_536));
    let points = four_points(&source);
    for step in 0.. {
        let target = empty.snapshot();
        let faulty = FaultyStore::crashing_at(Arc::new(target.memory.clone()), step);
        let died = try_copy(&source.repository, &open(Arc::new(faulty)), &points);
        let after =
            World { memory: target.memory.clone(), repository: open(Arc::new(target.memory)) };
        // What is there is whole, in the order it was made.
        let there = after.points().len();
        assert_same(&source, &after, &points[..there]);
        let summary = run(&source, &after, &points);
        assert_eq!(summary.present.len(), there);
        assert_same(&source, &after, &points);
        if died.is_ok() {
            assert!(step >= 12, "only {step} changes of the store were tried");
            return;
        }
    }
}

#[test]
fn a_store_that_fails_once_ends_the_copy_and_what_was_stored_is_found_again() {
    let (source, empty) = (World::new(65_536), World::new(65_536));
    let points = four_points(&source);
    for step in 0.. {
        let target = empty.snapshot();
        let faulty = FaultyStore::new(Arc::new(target.memory.clone()));
        faulty.plan(Step::Change, step, Fault::Io);
        let failed = try_copy(&source.repository, &open(Arc::new(faulty)), &points[..1]);
        let error = failed.expect_err("one pack is there, and another fails, before it is done");
        assert!(error.to_string().contains("injected"), "{error}");
        assert_eq!(target.points().len(), 0);
        if !target.memory.names().iter().any(|name| name.starts_with("packs/")) {
            continue;
        }
        let summary = run(&source, &target, &points[..1]);
        let new: u64 = summary.copied[0].disks.iter().map(|disk| disk.new_bytes).sum();
        assert!(new < 3_000_000, "{new} of some 3.8 MB were stored again");
        assert_same(&source, &target, &points[..1]);
        return;
    }
}

#[test]
fn what_is_damaged_is_not_copied_and_the_rest_is() {
    let (source, target) = (World::new(65_536), World::new(65_536));
    let good = add(&source.repository, "db", &[("d0", &noise(7, MIB))], None);
    let packs = |world: &World| -> Vec<String> {
        world.memory.names().into_iter().filter(|name| name.starts_with("packs/")).collect()
    };
    let of_db = packs(&source);
    let bad = add(&source.repository, "web", &[("d0", &noise(8, MIB))], None);
    let last = add(&source.repository, "db", &[("d0", &noise(9, MIB))], Some(&good));
    let later: Vec<_> = packs(&source).into_iter().filter(|name| !of_db.contains(name)).collect();
    let middle = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        bytes
    };
    let mut found = false;
    for name in later {
        let whole = source.memory.bytes(&name).unwrap();
        source.memory.replace(&name, &middle(&whole));
        let fresh = World::new(65_536);
        let all = [good.clone(), bad.clone(), last.clone()];
        let summary =
            try_copy(&open(Arc::new(source.memory.clone())), &fresh.repository, &all).unwrap();
        assert_eq!(summary.copied.len() + summary.failed.len(), 3);
        assert_eq!(summary.failed.len(), 1, "{:?}", summary.failed);
        assert!(summary.failed[0].error.contains(&name), "{:?}", summary.failed);
        let there = fresh.points();
        assert_eq!(there.len(), 2, "nothing of the damaged one is committed");
        found |= summary.failed[0].from == bad.id;
        source.memory.replace(&name, &whole);
        let summary = run(&source, &fresh, &all);
        assert_eq!(summary.copied.len(), 1);
        assert_same(&source, &fresh, &all);
    }
    assert!(found);
    // A damaged map of the base in the target, too: then all is read.
    run(&source, &target, std::slice::from_ref(&good));
    let map = target.memory.names().into_iter().find(|name| name.starts_with("maps/")).unwrap();
    let whole = target.memory.bytes(&map).unwrap();
    target.memory.replace(&map, &middle(&whole));
    let summary = run(&source, &target, std::slice::from_ref(&last));
    assert_eq!(summary.copied[0].disks[0].base, None);
}
