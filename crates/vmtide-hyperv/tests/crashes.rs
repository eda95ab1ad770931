//! A backup that is killed, or loses an answer, at every single call to the host: before the call took effect and after.
//! The next backup removes what was left, and what it stores is whole.

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

use support::driver::{Machine, point_of};
use support::host::{Cut, TestHost};
use vmtide_hypervisor::Hypervisor;
use vmtide_standin_hyperv_host::Faults;

const SIZE: usize = 16 * 1024;

/// A host with one VM that has been backed up once and written to since, and things of another product.
fn prepared() -> (TestHost, Machine) {
    let world = TestHost::new();
    world.add_vm("web", &[SIZE, 2 * SIZE]);
    world.add_foreign(0);
    world.write(0, 0, 0, b"before the first backup");
    let mut machine = Machine::new(&world);
    machine.backup("web").unwrap();
    world.write(0, 1, 9000, b"since the first backup");
    (world, machine)
}

/// What must hold after a backup that was cut short somehow, when time has passed and the next one has run. Answers whether
/// a checkpoint was left of which nothing proves whose it is.
fn assert_recovers(world: &TestHost, machine: &mut Machine, what: &str) -> bool {
    let foreign = world.points(0).first().cloned().unwrap();
    assert!(machine.base_is_alive(0), "{what}: the base was destroyed early");
    world.cut(None);
    world.pass(10_000);
    let doubtful = is_left_in_doubt(world, machine, what);
    world.write(0, 0, 512, b"after the cut");
    machine.killed_after_commit = false;
    let had_base =
        machine.points.last().unwrap().disks.values().all(|disk| disk.tracking.is_some());
    assert!(had_base || machine.host_dies, "{what}: the moment was not named");
    let outcome = machine.backup("web").unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(outcome.full.is_empty(), had_base, "{what}: the base was lost: {:?}", outcome.full);
    let last = machine.points.last().unwrap();
    for (disk, stored) in last.disks.values().enumerate() {
        assert!(stored.bytes == world.data(0, disk), "{what}: the restore point is not the disk");
    }
    let mut needed: Vec<_> =
        last.disks.values().map(|disk| point_of(disk.tracking.as_ref().unwrap())).collect();
    needed.dedup();
    let mut points = world.points(0);
    points.retain(|point| *point != foreign);
    assert_eq!(points, needed, "{what}: reference points");
    assert_eq!(world.leftovers(), ["web - Backup"], "{what}: left on the host");
    // A journal stays only as long as the host could still be making something.
    world.pass(3600 * 1000);
    machine.hypervisor().reap().unwrap();
    assert_eq!(machine.state_files("journal"), Vec::<String>::new(), "{what}");
    doubtful
}

/// Whether a killed job left a checkpoint of which nothing tells that it is ours: it is left alone and named, and the
/// administrator removes it.
fn is_left_in_doubt(world: &TestHost, machine: &Machine, what: &str) -> bool {
    if world.nameless(0).is_empty() {
        return false;
    }
    let report = machine.hypervisor().reap().unwrap();
    let Some(name) = world.nameless(0).pop() else { return false };
    let told = |line: &String| line.contains(&name) && line.contains("may be another program's");
    assert!(report.notes.iter().any(told), "{what}: {report:?}");
    assert_eq!(machine.state_files("journal").len(), 1, "{what}");
    world.remove_nameless(0);
    world.pass(10_000);
    true
}

#[test]
fn a_backup_that_is_killed_at_any_call_leaves_nothing_after_the_next() {
    let (world, mut machine) = prepared();
    world.cut(None);
    machine.backup("web").unwrap();
    let calls = world.calls();
    assert!(calls > 40, "{calls}");
    let mut doubtful = 0;
    for call in 1..=calls {
        for cut in [Cut::DieBefore(call), Cut::DieAfter(call)] {
            let (world, mut machine) = prepared();
            world.cut(Some(cut));
            // It may come to a committed restore point, and may not.
            let _ = machine.backup("web");
            assert!(world.is_dead(), "{cut:?}");
            let left = assert_recovers(&world, &mut machine, &format!("{cut:?} of {calls}"));
            doubtful += usize::from(left);
        }
    }
    // Only where it was killed between the host's making of the checkpoint and the answer that names the job.
    assert_eq!(doubtful, 1);
}

