//! Seeded runs of the cycle: a VM lives its life, writes, changes its disks and its name, the host misbehaves in every way
//! the stand-in knows, and jobs are killed, lose answers and find the repository full. After each backup everything that
//! must hold is looked at.
//!
//! 300 runs are part of the tests. All 10,000:
//! `cargo test -p vmtide-hyperv --release --test seeded -- --ignored`, from another seed with `VMTIDE_SEED=N`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::type_complexity,
    reason = "a test that panics has failed, and its disks are small"
)]

mod support;

use std::sync::Arc;
use support::Random;
use support::driver::{Machine, hypervisor, point_of};
use support::world::{Cut, Faults, World, guest_write};
use vmtide_hyperv::ChangesError;
use vmtide_hypervisor::{Changes, Hypervisor};

const SIZE: usize = 16 * 1024;

/// What happened in the runs, to see that they meet everything.
#[derive(Debug, Default)]
struct Met {
    committed: usize,
    failed: usize,
    killed: usize,
    incremental: usize,
    full: usize,
    without_base: usize,
    doubtful: usize,
}

/// Something the host does wrong, or nothing.
fn any_faults(random: &mut Random) -> Faults {
    let mut faults =
        Faults { merge_ms: [0, 500, 3000, 20_000][random.below(4)], ..Faults::default() };
    faults.unnamed = random.once_in(4);
    faults.job_warns = random.once_in(5);
    faults.over_report = random.once_in(5);
    faults.page_ranges = random.once_in(3).then(|| 1 + random.below(3));
    match random.below(16) {
        0 => faults.changes = Some(ChangesError::UnknownId("0xC03A0029".into())),
        1 => faults.changes = Some(ChangesError::NotTracked("0xC03A002A".into())),
        2 => faults.changes = Some(ChangesError::Failed("0xC03A0030".into())),
        3 => faults.no_progress = true,
        4 => faults.no_ids = true,
        5 => faults.fewer_ids = true,
        6 => faults.point_kind = Some(1),
        7 => faults.convert_code = Some(32775),
        8 => faults.vss_fails = true,
        9 => faults.point_consistency = Some(2),
        10 => faults.sharing_violation = true,
        11 => faults.points_stick = true,
        12 => faults.create_code = Some(32768),
        13 => faults.job_vanishes = true,
        14 => faults.skipped_disk = Some(random.below(3)),
        _ => {}
    }
    faults
}

/// Something that happens to a VM between two backups.
fn any_event(world: &World, random: &mut Random, short_ids: bool) {
    let mut state = world.0.lock();
    state.faults.short_point_ids = short_ids;
    let vm = &mut state.vms[0];
    match random.below(12) {
        0 => vm.name = format!("vm{}", random.below(1000)),
        1 => {
            // Disks trade places.
            let (a, b) = (random.below(vm.disks.len()), random.below(vm.disks.len()));
            let location = vm.disks[a].location;
            vm.disks[a].location = vm.disks[b].location;
            vm.disks[b].location = location;
        }
        2 => {
            let disk = random.below(vm.disks.len());
            let size = vm.disks[disk].data.len() + 4096;
            vm.disks[disk].data.resize(size, 0xee);
        }
        3 if vm.disks.len() < 4 => {
            let location = 20 + random.below(20) as u32;
            let free = vm.disks.iter().all(|disk| disk.location != location);
            drop(state);
            if free {
                world.add_disk(0, location, SIZE);
            }
        }
        _ => {}
    }
}

fn write_some(world: &World, random: &mut Random) {
    let mut state = world.0.lock();
    for _ in 0..random.below(6) {
        let vm = &mut state.vms[0];
        let disk = random.below(vm.disks.len());
        let offset = random.below(vm.disks[disk].data.len() - 600);
        let bytes = vec![random.next() as u8; 1 + random.below(600)];
        guest_write(vm, disk, offset, &bytes);
    }
}

/// A guest that goes on writing while it is backed up.
fn busy_guest(seed: u64) -> Box<dyn FnMut(&mut Vec<support::world::Vm>) + Send> {
    let mut random = Random(seed);
    Box::new(move |vms| {
        if random.once_in(3) {
            let disk = random.below(vms[0].disks.len());
            let offset = random.below(vms[0].disks[disk].data.len() - 8);
            let bytes = random.next().to_le_bytes();
            guest_write(&mut vms[0], disk, offset, &bytes);
        }
    })
}

