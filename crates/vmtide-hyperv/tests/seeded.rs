//! Seeded runs of the cycle: a VM lives its life, writes, changes its disks and its name, the host misbehaves in every way
//! the stand-in knows, and jobs are killed, lose answers and find the repository full. Its disks are VHDX chains. Each restore
//! point is compared byte by byte with what the guest had written, and after each backup everything that must hold is
//! looked at.
//!
//! There are two kinds of lives. In the one vmtide alone backs the VM up, and is told so: then nothing at all is left. In the
//! other one other products work on it, too, above all in the moments in which it is hard to tell whose something is: then
//! nothing of theirs is touched, and what cannot be told is left and named.
//!
//! 300 runs of each are part of the tests. All 10,000:
//! `cargo test -p vmtide-hyperv --release --test seeded -- --ignored`; a range of them with `VMTIDE_SEED=FIRST` and `VMTIDE_RUNS=COUNT`.

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
use support::host::{Cut, TestHost, bare, options};
use vmtide_hypervisor::{Changes, DiskId, Hypervisor, Journal};
use vmtide_standin_hyperv_host::{ChangesFault, Faults, PointIds, WorldOptions};

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
    reverted: usize,
    /// Checkpoints of ours of which nothing proved that: the call was not answered, so no job was named; the host names no
    /// results, and another program's job may have made it; the host has forgotten the job.
    doubtful_in_call: usize,
    doubtful_of_job: usize,
    doubtful_forgotten: usize,
    /// Reference points of ours of which nothing proved that.
    doubtful_points: usize,
    /// Checkpoints that other products made, and looks at which they were told of as perhaps ours.
    others: usize,
    others_told: usize,
    /// Reference points of other products that were told of as perhaps ours.
    points_of_others_told: usize,
}

/// Whether other products back the VM up, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Others {
    None,
    Work,
}

/// Something the host does wrong, or nothing.
fn any_faults(random: &mut Random, others: Others) -> Faults {
    let merge_ms = Some([0, 500, 3000, 20_000][random.below(4)]);
    let mut faults = Faults { merge_ms, ..Faults::default() };
    faults.nothing_named = random.once_in(4);
    faults.job_warnings = random.once_in(5);
    faults.over_report_bytes = random.once_in(5).then_some(4096);
    faults.changes_page = random.once_in(3).then(|| 1 + random.below(3));
    faults.foreign_at_refusal = random.once_in(10);
    faults.foreign_beside = random.once_in(12);
    faults.foreign_at_conversion = random.once_in(60);
    if others == Others::None {
        faults.foreign_at_refusal = false;
        faults.foreign_beside = false;
        faults.foreign_at_conversion = false;
    }
    faults.disk_at_checkpoint = random.once_in(20);
    match random.below(28) {
        0 => faults.changes = Some(ChangesFault::InvalidId),
        1 => faults.changes = Some(ChangesFault::Disabled),
        2 => faults.changes = Some(ChangesFault::Missing),
        3 => faults.changes = Some(ChangesFault::NothingProcessed),
        4 => faults.point_ids = PointIds::Empty,
        5 => faults.point_ids = PointIds::Shorter,
        6 => faults.point_kind = Some(1),
        7 => faults.conversion_code = Some(32775),
        8 => faults.vss_fails = true,
        9 => faults.point_consistency = Some(2),
        10 => faults.sharing_violation = true,
        11 => faults.point_destruction_code = Some(32775),
        12 => faults.creation_code = Some(32768),
        13 => faults.jobs_vanish = true,
        14 => faults.skipped_disk = Some(random.below(3)),
        15 => faults.unsorted_ranges = true,
        16 => faults.ranges_outside = true,
        17 => faults.conversion_job = Some(32768),
        18 => faults.synchronous = true,
        19 => faults.affected_without_effect = true,
        20 => faults.creation_job = Some(32768),
        21 => faults.point_ids = PointIds::Blank,
        22 => faults.most_recent_differs = true,
        23 => {
            let methods = ["CreateSnapshot", "ConvertToReferencePoint", "DestroyReferencePoint"];
            faults.lost_answer = Some((methods[random.below(3)].into(), random.once_in(2)));
        }
        _ => {}
    }
    faults
}