#[test]
fn where_nobody_else_backs_up_nothing_is_left_in_doubt() {
    let (world, mut machine) = prepared();
    world.cut(None);
    machine.backup("web").unwrap();
    let calls = world.calls();
    for (call, is_silent) in (1..=calls).flat_map(|call| [(call, false), (call, true)]) {
        for cut in [Cut::DieBefore(call), Cut::DieAfter(call), Cut::LoseAnswer(call)] {
            let (world, mut machine) = prepared();
            machine.only_backup_program = true;
            // The host tells least: no results, no ids of the moment, and its jobs are forgotten.
            world.set_agentless(is_silent);
            world.faults(|faults| {
                (faults.nothing_named, faults.jobs_vanish) = (is_silent, is_silent)
            });
            world.world().configure(|options| options.points_name_checkpoint_disks = !is_silent);
            world.cut(Some(cut));
            let _ = machine.backup("web");
            world.set_faults(Faults::default());
            let left = assert_recovers(&world, &mut machine, &format!("{cut:?} of {calls}"));
            assert!(!left, "{cut:?}, silent: {is_silent}");
            assert_eq!(world.world().harm(), 0, "{cut:?}: what was there before was removed");
        }
    }
}

#[test]
fn a_host_that_goes_away_at_any_call_leaves_nothing_after_the_next_backup() {
    let (world, mut machine) = prepared();
    world.cut(None);
    machine.backup("web").unwrap();
    for call in 1..=world.calls() {
        let (world, mut machine) = prepared();
        machine.host_dies = true;
        world.cut(Some(Cut::DieAfter(call)));
        let _ = machine.backup("web");
        assert_recovers(&world, &mut machine, &format!("host lost after {call}"));
    }
}

#[test]
fn a_backup_that_loses_any_answer_leaves_nothing_after_the_next() {
    let (world, mut machine) = prepared();
    world.cut(None);
    machine.backup("web").unwrap();
    let calls = world.calls();
    let mut done = 0;
    for call in 1..=calls {
        let (world, mut machine) = prepared();
        world.cut(Some(Cut::LoseAnswer(call)));
        done += usize::from(machine.backup("web").is_ok());
        assert_recovers(&world, &mut machine, &format!("lost answer {call} of {calls}"));
    }
    // Answers about what was made or removed are not needed: it is looked for.
    assert!(done > 10, "{done} of {calls}");
}

#[test]
fn a_job_that_dies_between_its_commit_and_the_hosts_keeps_both_points_until_it_is_known() {
    let (world, mut machine) = prepared();
    machine.killed_after_commit = true;
    machine.backup("web").unwrap_err();
    assert_eq!(world.points(0).len(), 3, "the other product's, the old and the new");
    // Nobody can tell yet which of the two a restore point names.
    world.cut(None);
    machine.hypervisor().reap().unwrap();
    assert_eq!(world.points(0).len(), 3);
    assert_recovers(&world, &mut machine, "killed after the commit");
}

#[test]
fn a_job_whose_commit_failed_and_that_dies_while_it_undoes_is_undone() {
    let (world, mut machine) = prepared();
    world.cut(None);
    machine.commit_fails = true;
    machine.backup("web").unwrap_err();
    let calls = world.calls();
    for call in 1..=calls {
        let (world, mut machine) = prepared();
        machine.commit_fails = true;
        world.cut(Some(Cut::DieAfter(call)));
        machine.backup("web").unwrap_err();
        machine.commit_fails = false;
        assert_recovers(
            &world,
            &mut machine,
            &format!("failed commit, killed after {call} of {calls}"),
        );
    }
}

