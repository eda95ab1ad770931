//! Hosts on which something is not as it was, or not as it should be: VMs that were taken back to a checkpoint, have moved
//! or have a twin, VMs that cannot be read, directories that may not be listed.

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

use support::driver::{Machine, Outcome};
use support::host::{Cut, TestHost, options};
use uuid::Uuid;
use vmtide_hypervisor::{
    FullReason, HealthState, Hypervisor, HypervisorError, JobId, Journal, VmSelector,
};
use vmtide_standin_hyperv_host::{VmSpec, WorldOptions};

const SIZE: usize = 64 * 1024;

/// A host whose tracking ids outlive a revert or do not, with one VM, and a machine that backs it up over the network or
/// not.
fn revertible(ids_survive_revert: bool, agentless: bool) -> (TestHost, Machine) {
    let world = TestHost::with(WorldOptions { ids_survive_revert, ..options() });
    world.add_vm("web", &[SIZE, SIZE]);
    world.set_agentless(agentless);
    world.write(0, 0, 100, b"first");
    let machine = Machine::new(&world);
    (world, machine)
}

fn user_checkpoint(world: &TestHost) -> Uuid {
    let made = world.world().user_checkpoint(world.id(0)).unwrap();
    world.pass(10_000);
    made
}

fn assert_lost(outcome: &Outcome, what: &str) {
    assert_eq!(outcome.full.len(), 2, "{what}: {:?}", outcome.full);
    for reason in outcome.full.values() {
        assert!(reason.is_loss(), "{what}: {reason:?}");
    }
}

#[test]
fn a_vm_that_was_taken_back_to_a_checkpoint_is_read_in_full_whatever_the_host_says() {
    for (survive, agentless) in [(true, false), (true, true), (false, false), (false, true)] {
        // How many backups are made after the checkpoint: the ids of the last one are given once more.
        for backups in 1..4 {
            let what = format!("{survive} {agentless} {backups}");
            let (world, mut machine) = revertible(survive, agentless);
            machine.backup("web").unwrap();
            let checkpoint = user_checkpoint(&world);
            for round in 0..backups {
                world.write(0, 0, 8192 * (round + 1), b"thrown away");
                let outcome = machine.backup("web").unwrap();
                assert!(outcome.full.is_empty(), "{what}: {:?}", outcome.full);
            }
            world.world().revert(checkpoint);
            world.write(0, 1, 300, b"after it");
            assert_lost(&machine.backup("web").unwrap(), &what);
            world.write(0, 1, 900, b"and on");
            let outcome = machine.backup("web").unwrap();
            assert!(outcome.full.is_empty(), "{what}: {:?}", outcome.full);
        }
    }
}

#[test]
fn a_vm_that_was_taken_back_to_a_checkpoint_that_is_gone_is_read_in_full() {
    for agentless in [false, true] {
        let (world, mut machine) = revertible(true, agentless);
        let checkpoint = user_checkpoint(&world);
        machine.backup("web").unwrap();
        world.write(0, 0, 8192, b"thrown away");
        machine.backup("web").unwrap();
        world.world().revert(checkpoint);
        world.world().remove_checkpoint(checkpoint);
        world.pass(60_000);
        world.write(0, 1, 300, b"after it");
        assert_lost(&machine.backup("web").unwrap(), "removed");
    }
}

#[test]
fn a_point_of_another_product_is_left_alone_although_it_has_ids_that_ours_had() {
    let (world, mut machine) = revertible(true, false);
    machine.backup("web").unwrap();
    let checkpoint = user_checkpoint(&world);
    // Nothing proves whose point it is that appears, so it is told of from now on.
    world.faults(|faults| faults.foreign_at_conversion = true);
    let outcome = machine.backup("web").unwrap();
    assert!(outcome.left.iter().any(|line| line.contains("may be another program's")));
    world.pass(60_000);
    let before = world.points(0);
    // The VM goes back, and the host gives the ids of the checkpoint that is gone to the next one.
    world.world().revert(checkpoint);
    world.world().foreign_reference_point(world.id(0)).unwrap();
    world.pass(24 * 3600 * 1000);
    let report = machine.hypervisor().reap().unwrap();
    assert_eq!(world.points(0).len(), before.len() + 1, "{report:?}");
    assert_eq!(world.world().harm(), 0, "{report:?}");
    machine.backup("web").unwrap();
    assert_eq!(world.world().harm(), 0);
}

#[test]
fn a_branch_that_the_vm_has_left_shows_although_its_files_are_there() {
    for agentless in [false, true] {
        let (world, mut machine) = revertible(true, agentless);
        let first = user_checkpoint(&world);
        machine.backup("web").unwrap();
        // The file that was frozen is held by this one, and the VM leaves that branch.
        user_checkpoint(&world);
        world.write(0, 0, 8192, b"thrown away");
        world.world().revert(first);
        world.write(0, 1, 300, b"after it");
        assert_lost(&machine.backup("web").unwrap(), "another branch");
    }
}

