//! What is found damaged goes on record, the next backup stores it again, and every restore point
//! that used it is whole again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests: a failed unwrap is a failed test, and sizes are small"
)]

use crate::common;

use common::{Disk, commit, fast_options, reopen, repository, store_point};
use std::sync::{Arc, Mutex};
use vmtide_block::{BlockDevice, ByteRange, CancelToken, Progress, RangeSet};
use vmtide_repo::{
    ChangedRanges, DenyStore, DiskPlan, Level, MemoryStore, ObjectStore, PruneOptions, ReadData,
    Repository, RestorePoint, VerifyOptions, VerifyReport,
};

const MIB: usize = 1 << 20;

/// Content without repetition and without zeros.
fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    let mut content = vec![0; bytes];
    hasher.finalize_xof().fill(&mut content);
    content
}

fn plan<'a>(base: Option<&'a RestorePoint>, changed: ChangedRanges) -> DiskPlan<'a> {
    DiskPlan { id: "disk0".into(), base: base.map(|point| &point.disks[0]), changed }
}

fn only(offset: usize, length: usize) -> ChangedRanges {
    ChangedRanges::Only(RangeSet::from(vec![ByteRange::new(offset as u64, length as u64)]))
}

fn verify(repository: &Repository, read: ReadData) -> VerifyReport {
    let options = VerifyOptions { points: Vec::new(), read, seed: None };
    repository.verify(&options, &Progress::new(), &CancelToken::new()).unwrap()
}

fn read(
    repository: &Repository,
    point: &RestorePoint,
) -> Result<Vec<u8>, vmtide_block::BlockError> {
    let disk = repository.open_disk(point, "disk0")?;
    let mut content = vec![0; disk.size_bytes() as usize];
    disk.read_at(&mut content, 0)?;
    Ok(content)
}

/// A repository with a full point of 6 MiB and an incremental over it.
struct World {
    memory: Arc<MemoryStore>,
    repository: Repository,
    old: Vec<u8>,
    new: Vec<u8>,
    full: RestorePoint,
    incremental: RestorePoint,
    /// Where the victim is hurt.
    hurt_at: Mutex<Option<(String, usize)>>,
}

fn world(encrypted: bool) -> World {
    let memory = Arc::new(MemoryStore::new());
    let store: Arc<dyn ObjectStore> = memory.clone();
    let repository = repository(&store, encrypted);
    let old = noise(6 * MIB, 1);
    let full = store_point(
        &repository,
        &Disk::new(old.clone()),
        &plan(None, ChangedRanges::Everything),
        Level::Full,
    )
    .unwrap();
    let mut new = old.clone();
    new[MIB..MIB + 100_000].copy_from_slice(&noise(100_000, 2));
    let source = Disk::new(new.clone());
    let incremental = store_point(
        &repository,
        &source,
        &plan(Some(&full), only(MIB, 100_000)),
        Level::Incremental,
    )
    .unwrap();
    World { memory, repository, old, new, full, incremental, hurt_at: Mutex::default() }
}

impl World {
    /// The name of the pack that holds half of the fourth MiB of the full point, which nothing overwrote. Where in it is
    /// what workers that ran at the same time made of it; from now on it is hurt there.
    fn victim(&self) -> String {
        let store: Arc<dyn ObjectStore> = self.memory.clone();
        let names = self.memory.names().into_iter().filter(|name| name.starts_with("packs/"));
        let places = names.flat_map(|name| {
            let length = self.memory.bytes(&name).unwrap().len();
            (50_000.min(length / 3)..length).step_by(100_000).map(move |at| (name.clone(), at))
        });
        let mut places: Vec<_> = places.collect();
        places.sort_by_key(|(_, at)| *at);
        let found = places.into_iter().find(|(name, at)| {
            let sound = self.memory.bytes(name).unwrap();
            *self.hurt_at.lock().unwrap() = Some((name.clone(), *at));
            self.hurt(name);
            let fails = reopen(&store).is_ok_and(|repository| {
                let disk = repository.open_disk(&self.full, "disk0");
                disk.is_ok_and(|disk| {
                    disk.read_at(&mut vec![0; 500_000], 3 * MIB as u64 + 300_000).is_err()
                })
            });
            self.memory.replace(name, &sound);
            fails
        });
        found.unwrap().0
    }