/// The administrator removes a checkpoint of which nothing tells that it is ours, where vmtide has told of it.
fn clear_doubt(world: &World, machine: &Machine, met: &mut Met) {
    if world.nameless(0).is_empty() {
        return;
    }
    let report = machine.hypervisor().reap();
    if let (Some(name), Ok(report)) = (world.nameless(0).pop(), report) {
        assert!(report.in_use.iter().any(|line| line.contains(&name)), "{report:?}");
        met.doubtful += 1;
    }
    world.remove_nameless(0);
    world.pass(60_000);
}

fn one_backup(
    world: &World,
    machine: &mut Machine,
    agentless: bool,
    random: &mut Random,
    met: &mut Met,
) {
    clear_doubt(world, machine, met);
    world.0.lock().guest = Some(busy_guest(random.next()));
    world.0.lock().faults = any_faults(random);
    world.0.lock().faults.no_most_recent = agentless;
    machine.commit_fails = random.once_in(12);
    machine.killed_after_commit = random.once_in(15);
    machine.host_dies = random.once_in(3);
    machine.full = random.once_in(15);
    machine.allow_downgrade = !random.once_in(5);
    let call = 1 + random.below(140) as u64;
    // Without the ids of the frozen files or of the point, the reference point of a killed conversion cannot be told
    // from another program's: that is another test.
    let provable = {
        let faults = &world.0.lock().faults;
        !(agentless || faults.no_ids || faults.fewer_ids)
    };
    world.cut(match random.below(8) {
        0 if provable => Some(Cut::DieBefore(call)),
        1 if provable => Some(Cut::DieAfter(call)),
        2 if provable => Some(Cut::LoseAnswer(call)),
        _ => None,
    });
    let id = world.0.lock().vms[0].id.to_string();
    let had = machine.points.len();
    match machine.backup(&id) {
        Ok(outcome) if outcome.full.is_empty() => met.incremental += 1,
        Ok(_) => met.full += 1,
        Err(_) => met.failed += 1,
    }
    met.committed += machine.points.len() - had;
    met.killed += usize::from(world.is_dead());
    assert!(machine.base_is_alive(0), "the base of the newest restore point is gone");
    world.cut(None);
    world.0.lock().guest = None;
}

/// A backup without any fault puts everything right.
fn assert_all_is_right(world: &World, machine: &mut Machine, met: &mut Met) {
    world.0.lock().faults = Faults { merge_ms: 1000, ..Faults::default() };
    (machine.commit_fails, machine.killed_after_commit, machine.full) = (false, false, false);
    (machine.host_dies, machine.allow_downgrade) = (false, true);
    let id = world.0.lock().vms[0].id.to_string();
    clear_doubt(world, machine, met);
    // A merge of a job that was killed may be under way.
    world.pass(60_000);
    let outcome = machine.backup(&id).unwrap();
    assert_eq!(outcome.left, Vec::<String>::new());
    met.without_base += usize::from(!outcome.full.is_empty());
    let newest = machine.points.last().unwrap();
    for disk in &world.0.lock().vms[0].disks {
        let id = vmtide_hypervisor::DiskId(format!("scsi0:{}", disk.location));
        assert!(newest.disks[&id].bytes == disk.data, "the restore point is not the disk {id}");
    }
    let mut needed: Vec<_> =
        newest.disks.values().map(|disk| point_of(disk.tracking.as_ref().unwrap())).collect();
    needed.dedup();
    let mut points = world.points(0);
    let foreign =
        points.iter().position(|point| !needed.contains(point)).map(|at| points.remove(at));
    assert!(foreign.is_some(), "the other product's reference point is gone");
    assert_eq!(points, needed, "reference points are left");
    let leftovers = world.leftovers();
    assert!(leftovers.len() == 1 && leftovers[0].ends_with("- Backup"), "{leftovers:?}");
    world.pass(3600 * 1000);
    machine.hypervisor().reap().unwrap();
    assert_eq!(machine.state_files("journal"), Vec::<String>::new());
}

fn one_run(seed: u64, met: &mut Met) {
    let mut random = Random(seed);
    let world = World::new();
    let sizes: Vec<usize> = (0..1 + random.below(3)).map(|n| SIZE + n * 4096).collect();
    world.add_vm("web", &sizes);
    world.add_foreign(0);
    let mut machine = Machine::new(&world);
    let (short_ids, agentless) = (random.once_in(2), random.once_in(5));
    for _ in 0..2 + random.below(4) {
        write_some(&world, &mut random);
        any_event(&world, &mut random, short_ids);
        one_backup(&world, &mut machine, agentless, &mut random, met);
        world.pass(random.below(100_000) as u64);
        if random.once_in(4) {
            // Somebody runs `reap`, perhaps killed, too.
            world.cut(random.once_in(2).then(|| Cut::DieAfter(1 + random.below(30) as u64)));
            let _ = machine.hypervisor().reap();
            world.cut(None);
        }
    }
    write_some(&world, &mut random);
    assert_all_is_right(&world, &mut machine, met);
}