#[test]
fn checkpoints_that_are_only_made_cost_nothing() {
    for agentless in [false, true] {
        let (world, mut machine) = revertible(true, agentless);
        machine.backup("web").unwrap();
        for round in 0..3 {
            // Another one with each backup, and then a backup without.
            let checkpoint = user_checkpoint(&world);
            for part in 0..2 {
                world.write(0, 0, 4096 * round + 100 * part, b"more");
                let outcome = machine.backup("web").unwrap();
                assert!(outcome.full.is_empty(), "{round}.{part}: {:?}", outcome.full);
            }
            if round == 2 {
                // Whether it was only removed, or applied before, nothing tells.
                world.world().remove_checkpoint(checkpoint);
                world.pass(60_000);
                assert_lost(&machine.backup("web").unwrap(), "removed");
            }
        }
        let outcome = machine.backup("web").unwrap();
        assert!(outcome.full.is_empty(), "{:?}", outcome.full);
    }
}

#[test]
fn what_was_thrown_away_since_the_base_was_not_there_at_the_base() {
    // Back to a checkpoint that is younger than the base: all that changed since the base is tracked.
    let (world, mut machine) = revertible(true, false);
    machine.backup("web").unwrap();
    world.write(0, 0, 4096, b"kept");
    let checkpoint = user_checkpoint(&world);
    world.write(0, 0, 8192, b"thrown away");
    let mut weekly = Machine::new(&world);
    weekly.lineage = "fedcba9876543210".into();
    weekly.backup("web").unwrap();
    world.world().revert(checkpoint);
    world.write(0, 1, 300, b"after it");
    let outcome = machine.backup("web").unwrap();
    assert!(outcome.full.is_empty(), "{:?}", outcome.full);
    assert_lost(&weekly.backup("web").unwrap(), "weekly");
}

/// Two hosts with one VM of the same id, and a machine that backs it up on the first.
fn twins() -> (TestHost, TestHost, Machine) {
    let id = Uuid::from_u128(0x7717);
    let host = |name: &str, seed: u64| {
        let host_name = name.to_owned();
        let host = TestHost::with(WorldOptions { host_name, seed, ..options() });
        host.add(&VmSpec { id: Some(id), ..VmSpec::new("web", &[SIZE as u64]) });
        host
    };
    let (here, there) = (host("HV1", 1), host("HV2", 2));
    here.write(0, 0, 0, b"here");
    there.write(0, 0, 0, b"there");
    let machine = Machine::new(&here);
    (here, there, machine)
}

/// A job that is killed while its checkpoint stands; its id.
fn kill_while_frozen(machine: &Machine) -> JobId {
    let request = machine.request("web");
    let frozen = machine.hypervisor().freeze(&request).unwrap();
    machine.world.cut(Some(Cut::DieBefore(1)));
    drop(frozen);
    machine.world.cut(None);
    request.job
}

#[test]
fn what_a_job_left_on_one_host_is_not_forgotten_on_a_twin_of_the_vm() {
    let (here, there, mut machine) = twins();
    machine.backup("web").unwrap();
    let job = kill_while_frozen(&machine);
    let left = format!("vmtide {job}");
    assert!(here.leftovers().contains(&left));
    machine.world = there.clone();
    let outcome = machine.backup("web").unwrap();
    assert!(matches!(outcome.full["scsi0:0"], FullReason::TrackingLost(_)), "{:?}", outcome.full);
    assert_eq!(outcome.warnings, Vec::<String>::new());
    assert_eq!(machine.state_files("journal"), [format!("{job}.json")]);
    let report = machine.hypervisor().reap().unwrap();
    assert!(report.notes.iter().any(|note| note.contains("hv1")), "{report:?}");
    // There is the proof that it is ours, on its own host.
    machine.world = here.clone();
    let report = machine.hypervisor().reap().unwrap();
    assert!(report.removed.iter().any(|line| line.contains(&left)), "{report:?}");
    here.pass(60_000);
    machine.hypervisor().reap().unwrap();
    assert_eq!(machine.state_files("journal"), Vec::<String>::new());
    assert_eq!(here.leftovers(), Vec::<String>::new());
    // Nor are the reference points of either: each host has one at the end.
    assert_eq!((here.points(0).len(), there.points(0).len()), (1, 1));
    for host in [&here, &there, &here, &there] {
        machine.world = host.clone();
        machine.backup("web").unwrap();
        assert_eq!((here.points(0).len(), there.points(0).len()), (1, 1));
    }
}