/// Something that happens to a VM between two backups.
fn any_event(host: &TestHost, random: &mut Random, met: &mut Met) {
    let (world, vm) = (host.world(), host.id(0));
    let disks = host.disks(0);
    let of_users = || -> Vec<_> {
        let all = world.snapshots(vm).into_iter();
        all.filter(|(_, _, recovery)| !recovery).map(|(id, _, _)| id).collect()
    };
    match random.below(20) {
        0 => world.rename(vm, &format!("vm{}", random.below(1000))),
        1 => host.swap(0, random.below(disks), random.below(disks)),
        2 => {
            let disk = random.below(disks);
            world.resize(vm, disk, host.size(0, disk) as u64 + 4096);
        }
        3 if disks < 4 => {
            let location = 20 + random.below(20) as u32;
            if (0..disks).all(|disk| host.location(0, disk) != location) {
                host.add_disk(0, location, SIZE);
            }
        }
        4 if disks > 1 => world.detach(vm, random.below(disks)),
        5 | 6 if of_users().len() < 3 => {
            host.pass(60_000);
            let _ = world.user_checkpoint(vm);
        }
        7 => {
            if let Some(id) = of_users().pop() {
                world.remove_checkpoint(id);
            }
        }
        8..=10 => {
            // Only where no backup holds the VM, and nothing is being merged.
            for (id, _) in others(host) {
                world.remove_checkpoint(id);
            }
            host.pass(60_000);
            if world.snapshots(vm).iter().any(|(_, _, recovery)| *recovery) {
                return;
            }
            if of_users().is_empty() {
                // One to go back to: at once, or after the backups that follow.
                let _ = world.user_checkpoint(vm);
                if random.once_in(2) {
                    return;
                }
                write_some(host, random);
            }
            let all = of_users();
            if !all.is_empty() {
                world.revert(all[random.below(all.len())]);
                met.reverted += 1;
            }
        }
        11 => {
            world.set_running(vm, false);
            world.set_running(vm, true);
        }
        12 => world.crash(),
        13 => world.live_migrate(vm),
        14 => world.configure(|options| options.short_point_ids = true),
        _ => {}
    }
}

fn write_some(host: &TestHost, random: &mut Random) {
    for _ in 0..random.below(6) {
        let disk = random.below(host.disks(0));
        let offset = random.below(host.size(0, disk) - 600);
        let bytes = vec![random.next() as u8; 1 + random.below(600)];
        host.write(0, disk, offset, &bytes);
    }
}

/// A guest that goes on writing while it is backed up.
fn busy_guest(seed: u64) -> Box<dyn FnMut(&TestHost) + Send> {
    let mut random = Random(seed);
    Box::new(move |host| {
        if random.once_in(10) {
            let disk = random.below(host.disks(0));
            let offset = random.below(host.size(0, disk) - 8);
            host.write(0, disk, offset, &random.next().to_le_bytes());
        }
    })
}

/// The administrator removes a checkpoint of which nothing tells that it is ours, where vmtide has told of it.
fn clear_doubt(host: &TestHost, machine: &Machine, met: &mut Met) {
    let others = others(host);
    // Where there are none, nobody has to look after what vmtide left.
    if machine.only_backup_program || host.nameless(0).is_empty() && others.is_empty() {
        return;
    }
    let report = machine.hypervisor().reap();
    if let Ok(report) = report {
        let told =
            |name: &str| report.notes.iter().any(|line| line.contains(name) && may_be_ours(line));
        if let Some(name) = host.nameless(0).pop() {
            assert!(told(&name), "{report:?}");
            *why_doubtful(host, machine, met) += 1;
        } else {
            met.others_told += others.iter().filter(|(_, name)| told(name)).count();
        }
    }
    host.remove_nameless(0);
    host.pass(60_000);
}