    /// Where blocks of the incremental point cannot be read.
    fn unreadable(&self) -> Vec<usize> {
        let store: Arc<dyn ObjectStore> = self.memory.clone();
        let repository = reopen(&store).unwrap();
        let disk = repository.open_disk(&self.incremental, "disk0").unwrap();
        let blocks = (0..self.new.len()).step_by(4096);
        blocks.filter(|at| disk.read_at(&mut [0; 4096], *at as u64).is_err()).collect()
    }

    /// Flips a bit of a pack: of the victim in the frame that it was chosen for, of another in its first frame.
    fn hurt(&self, name: &str) {
        let mut bytes = self.memory.bytes(name).unwrap().to_vec();
        let at = match &*self.hurt_at.lock().unwrap() {
            Some((victim, at)) if victim == name => *at,
            _ => 50_000.min(bytes.len() / 3),
        };
        bytes[at] ^= 4;
        self.memory.replace(name, &bytes);
    }

    fn reopen(&mut self) {
        let store: Arc<dyn ObjectStore> = self.memory.clone();
        self.repository = reopen(&store).unwrap();
    }

    fn count(&self, kind: &str) -> usize {
        self.memory.names().iter().filter(|name| name.starts_with(kind)).count()
    }
}

#[test]
fn the_next_incremental_heals_its_vm_though_nothing_changed_there() {
    for encrypted in [true, false] {
        let mut world = world(encrypted);
        let victim = world.victim();
        world.hurt(&victim);
        assert!(read(&world.repository, &world.full).is_err());

        let found = verify(&world.repository, ReadData::All);
        assert_eq!(found.quarantined, 1, "{found:?}");
        assert_eq!(found.damage.len(), 1, "{found:?}");
        let damage = &found.damage[0];
        assert_eq!(damage.object, victim);
        assert!(damage.frame.is_some(), "{damage:?}");
        let mut points = damage.points.clone();
        points.sort();
        let mut expected = vec![world.full.id, world.incremental.id];
        expected.sort();
        assert_eq!(points, expected);
        let bytes = damage.places[0].ranges.total_bytes();
        assert!((MIB as u64..=4 * MIB as u64).contains(&bytes), "{bytes} bytes touched");

        // Known from now on, without reading, and not put on record again.
        let known = verify(&world.repository, ReadData::None);
        assert_eq!((known.damage.len(), known.quarantined), (1, 0), "{known:?}");
        assert!(known.damage[0].detail.contains("on record"), "{known:?}");
        let again = verify(&world.repository, ReadData::All);
        assert_eq!((again.damage.len(), again.quarantined), (1, 0), "{again:?}");

        // The ranges that changed lie elsewhere.
        world.reopen();
        let at = 5 * MIB + MIB / 2;
        world.new[at..at + 5000].fill(7);
        let source = Disk::new(world.new.clone());
        let session = world.repository.begin_backup(&fast_options()).unwrap();
        let disk_plan = plan(Some(&world.incremental), only(at, 5000));
        let stored =
            session.store_disk(&source, &disk_plan, &Progress::new(), &CancelToken::new()).unwrap();
        assert!(session.healed_bytes() > MIB as u64 / 2, "{} healed", session.healed_bytes());
        let third = commit(session, vec![stored], Level::Incremental).unwrap();
        assert!(source.read_bytes() < 6 * MIB as u64, "the rest is not read");

        world.reopen();
        assert_eq!(read(&world.repository, &third).unwrap(), world.new);
        assert!(read(&world.repository, &world.full).unwrap() == world.old, "the old one, too");
        assert_eq!(verify(&world.repository, ReadData::All).damage, []);
        assert_eq!((world.count("damaged/"), world.count("healed/")), (1, 1));
    }
}