fn runs(count: u64) {
    let first = std::env::var("VMTIDE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let mut met = Met::default();
    for seed in first..first + count {
        let run =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| one_run(seed, &mut met)));
        assert!(run.is_ok(), "seed {seed} failed (repeat it with VMTIDE_SEED={seed})");
    }
    println!("{count} runs: {met:?}");
    let least = count as usize / 5;
    assert!(
        met.committed > count as usize && met.failed > least && met.killed > least / 2,
        "{met:?}"
    );
    assert!(
        met.incremental > least && met.full > least && met.without_base > least / 10,
        "{met:?}"
    );
}

#[test]
fn three_hundred_seeded_runs_leave_nothing_and_lose_nothing() {
    runs(300);
}

#[test]
#[ignore = "takes minutes; the command is at the top of this file"]
fn ten_thousand_seeded_runs_leave_nothing_and_lose_nothing() {
    runs(10_000);
}

#[test]
fn eight_disks_show_one_moment_under_load() {
    const DISKS: usize = 8;
    let world = World::new();
    let sizes: Vec<usize> = (0..DISKS).map(|n| (4 << (n % 4)) * 1024).collect();
    world.add_vm("db", &sizes);
    let mut machine = Machine::new(&world);
    // The guest counts, one disk after the other, at every call to the host and between.
    let mut counter = 0_u64;
    world.0.lock().guest = Some(Box::new(move |vms| {
        for _ in 0..3 {
            counter += 1;
            let disk = counter as usize % DISKS;
            guest_write(&mut vms[0], disk, 0, &counter.to_le_bytes());
            let slot = 64 + counter as usize / DISKS % 50 * 8;
            guest_write(&mut vms[0], disk, slot, &counter.to_le_bytes());
        }
    }));
    for round in 0..20 {
        let outcome = machine.backup("db").unwrap();
        let point = machine.points.last().unwrap();
        let counters: Vec<u64> = point
            .disks
            .values()
            .map(|disk| u64::from_le_bytes(disk.bytes[..8].try_into().unwrap()))
            .collect();
        let (low, high) = (counters.iter().min().unwrap(), counters.iter().max().unwrap());
        assert_eq!(high - low, DISKS as u64 - 1, "round {round}: {counters:?}");
        if round > 0 {
            assert!(outcome.full.is_empty(), "{:?}", outcome.full);
        }
    }
    // With a host that reports exactly, an incremental reads what changed and no more.
    world.0.lock().guest = None;
    machine.backup("db").unwrap();
    for disk in 0..DISKS {
        world.write(0, disk, 1000, &[9; 1000]);
    }
    assert_eq!(machine.backup("db").unwrap().read_bytes, 8 * 1000);
}

#[test]
fn fifty_vms_four_at_a_time_wait_for_nobodys_merge() {
    let world = World::new();
    for n in 0..50 {
        world.add_vm(&format!("vm{n:02}"), &[SIZE, SIZE]);
    }
    let state = tempfile::tempdir().unwrap();
    let hypervisor = hypervisor(&world, state.path());
    let machine = Machine::new(&world);
    let next = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let done = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    // The merge of the first one takes longer than everything.
    world.0.lock().faults.merge_ms = 24 * 3600 * 1000;
    let request = machine.request("vm00");
    let mut first = hypervisor.freeze(&request).unwrap();
    first.seal().unwrap();
    let left = first.commit().unwrap();
    assert!(left[0].contains("merged"), "{left:?}");
    world.0.lock().faults.merge_ms = 1000;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let (next, done, hypervisor, machine) = (&next, &done, &hypervisor, &machine);
            scope.spawn(move || {
                loop {
                    let n = next.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
                    if n >= 50 {
                        return;
                    }
                    let mut frozen =
                        hypervisor.freeze(&machine.request(&format!("vm{n:02}"))).unwrap();
                    assert!(
                        frozen
                            .disks()
                            .iter()
                            .all(|disk| matches!(disk.changes, Changes::Everything(_)))
                    );
                    frozen.check().unwrap();
                    frozen.seal().unwrap();
                    assert_eq!(frozen.commit().unwrap(), Vec::<String>::new());
                    done.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                }
            });
        }
    });
    assert_eq!(done.load(std::sync::atomic::Ordering::SeqCst), 49);
    assert!(
        world.leftovers().iter().all(|path| path.contains(r"\vm00\")),
        "{:?}",
        world.leftovers()
    );
}