fn may_be_ours(line: &str) -> bool {
    line.contains("may be another program's")
}

/// Checkpoints for backups of other products, but for the one that was there from the beginning: their ids and names.
fn others(host: &TestHost) -> Vec<(uuid::Uuid, String)> {
    let all = host.world().snapshots(host.id(0)).into_iter();
    all.filter(|(id, name, recovery)| {
        *recovery && host.world().is_by_other(*id) && !name.ends_with("- Backup")
    })
    .map(|(id, name, _)| (id, name))
    .collect()
}

/// Why nothing proves that the checkpoint of a killed job is ours, by what its journal knows.
fn why_doubtful<'a>(host: &TestHost, machine: &Machine, met: &'a mut Met) -> &'a mut usize {
    let target = format!("hyper-v:{}", host.id(0));
    let journals = Journal::leftovers(machine.state.path(), &target).unwrap();
    let mut steps = journals.iter().flat_map(|journal| &journal.entry().steps);
    let last = steps.rfind(|step| {
        let name = step["step"].as_str().unwrap();
        ["checkpointing", "checkpoint-job"].contains(&name)
    });
    let job = last.and_then(|step| step.get("job")).map(|job| job.to_string());
    match job {
        None => &mut met.doubtful_in_call,
        Some(job) if host.world().jobs().iter().any(|id| job.contains(id)) => {
            &mut met.doubtful_of_job
        }
        Some(_) => &mut met.doubtful_forgotten,
    }
}

/// Other products do what they do, above all in the moments in which it is hard to tell from ours.
fn let_others_work(host: &TestHost, random: &mut Random, work: Others, failed: bool) {
    if work == Others::None {
        return;
    }
    if random.once_in(2) {
        // Theirs is done, and they remove what they made.
        for (id, _) in others(host) {
            host.world().remove_checkpoint(id);
        }
    }
    if failed && random.once_in(5) {
        host.world().foreign_recovery_checkpoint(host.id(0));
    } else if failed && random.once_in(5) {
        host.world().foreign_reference_point(host.id(0));
    }
}

fn one_backup(host: &TestHost, machine: &mut Machine, random: &mut Random, met: &mut Met) {
    clear_doubt(host, machine, met);
    let others_work = if machine.only_backup_program { Others::None } else { Others::Work };
    let_others_work(host, random, others_work, false);
    let (known, id) = (others(host).len(), host.id(0).to_string());
    host.set_guest(Some(busy_guest(random.next())));
    host.set_faults(any_faults(random, others_work));
    machine.commit_fails = random.once_in(12);
    machine.killed_after_commit = random.once_in(15);
    machine.host_dies = random.once_in(3);
    machine.full = random.once_in(15);
    machine.allow_downgrade = !random.once_in(5);
    let call = 1 + random.below(170) as u64;
    host.cut(match random.below(8) {
        0 => Some(Cut::DieBefore(call)),
        1 => Some(Cut::DieAfter(call)),
        2 => Some(Cut::LoseAnswer(call)),
        _ => None,
    });
    let had = machine.points.len();
    let done = machine.backup(&id);
    let failed = done.is_err();
    match done {
        Ok(outcome) if outcome.full.is_empty() => met.incremental += 1,
        Ok(_) => met.full += 1,
        Err(_) => met.failed += 1,
    }
    met.committed += machine.points.len() - had;
    met.killed += usize::from(host.is_dead());
    let_others_work(host, random, others_work, failed || host.is_dead());
    met.others += others(host).len().saturating_sub(known);
    assert!(machine.base_is_alive(0), "the base of the newest restore point is gone");
    host.cut(None);
    host.set_guest(None);
}