#[test]
fn another_vm_with_the_same_content_heals_too() {
    let mut world = world(true);
    let victim = world.victim();
    world.hurt(&victim);
    verify(&world.repository, ReadData::All);
    let source = Disk::new(world.old.clone());
    store_point(&world.repository, &source, &plan(None, ChangedRanges::Everything), Level::Full)
        .unwrap();
    world.reopen();
    assert!(read(&world.repository, &world.full).unwrap() == world.old);
    assert_eq!(verify(&world.repository, ReadData::All).damage, []);
}

#[test]
fn a_lost_pack_is_healed_by_what_the_index_remembers() {
    let mut world = world(true);
    let victim = world.victim();
    let store: Arc<dyn ObjectStore> = world.memory.clone();
    store.remove(&victim).unwrap();
    let found = verify(&world.repository, ReadData::None);
    assert_eq!(found.quarantined, 1, "{found:?}");
    assert_eq!(found.damage[0].frame, None);
    world.reopen();
    let source = Disk::new(world.new.clone());
    let third = store_point(
        &world.repository,
        &source,
        &plan(Some(&world.incremental), only(0, 4096)),
        Level::Incremental,
    )
    .unwrap();
    world.reopen();
    assert_eq!(read(&world.repository, &third).unwrap(), world.new);
    let report = verify(&world.repository, ReadData::All);
    let lost: u64 = report
        .damage
        .iter()
        .flat_map(|damage| &damage.places)
        .filter(|place| place.point == world.full.id)
        .map(|place| place.ranges.total_bytes())
        .sum();
    // What was overwritten since is gone for good; all else came back.
    assert!(lost <= 300_000, "{lost} bytes of the full point are still lost: {report:?}");
}

#[test]
fn prune_keeps_what_heals_and_removes_it_with_the_points_that_need_it() {
    let mut world = world(true);
    let victim = world.victim();
    world.hurt(&victim);
    verify(&world.repository, ReadData::All);
    let source = Disk::new(world.new.clone());
    let third = store_point(
        &world.repository,
        &source,
        &plan(Some(&world.incremental), only(0, 4096)),
        Level::Incremental,
    )
    .unwrap();
    let prune = |repository: &Repository| {
        repository.prune(&PruneOptions::default(), &Progress::new(), &CancelToken::new()).unwrap();
    };
    // Only the point that came before the healing is left: it needs what the healing stored.
    world.repository.forget(&[third.id, world.incremental.id]).unwrap();
    prune(&world.repository);
    prune(&world.repository);
    world.reopen();
    assert!(read(&world.repository, &world.full).unwrap() == world.old);
    assert_eq!(verify(&world.repository, ReadData::All).damage, []);
    world.repository.forget(&[world.full.id]).unwrap();
    prune(&world.repository);
    assert_eq!(world.count("packs/"), 0);
}