#[test]
fn the_reaping_itself_may_be_killed_at_any_call() {
    let (world, mut machine) = prepared();
    world.cut(None);
    machine.backup("web").unwrap();
    let calls = world.calls();
    // In the middle of reading there is most to remove.
    for call in 1..=calls / 2 {
        let (world, mut machine) = prepared();
        world.cut(Some(Cut::DieAfter(calls * 2 / 3)));
        let _ = machine.backup("web");
        world.cut(Some(Cut::DieAfter(call)));
        let _ = machine.hypervisor().reap();
        assert_recovers(&world, &mut machine, &format!("reaping killed after {call}"));
    }
}

/// How often a checkpoint of ours stays in doubt, with a kill at each call to a host that names no results of its jobs.
fn doubts_of_silent_hosts(prepare: impl Fn(&TestHost)) -> usize {
    let (world, mut machine) = prepared();
    world.cut(None);
    machine.backup("web").unwrap();
    let mut doubtful = 0;
    for call in 1..=world.calls() {
        let (world, mut machine) = prepared();
        world.faults(|faults| faults.nothing_named = true);
        prepare(&world);
        world.cut(Some(Cut::DieAfter(call)));
        let _ = machine.backup("web");
        world.cut(None);
        world.pass(10_000);
        machine.hypervisor().reap().unwrap();
        doubtful += world.nameless(0).len();
        assert_eq!(world.world().harm(), 0, "{call}: another product's was removed");
    }
    doubtful
}

#[test]
fn a_checkpoint_that_only_our_job_can_have_made_is_ours() {
    // But for the one of the call that named no job.
    assert_eq!(doubts_of_silent_hosts(|_| {}), 1);
    // With another product at work it may be theirs.
    let beside = |world: &TestHost| world.faults(|faults| faults.foreign_beside = true);
    assert!(doubts_of_silent_hosts(beside) > 1);
}

#[test]
fn a_point_that_nothing_proves_to_be_ours_is_left_alone_and_named() {
    for (names_results, names_checkpoint) in [(true, false), (false, true), (false, false)] {
        points_in_doubt(names_results, names_checkpoint);
    }
}

/// With a kill after each call over the network, where the files do not tell the ids that they were sealed under.
fn points_in_doubt(names_results: bool, names_checkpoint: bool) {
    let (world, mut machine) = prepared();
    world.set_agentless(true);
    world.cut(None);
    machine.backup("web").unwrap();
    let calls = world.calls();
    let mut left = 0;
    for call in 1..=calls {
        let (world, mut machine) = prepared();
        world.set_agentless(true);
        world.faults(|faults| faults.nothing_named = !names_results);
        world.world().configure(|options| options.points_name_checkpoint_disks = names_checkpoint);
        world.cut(Some(Cut::DieAfter(call)));
        let _ = machine.backup("web");
        world.cut(None);
        world.pass(10_000);
        is_left_in_doubt(&world, &machine, "killed without ids");
        let outcome = machine.backup("web").unwrap();
        let named = outcome.warnings.iter().filter(|text| {
            text.contains("reference point") && text.contains("may be another program's")
        });
        let (named, points) = (named.count(), world.points(0).len());
        assert_eq!(points, 2 + named, "killed after {call} of {calls}: {:?}", outcome.warnings);
        left += named;
        if named > 0 {
            // Backups say it once, and who looks after the host is told until it is gone.
            let outcome = machine.backup("web").unwrap();
            let says =
                |lines: &[String]| lines.iter().any(|line| line.contains("another program's"));
            assert!(!says(&outcome.warnings), "{:?}", outcome.warnings);
            assert_eq!(machine.state_files("journal").len(), 1);
            let report = machine.hypervisor().reap().unwrap();
            assert!(says(&report.notes), "{report:?}");
            let doubtful = world.points(0).remove(1);
            world.remove_point(0, &doubtful);
            assert_eq!(machine.hypervisor().reap().unwrap().notes, Vec::<String>::new());
            assert_eq!(machine.state_files("journal"), Vec::<String>::new(), "after {call}");
        }
    }
    // Where the host names no results, only of the conversion whose call named no job.
    let expected = usize::from(!names_results && !names_checkpoint);
    assert_eq!(left, expected, "{names_results} {names_checkpoint}");
}