/// A backup without any fault puts everything right.
fn assert_all_is_right(host: &TestHost, machine: &mut Machine, foreign: &[String], met: &mut Met) {
    host.set_faults(Faults { merge_ms: Some(1000), ..Faults::default() });
    (machine.commit_fails, machine.killed_after_commit, machine.full) = (false, false, false);
    (machine.host_dies, machine.allow_downgrade) = (false, true);
    let id = host.id(0).to_string();
    // A job or a merge of a job that was killed may be under way.
    host.pass(60_000);
    clear_doubt(host, machine, met);
    for (id, _) in others(host) {
        host.world().remove_checkpoint(id);
    }
    host.pass(60_000);
    let outcome = machine.backup(&id).unwrap();
    assert_eq!(outcome.left, Vec::<String>::new());
    met.without_base += usize::from(!outcome.full.is_empty());
    let newest = machine.points.last().unwrap();
    assert_eq!(newest.disks.len(), host.disks(0));
    for disk in 0..host.disks(0) {
        let id = DiskId(format!("scsi0:{}", host.location(0, disk)));
        assert!(newest.disks[&id].bytes == host.data(0, disk), "{id} is not what was written");
    }
    let tokens = newest.disks.values().filter_map(|disk| disk.tracking.as_ref());
    let mut needed: Vec<_> = tokens.map(point_of).collect();
    assert_eq!(needed.len(), newest.disks.len(), "{:?}", outcome.warnings);
    needed.dedup();
    let points = host.points(0);
    for point in needed.iter().chain(foreign) {
        assert!(points.contains(point), "{point} is gone");
    }
    let is_ours = |name: &String| !name.ends_with("- Backup");
    let left: Vec<_> = host.leftovers().into_iter().filter(is_ours).collect();
    assert_eq!(left, Vec::<String>::new(), "left on the host");
    // A reference point that nothing proves to be ours is told until the administrator has removed it.
    let told = machine.hypervisor().reap().unwrap().notes;
    let of_others: Vec<_> =
        host.world().points_of_others(host.id(0)).iter().map(|point| bare(point)).collect();
    for point in points.iter().filter(|one| !needed.contains(one) && !foreign.contains(one)) {
        let is_told = told.iter().any(|line| line.to_lowercase().contains(point.as_str()));
        assert!(!machine.only_backup_program, "{point} is left: {told:?}");
        if of_others.contains(point) {
            met.points_of_others_told += usize::from(is_told);
        } else {
            assert!(is_told, "{point} is left: {told:?}");
            met.doubtful_points += 1;
        }
        host.remove_point(0, point);
    }
    assert_eq!(host.world().harm(), 0, "something of another product was touched");
    host.pass(3600 * 1000);
    let report = machine.hypervisor().reap().unwrap();
    assert_eq!(machine.state_files("journal"), Vec::<String>::new(), "{report:?}");
}

fn one_run(seed: u64, others: Others, met: &mut Met) {
    let mut random = Random(seed);
    let host = TestHost::with(WorldOptions {
        seed,
        granularity_bytes: [1, 512, 4096, 65_536][random.below(4)],
        points_name_checkpoint_disks: random.once_in(2),
        resize_loses_ids: random.once_in(2),
        ids_survive_revert: random.once_in(2),
        ..options()
    });
    let sizes: Vec<usize> = (0..1 + random.below(3)).map(|n| SIZE + n * 4096).collect();
    host.add_vm("web", &sizes);
    host.set_agentless(random.once_in(4));
    // With another product's checkpoint no user can go back to one of his.
    if random.once_in(2) {
        host.add_foreign(0);
    }
    let foreign = host.points(0);
    let mut machine = Machine::new(&host);
    machine.only_backup_program = others == Others::None;
    for _ in 0..2 + random.below(4) {
        write_some(&host, &mut random);
        any_event(&host, &mut random, met);
        write_some(&host, &mut random);
        one_backup(&host, &mut machine, &mut random, met);
        host.pass(random.below(100_000) as u64);
        if random.once_in(4) {
            // Somebody runs `reap`, perhaps killed, too.
            host.cut(random.once_in(2).then(|| Cut::DieAfter(1 + random.below(30) as u64)));
            let _ = machine.hypervisor().reap();
            host.cut(None);
        }
    }
    write_some(&host, &mut random);
    assert_all_is_right(&host, &mut machine, &foreign, met);
}