/// A disk is away, a backup heals what was on it, the disk comes back, and then what healed it is
/// damaged: the original is sound, and is what everybody reads.
#[test]
fn an_original_that_comes_back_outlives_the_damage_of_what_healed_it() {
    let mut world = world(true);
    let victim = world.victim();
    let sound = world.memory.bytes(&victim).unwrap();
    let packs = world.memory.names();
    world.hurt(&victim);
    verify(&world.repository, ReadData::All);
    world.reopen();
    let source = Disk::new(world.new.clone());
    let next = plan(Some(&world.incremental), only(0, 4096));
    let third = store_point(&world.repository, &source, &next, Level::Incremental).unwrap();
    world.memory.replace(&victim, &sound);
    world.reopen();
    assert_eq!(verify(&world.repository, ReadData::All).recovered, 1);

    let is_new = |name: &String| name.starts_with("packs/") && !packs.contains(name);
    for name in world.memory.names().into_iter().filter(is_new) {
        world.hurt(&name);
    }
    let found = verify(&world.repository, ReadData::All);
    assert!(found.quarantined > 0, "{found:?}");
    for point in found.damage.iter().flat_map(|damage| &damage.points) {
        assert_eq!(*point, third.id, "the others need the original only");
    }
    world.reopen();
    assert!(read(&world.repository, &world.full).unwrap() == world.old);
    let fourth = store_point(
        &world.repository,
        &source,
        &plan(Some(&third), only(0, 4096)),
        Level::Incremental,
    )
    .unwrap();
    for _ in 0..2 {
        world.reopen();
        for (point, content) in
            [(&world.full, &world.old), (&world.incremental, &world.new), (&fourth, &world.new)]
        {
            assert!(read(&world.repository, point).unwrap() == *content);
        }
        assert!(read(&world.repository, &third).unwrap() == world.new, "healed by the original");
        let options = PruneOptions { repack_below_percent: 90, ..PruneOptions::default() };
        world.repository.prune(&options, &Progress::new(), &CancelToken::new()).unwrap();
    }
}

#[test]
fn a_restore_that_meets_damage_puts_it_on_record() {
    let mut world = world(true);
    let victim = world.victim();
    world.hurt(&victim);
    assert!(read(&world.repository, &world.full).is_err());
    let parts = world.repository.quarantine_found("restore").unwrap();
    assert_eq!(parts.len(), 1, "{parts:?}");
    assert!(world.repository.quarantine_found("restore").unwrap().is_empty());
    world.reopen();
    let lost = world.repository.damaged_ranges(&world.full.disks[0]).unwrap();
    assert!(!lost.is_empty());
}

#[test]
fn a_failure_that_passed_is_no_damage() {
    let world = world(true);
    let victim = world.victim();
    let sound = world.memory.bytes(&victim).unwrap();
    world.hurt(&victim);
    assert!(read(&world.repository, &world.full).is_err());
    world.memory.replace(&victim, &sound);
    assert!(world.repository.quarantine_found("restore").unwrap().is_empty());
    assert_eq!(world.count("damaged/"), 0);
}

#[test]
fn a_sample_states_what_it_is_worth_and_can_be_drawn_again() {
    let world = world(false);
    let sample = |seed| {
        let options =
            VerifyOptions { points: Vec::new(), read: ReadData::percent(50), seed: Some(seed) };
        world.repository.verify(&options, &Progress::new(), &CancelToken::new()).unwrap()
    };
    let reports: Vec<VerifyReport> = (0..20).map(sample).collect();
    assert!(reports.iter().any(|report| report.frames_read != reports[0].frames_read));
    assert_eq!(sample(3), reports[3]);
    for report in reports {
        let said = report.sample.unwrap();
        // Of fewer than a thousand frames one is one in a thousand: found if it is drawn.
        assert!((said.chance_if_one_in_a_thousand - said.share).abs() < 1e-9, "{said:?}");
        assert!(report.frames_read <= report.frames);
    }
    assert_eq!(verify(&world.repository, ReadData::All).sample, None);
}