#[test]
fn a_journal_of_another_host_is_forgotten_only_on_request() {
    let (_, there, mut machine) = twins();
    kill_while_frozen(&machine);
    machine.world = there;
    assert_eq!(machine.hypervisor().reap().unwrap().notes.len(), 1);
    let report = machine.hypervisor().reap_orphans().unwrap();
    assert!(report.removed[0].contains("journal") && report.notes.is_empty(), "{report:?}");
    assert_eq!(machine.state_files("journal"), Vec::<String>::new());
}

#[test]
fn a_checkpoint_that_moved_with_its_vm_is_removed_where_the_vm_is_now() {
    let (here, there, mut machine) = twins();
    let request = machine.request("web");
    let frozen = machine.hypervisor().freeze(&request).unwrap();
    here.world().remove_vm(here.id(0));
    there.faults(|faults| faults.merge_ms = Some(0));
    there.add_named(0, &format!("vmtide {}", request.job), 60);
    frozen.check().unwrap_err();
    let error = frozen.abort().unwrap_err().to_string();
    assert!(error.contains("is not there"), "{error}");
    assert_eq!(machine.state_files("journal").len(), 1);
    machine.world = there.clone();
    machine.backup("web").unwrap();
    assert_eq!(there.leftovers(), Vec::<String>::new());
    assert_eq!(machine.state_files("journal"), Vec::<String>::new());
}

#[test]
fn a_vm_that_cannot_be_read_is_listed_with_the_reason_and_the_others_go_on() {
    for agentless in [false, true] {
        let world = TestHost::new();
        for name in ["web1", "web2", "db"] {
            world.add_vm(name, &[SIZE]);
        }
        world.set_agentless(agentless);
        world.world().set(world.id(1), "Version", "");
        let machine = Machine::new(&world);
        let hypervisor = machine.hypervisor();
        let selected = |text: &str| {
            let selector: VmSelector = text.parse().unwrap();
            let found = hypervisor.select(&selector).unwrap().into_iter();
            found.map(|vm| (vm.problem().is_some(), vm.name)).collect::<Vec<_>>()
        };
        let pair = |problem: bool, name: &str| (problem, name.to_owned());
        assert_eq!(selected("web*"), [pair(false, "web1"), pair(true, "web2")]);
        assert_eq!(selected("all").len(), 3);
        assert_eq!(selected(&world.id(1).to_string()), [pair(true, "web2")]);
        let listed = hypervisor.list().unwrap();
        assert!(listed.iter().any(|vm| vm.problem().is_some_and(|why| why.contains("Version"))));
        let report = hypervisor.reap().unwrap();
        assert!(report.notes.len() == 1 && report.notes[0].contains("web2"), "{report:?}");
        let checks = hypervisor.examine(None);
        let told = |check: &&vmtide_hypervisor::HealthCheck| check.detail.contains("web2 cannot");
        let check = checks.iter().find(told).unwrap();
        assert_eq!(check.state, HealthState::Fail);
        for (name, good) in [("web1", true), ("web2", false), ("db", true)] {
            let mut machine = Machine::new(&world);
            assert_eq!(machine.backup(name).is_ok(), good, "{name}");
        }
    }
}

#[test]
fn a_directory_that_may_not_be_listed_is_told_and_a_known_restore_refused() {
    let world = TestHost::new();
    world.add_vm("web", &[SIZE]);
    let mut machine = Machine::new(&world);
    machine.backup("web").unwrap();
    let directory = r"C:\VMs\web\Virtual Hard Disks".to_owned();
    world.faults(|faults| {
        faults.unlistable.insert(directory.clone());
    });
    let outcome = machine.backup("web").unwrap();
    let told = outcome.warnings.iter().any(|line| line.contains(&directory));
    assert!(told && outcome.full.is_empty(), "{outcome:?}");
    // The journal of a killed restore, as it is written.
    let mut journal =
        Journal::begin(machine.state.path(), JobId::random(), "restore to stand-in HV1").unwrap();
    let id = world.id(0);
    journal.record(serde_json::json!({"step": "begin", "name": "web"})).unwrap();
    journal.record(serde_json::json!({"step": "in-place", "id": id, "files": []})).unwrap();
    let error = machine.backup("web").unwrap_err();
    assert!(matches!(error, HypervisorError::Failed { .. }), "{error}");
    assert!(error.to_string().contains("restore of it was not finished"), "{error}");
}

#[test]
fn both_forms_of_answers_name_the_host_alike() {
    let (_, there, _) = twins();
    for agentless in [false, true] {
        there.set_agentless(agentless);
        let mut machine = Machine::new(&there);
        machine.backup("web").unwrap();
        let ledger = std::fs::read_dir(machine.state.path().join("hyper-v")).unwrap();
        let text = std::fs::read_to_string(ledger.last().unwrap().unwrap().path()).unwrap();
        assert!(text.contains(r#""host": "hv2""#), "{text}");
    }
}