fn runs(count: u64, others: Others) {
    let number = |name| std::env::var(name).ok().and_then(|text: String| text.parse().ok());
    let (first, count) =
        (number("VMTIDE_SEED").unwrap_or(1), number("VMTIDE_RUNS").unwrap_or(count));
    let mut met = Met::default();
    for seed in first..first + count {
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            one_run(seed, others, &mut met)
        }));
        assert!(
            run.is_ok(),
            "seed {seed} with others {others:?} failed (repeat it with VMTIDE_SEED={seed})"
        );
    }
    println!("{count} runs with others {others:?}: {met:?}");
    let least = count as usize / 5;
    if count < 100 {
        return;
    }
    assert!(
        met.committed > count as usize && met.failed > least && met.killed > least / 2,
        "{met:?}"
    );
    assert!(
        met.incremental > least && met.full > least && met.without_base > least / 10,
        "{met:?}"
    );
    let doubtful = met.doubtful_in_call + met.doubtful_of_job + met.doubtful_forgotten;
    let is_as_told = match others {
        Others::None => doubtful + met.doubtful_points + met.others == 0,
        Others::Work => doubtful > 0 && met.others > 0,
    };
    assert!(met.reverted > count as usize / 20 && is_as_told, "{met:?}");
}

#[test]
fn three_hundred_seeded_runs_leave_nothing_and_lose_nothing() {
    runs(300, Others::None);
}

#[test]
fn three_hundred_seeded_runs_beside_other_products_touch_nothing_of_theirs() {
    runs(300, Others::Work);
}

#[test]
#[ignore = "takes minutes; the command is at the top of this file"]
fn ten_thousand_seeded_runs_leave_nothing_and_lose_nothing() {
    runs(10_000, Others::None);
}

#[test]
#[ignore = "takes minutes; the command is at the top of this file"]
fn ten_thousand_seeded_runs_beside_other_products_touch_nothing_of_theirs() {
    runs(10_000, Others::Work);
}

#[test]
fn eight_disks_show_one_moment_under_load() {
    const DISKS: usize = 8;
    let world = TestHost::new();
    let sizes: Vec<usize> = (0..DISKS).map(|n| (4 << (n % 4)) * 1024).collect();
    world.add_vm("db", &sizes);
    let mut machine = Machine::new(&world);
    // The guest counts, one disk after the other, at every call to the host and between.
    let mut counter = 0_u64;
    world.set_guest(Some(Box::new(move |world| {
        for _ in 0..3 {
            counter += 1;
            let disk = counter as usize % DISKS;
            world.write(0, disk, 0, &counter.to_le_bytes());
            let slot = 64 + counter as usize / DISKS % 50 * 8;
            world.write(0, disk, slot, &counter.to_le_bytes());
        }
    })));
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
    world.set_guest(None);
    machine.backup("db").unwrap();
    for disk in 0..DISKS {
        world.write(0, disk, 1000, &[9; 1000]);
    }
    assert_eq!(machine.backup("db").unwrap().read_bytes, 8 * 1000);
}

#[test]
fn fifty_vms_four_at_a_time_wait_for_nobodys_merge() {
    let world = TestHost::new();
    for n in 0..50 {
        world.add_vm(&format!("vm{n:02}"), &[SIZE, SIZE]);
    }
    let state = tempfile::tempdir().unwrap();
    let hypervisor = hypervisor(&world, state.path());
    let machine = Machine::new(&world);
    let next = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let done = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    // The merge of the first one takes longer than everything.
    world.faults(|faults| faults.merge_ms = Some(24 * 3600 * 1000));
    let request = machine.request("vm00");
    let mut first = hypervisor.freeze(&request).unwrap();
    first.seal().unwrap();
    let left = first.commit().unwrap();
    assert!(left[0].contains("merged"), "{left:?}");
    world.faults(|faults| faults.merge_ms = Some(1000));
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