#[test]
fn what_a_backup_finds_lost_is_read_again_before_its_restore_point_is_written() {
    let mut world = world(true);
    let victim = world.victim();
    let store: Arc<dyn ObjectStore> = world.memory.clone();
    store.remove(&victim).unwrap();
    let gone = world.unreadable();
    world.reopen();
    let source = Disk::new(world.new.clone());
    let (progress, cancel) = (Progress::new(), CancelToken::new());
    let mut session = world.repository.begin_backup(&fast_options()).unwrap();
    // Half of what the lost pack has: the index leads there.
    let (first, half) = (gone[0], gone.len() / 2 * 4096);
    assert!(half > 300_000, "{half}");
    let changes = plan(Some(&world.incremental), only(first, half));
    let mut stored = session.store_disk(&source, &changes, &progress, &cancel).unwrap();
    let mut lost = 0;
    for _ in 0..3 {
        if session.look_for_damage().unwrap() {
            let (mended, again) = session.mend_disk(&source, stored, &progress, &cancel).unwrap();
            (stored, lost) = (mended, lost + again.total_bytes());
        }
    }
    assert!(!session.look_for_damage().unwrap());
    assert!(lost > 100_000, "{lost} bytes were shared with the lost pack");
    let third = commit(session, vec![stored], Level::Incremental).unwrap();
    assert_eq!(world.count("damaged/"), 1, "it is on record");
    world.reopen();
    assert!(read(&world.repository, &third).unwrap() == world.new);
}

#[test]
fn records_of_damage_that_nothing_leads_to_any_more_go_with_the_next_prune() {
    let mut world = world(true);
    let victim = world.victim();
    world.hurt(&victim);
    verify(&world.repository, ReadData::All);
    world.reopen();
    let source = Disk::new(world.new.clone());
    let next = plan(Some(&world.incremental), only(0, 4096));
    let third = store_point(&world.repository, &source, &next, Level::Incremental).unwrap();
    let prune = |repository: &Repository| {
        repository.prune(&PruneOptions::default(), &Progress::new(), &CancelToken::new()).unwrap()
    };
    prune(&world.repository);
    assert_eq!((world.count("damaged/"), world.count("healed/")), (1, 1), "still led through");
    assert!(read(&world.repository, &world.full).unwrap() == world.old);
    // The newest has all of its own; nothing leads to the damaged pack but the damage.
    world.repository.forget(&[world.full.id, world.incremental.id, third.id]).unwrap();
    prune(&world.repository);
    prune(&world.repository);
    assert_eq!((world.count("packs/"), world.count("damaged/"), world.count("healed/")), (0, 0, 0));
}

#[test]
fn where_nothing_may_be_removed_records_do_not_pile_up_and_what_is_sound_is_taken_off() {
    let mut world = world(true);
    let packs: Vec<String> =
        world.memory.names().into_iter().filter(|name| name.starts_with("packs/")).collect();
    let sound: Vec<_> = packs.iter().map(|name| world.memory.bytes(name).unwrap()).collect();
    packs.iter().for_each(|name| world.hurt(name));
    let all: Arc<dyn ObjectStore> = world.memory.clone();
    let deny: Arc<dyn ObjectStore> = Arc::new(DenyStore::new(Arc::clone(&all)));
    world.repository = reopen(&deny).unwrap();
    assert!(verify(&world.repository, ReadData::All).quarantined >= 2);
    assert_eq!(world.count("damaged/"), 1);
    world.memory.replace(&packs[0], &sound[0]);
    for (recovered, records) in [(1, 2), (0, 2), (0, 2)] {
        world.repository = reopen(&deny).unwrap();
        let report = verify(&world.repository, ReadData::All);
        assert_eq!((report.recovered, world.count("damaged/")), (recovered, records));
        assert!(report.damage.iter().all(|damage| damage.object != packs[0]), "{report:?}");
    }
    packs.iter().zip(&sound).for_each(|(name, bytes)| world.memory.replace(name, bytes));
    for _ in 0..2 {
        world.repository = reopen(&deny).unwrap();
        verify(&world.repository, ReadData::All);
        assert_eq!(world.count("damaged/"), 3);
        assert!(!world.repository.has_damage_on_record().unwrap());
    }
    // Who may remove clears up.
    world.reopen();
    verify(&world.repository, ReadData::All);
    world
        .repository
        .prune(&PruneOptions::default(), &Progress::new(), &CancelToken::new())
        .unwrap();
    assert_eq!(world.count("damaged/"), 0);
}
