//! The cycle of backups on a stand-in host: what it makes, leaves and says, fault by fault.

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
use uuid::Uuid;
use vmtide_cim::CimValue;
use vmtide_hypervisor::{Consistency, DiskId, FullReason, Hypervisor, HypervisorError, VmSelector};
use vmtide_standin_hyperv_host::{ChangesFault, DiskSpec, Faults, PointIds};

const SIZE: usize = 64 * 1024;

/// A host with one VM of two disks and a machine that backs it up.
fn one_vm() -> (TestHost, Machine) {
    let world = TestHost::new();
    world.add_vm("web", &[SIZE, 2 * SIZE]);
    world.write(0, 0, 1000, b"first");
    let machine = Machine::new(&world);
    (world, machine)
}

/// Nothing but the newest reference point is left.
fn assert_clean(world: &TestHost, machine: &Machine) {
    assert_eq!(world.leftovers(), Vec::<String>::new());
    assert_eq!(machine.state_files("journal"), Vec::<String>::new());
    let newest = machine.points.last().unwrap();
    let mut needed: Vec<_> =
        newest.disks.values().filter_map(|disk| disk.tracking.as_ref()).map(point_of).collect();
    needed.dedup();
    assert_eq!(world.points(0), needed);
}

#[test]
fn an_incremental_reads_what_changed_and_leaves_one_reference_point() {
    let (world, mut machine) = one_vm();
    let first = machine.backup("web").unwrap();
    assert_eq!(first.full.get("scsi0:0"), Some(&FullReason::FirstBackup));
    assert_eq!((first.warnings, first.left), (vec![], vec![]));
    assert_clean(&world, &machine);
    world.write(0, 1, 70_000, &[7; 512]);
    let second = machine.backup("web").unwrap();
    assert!(second.full.is_empty(), "{:?}", second.full);
    assert_eq!(second.read_bytes, 512);
    assert_clean(&world, &machine);
    let is_removal =
        |event: &&String| event.contains("reference point") && event.ends_with("removed");
    assert_eq!(world.world().events().iter().filter(is_removal).count(), 1);
    let point = machine.points.last().unwrap();
    assert_eq!(point.consistency, Consistency::Application);
    let config = machine.hypervisor().describe("web").unwrap();
    assert_eq!((config.name.as_str(), config.disks.len()), ("web", 2));
}

#[test]
fn what_the_guest_writes_while_frozen_is_in_the_next_backup() {
    let (world, mut machine) = one_vm();
    machine.backup("web").unwrap();
    let mut at = 0;
    world.set_guest(Some(Box::new(move |world| {
        at += 1;
        world.write(0, at % 2, at * 64 % SIZE, &[at as u8; 32]);
    })));
    for _ in 0..5 {
        let outcome = machine.backup("web").unwrap();
        assert!(outcome.full.is_empty(), "{:?}", outcome.full);
    }
    world.set_guest(None);
    machine.backup("web").unwrap();
    let newest = machine.points.last().unwrap();
    for (disk, stored) in newest.disks.values().enumerate() {
        assert!(stored.bytes == world.data(0, disk));
    }
}

#[test]
fn every_fault_of_tracking_is_a_full_read_with_the_reason_and_never_a_failure() {
    let fails = |fault: ChangesFault| -> Box<dyn Fn(&TestHost)> {
        Box::new(move |world| world.faults(|faults| faults.changes = Some(fault)))
    };
    let resized: Box<dyn Fn(&TestHost)> =
        Box::new(|world| world.world().resize(world.id(0), 0, 2 * SIZE as u64));
    let cases = [
        ("lost", fails(ChangesFault::InvalidId)),
        ("not tracked", fails(ChangesFault::Disabled)),
        ("missing", fails(ChangesFault::Missing)),
        ("failed", fails(ChangesFault::Code(0xC03A_0024))),
        ("no progress", fails(ChangesFault::NothingProcessed)),
        ("resized", resized),
    ];
    for (name, fault) in cases {
        let (world, mut machine) = one_vm();
        machine.backup("web").unwrap();
        world.write(0, 0, 0, b"second");
        fault(&world);
        let outcome = machine.backup("web").unwrap();
        assert!(outcome.full["scsi0:0"].is_loss(), "{name}: {:?}", outcome.full);
        assert_clean(&world, &machine);
        world.faults(|faults| faults.changes = None);
        let outcome = machine.backup("web").unwrap();
        assert!(outcome.full.is_empty(), "{name}: {:?}", outcome.full);
    }
}

#[test]
fn pages_and_reports_of_too_much_are_no_reason_to_read_in_full() {
    let (world, mut machine) = one_vm();
    machine.backup("web").unwrap();
    for at in 0..50 {
        world.write(0, 1, at * 2048, b"page");
    }
    world.faults(|faults| faults.changes_page = Some(7));
    let outcome = machine.backup("web").unwrap();
    assert_eq!((outcome.full.len(), outcome.read_bytes), (0, 200));
    world.faults(|faults| faults.over_report_bytes = Some(65_536));
    world.write(0, 1, 0, b"more");
    let outcome = machine.backup("web").unwrap();
    assert_eq!((outcome.full.len(), outcome.read_bytes), (0, 65_536));
}

#[test]
fn a_reference_point_that_cannot_be_a_base_means_no_base_and_a_warning() {
    let faults: [(&str, fn(&mut Faults)); 5] = [
        ("no ids", |faults| faults.point_ids = PointIds::Empty),
        ("fewer ids", |faults| faults.point_ids = PointIds::Shorter),
        ("log-based", |faults| faults.point_kind = Some(1)),
        ("refused", |faults| faults.conversion_code = Some(32775)),
        ("failed", |faults| faults.conversion_job = Some(32768)),
    ];
    for (name, fault) in faults {
        let (world, mut machine) = one_vm();
        machine.backup("web").unwrap();
        world.faults(fault);
        let outcome = machine.backup("web").unwrap();
        assert!(outcome.full.is_empty(), "{name}: the base is still good");
        assert!(outcome.warnings.iter().any(|text| text.contains("read everything")), "{name}");
        assert_clean(&world, &machine);
        assert_eq!(world.points(0).len(), 0, "{name}");
        world.set_faults(Faults::default());
        let outcome = machine.backup("web").unwrap();
        assert_eq!(outcome.full["scsi0:0"], FullReason::NoTrackingId, "{name}");
        let outcome = machine.backup("web").unwrap();
        assert!(outcome.full.is_empty(), "{name}: {:?}", outcome.full);
    }
}

#[test]
fn hosts_that_name_nothing_warn_or_forget_their_jobs_are_understood() {
    let faults: [(&str, fn(&TestHost)); 7] = [
        ("unnamed", |world| world.faults(|faults| faults.nothing_named = true)),
        ("warnings", |world| world.faults(|faults| faults.job_warnings = true)),
        ("no jobs", |world| world.faults(|faults| faults.synchronous = true)),
        ("no effects", |world| world.faults(|faults| faults.affected_without_effect = true)),
        ("short ids", |world| world.world().configure(|options| options.short_point_ids = true)),
        ("agentless", |world| world.set_agentless(true)),
        ("nothing told", |world| {
            world.set_agentless(true);
            world.faults(|faults| faults.nothing_named = true);
        }),
    ];
    for (name, fault) in faults {
        let (world, mut machine) = one_vm();
        fault(&world);
        world.add_foreign(0);
        let foreign = world.points(0);
        for round in 0..3 {
            world.write(0, 0, round * 100, b"x");
            let outcome = machine.backup("web").unwrap();
            assert_eq!(outcome.full.is_empty(), round > 0, "{name}: {:?}", outcome.full);
        }
        assert_eq!(world.points(0).len(), 2, "{name}");
        assert!(world.points(0).contains(&foreign[0]), "{name}");
        assert_eq!(world.leftovers(), ["web - Backup"], "{name}");
    }
}

#[test]
fn less_consistency_is_had_only_where_it_is_allowed() {
    let (world, mut machine) = one_vm();
    world.faults(|faults| faults.vss_fails = true);
    machine.allow_downgrade = false;
    let error = machine.backup("web").unwrap_err();
    assert!(matches!(error, HypervisorError::ConsistencyNotReached { .. }), "{error}");
    assert!(error.to_string().contains("VSS did not answer"), "{error}");
    assert_eq!(world.leftovers(), Vec::<String>::new());
    machine.allow_downgrade = true;
    machine.backup("web").unwrap();
    assert_eq!(machine.points.last().unwrap().consistency, Consistency::Crash);
    assert_clean(&world, &machine);
    // A host that tells only in the reference point that the guest took no part.
    let (world, mut machine) = one_vm();
    world.faults(|faults| faults.point_consistency = Some(2));
    machine.allow_downgrade = false;
    assert!(matches!(machine.backup("web"), Err(HypervisorError::ConsistencyNotReached { .. })));
    assert_eq!((world.leftovers().len(), world.points(0).len()), (0, 0));
    machine.allow_downgrade = true;
    machine.backup("web").unwrap();
    assert_eq!(machine.points.last().unwrap().consistency, Consistency::Crash);
}

#[test]
fn what_another_product_makes_while_ours_is_refused_is_left_alone() {
    // Between the two tries of a backup that comes to its end.
    let (world, mut machine) = one_vm();
    world.faults(|faults| faults.vss_fails = true);
    world.faults(|faults| faults.foreign_at_refusal = true);
    machine.backup("web").unwrap();
    assert_eq!(world.leftovers(), ["web - Other"]);
    assert_eq!(machine.state_files("journal"), Vec::<String>::new());
    // Because of it.
    let (world, mut machine) = one_vm();
    world.faults(|faults| faults.creation_code = Some(32775));
    world.faults(|faults| faults.foreign_at_refusal = true);
    machine.backup("web").unwrap_err();
    assert_eq!(machine.hypervisor().reap().unwrap().removed, Vec::<String>::new());
    assert_eq!(world.leftovers(), ["web - Other"]);
    assert_eq!(machine.state_files("journal"), Vec::<String>::new());
}

#[test]
fn what_another_product_makes_when_a_job_is_killed_is_left_alone_and_named() {
    let (world, mut machine) = one_vm();
    world.cut(None);
    machine.backup("web").unwrap();
    let calls = world.calls();
    let mut in_doubt = 0;
    for call in 1..=calls {
        // Clocks that differ change nothing.
        let machine_behind_s = [0, 3600, -3600][(call % 3) as usize];
        let (world, mut machine) = one_vm();
        world.set_machine_behind(machine_behind_s);
        world.cut(Some(Cut::DieBefore(call)));
        let _ = machine.backup("web");
        world.cut(None);
        world.pass(5 * 60 * 1000);
        world.add_named(0, "web - Other", 0);
        let report = machine.hypervisor().reap().unwrap();
        assert!(world.leftovers().contains(&"web - Other".to_owned()), "{call}: {report:?}");
        let told = report.notes.iter().filter(|line| line.contains("web - Other")).count();
        in_doubt += told;
        world.pass(24 * 3600 * 1000);
        machine.hypervisor().reap().unwrap();
        assert_eq!(machine.state_files("journal").len(), told, "{call}");
        world.remove_all_checkpoints(0);
        machine.hypervisor().reap().unwrap();
        assert_eq!(machine.state_files("journal"), Vec::<String>::new(), "{call}");
    }
    assert!(in_doubt >= 1, "{in_doubt}");
}

#[test]
fn a_new_point_that_nothing_proves_to_be_ours_is_no_base_and_stays() {
    let (world, mut machine) = one_vm();
    machine.backup("web").unwrap();
    world.set_agentless(true);
    world.faults(|faults| faults.foreign_at_conversion = true);
    let outcome = machine.backup("web").unwrap();
    let told = |texts: &[String], what: &str| texts.iter().any(|text| text.contains(what));
    assert!(told(&outcome.warnings, "read everything"), "{:?}", outcome.warnings);
    assert!(told(&outcome.left, "may be another program's"), "{:?}", outcome.left);
    let foreign = world.points(0);
    assert_eq!(foreign.len(), 1);
    world.pass(60_000);
    let outcome = machine.backup("web").unwrap();
    assert_eq!(outcome.full["scsi0:0"], FullReason::NoTrackingId);
    machine.backup("web").unwrap();
    assert!(world.points(0).contains(&foreign[0]) && world.points(0).len() == 2);
}

#[test]
fn a_failed_backup_keeps_the_old_base() {
    let (world, mut machine) = one_vm();
    machine.backup("web").unwrap();
    let base = world.points(0);
    machine.commit_fails = true;
    machine.backup("web").unwrap_err();
    assert_eq!(world.points(0), base);
    world.faults(|faults| faults.sharing_violation = true);
    let error = machine.backup("web").unwrap_err().to_string();
    assert!(error.contains("web-scsi0-0.vhdx") && error.contains("virus"), "{error}");
    assert_eq!(world.points(0), base);
    machine.commit_fails = false;
    world.faults(|faults| faults.sharing_violation = false);
    let outcome = machine.backup("web").unwrap();
    assert!(outcome.full.is_empty(), "{:?}", outcome.full);
    assert_clean(&world, &machine);
}

#[test]
fn a_checkpoint_that_somebody_removes_while_it_is_read_fails_the_job() {
    let (world, mut machine) = one_vm();
    machine.backup("web").unwrap();
    let mut frozen = machine.hypervisor().freeze(&machine.request("web")).unwrap();
    frozen.check().unwrap();
    world.remove_all_checkpoints(0);
    let error = frozen.check().unwrap_err().to_string();
    assert!(error.contains("removed by somebody else"), "{error}");
    // Sealing it all the same makes no base of it.
    assert!(frozen.seal().unwrap().tracking.is_empty());
    frozen.abort().unwrap();
    assert_clean(&world, &machine);
    machine.backup("web").unwrap();
}

#[test]
fn disks_are_followed_by_their_ids() {
    let (world, mut machine) = one_vm();
    machine.backup("web").unwrap();
    // The second disk moves, a third comes.
    world.place(0, 1, 9);
    world.add_disk(0, 1, SIZE);
    world.write(0, 1, 5, b"moved");
    let outcome = machine.backup("web").unwrap();
    assert_eq!(outcome.full.keys().collect::<Vec<_>>(), ["scsi0:1"]);
    assert!(matches!(outcome.full["scsi0:1"], FullReason::DiskReplaced(_)), "{:?}", outcome.full);
    assert_eq!(outcome.read_bytes, 5 + SIZE as u64);
    // One goes; another is left out.
    world.world().detach(world.id(0), 2);
    machine.exclude = vec![DiskId("scsi0:0".into())];
    let outcome = machine.backup("web").unwrap();
    assert!(outcome.full.is_empty(), "{:?}", outcome.full);
    assert_eq!(machine.points.last().unwrap().disks.len(), 1);
    machine.exclude.push(DiskId("scsi0:9".into()));
    let error = machine.backup("web").unwrap_err();
    assert!(matches!(error, HypervisorError::NotFound { .. }), "{error}");
    assert_clean(&world, &machine);
}

#[test]
fn an_exclusion_that_would_hit_another_disk_than_before_is_refused() {
    let (world, mut machine) = one_vm();
    machine.exclude = vec![DiskId("scsi0:1".into())];
    machine.backup("web").unwrap();
    // Their places change, as they do when a controller is added.
    world.swap(0, 0, 1);
    let error = machine.backup("web").unwrap_err().to_string();
    assert!(error.contains("scsi0:1") && error.contains("scsi0:0"), "{error}");
    assert!(world.leftovers().is_empty(), "{:?}", world.leftovers());
    // The exclusion follows the disk.
    machine.exclude = vec![DiskId("scsi0:0".into())];
    let outcome = machine.backup("web").unwrap();
    assert!(outcome.full.is_empty() && outcome.warnings.is_empty(), "{outcome:?}");
    // What is excluded where it was backed up is meant.
    world.add_disk(0, 2, SIZE);
    machine.backup("web").unwrap();
    machine.exclude.push(DiskId("scsi0:1".into()));
    let outcome = machine.backup("web").unwrap();
    assert!(outcome.warnings.is_empty(), "{:?}", outcome.warnings);
    assert_clean(&world, &machine);
}

#[test]
fn disks_with_one_id_are_read_in_full() {
    let (world, mut machine) = one_vm();
    machine.backup("web").unwrap();
    // A copy of the first disk comes in the place of the second.
    let copy = |disk_id: Uuid| {
        world.world().detach(world.id(0), 1);
        let spec = DiskSpec { disk_id: Some(disk_id), ..DiskSpec::scsi(1, SIZE as u64) };
        world.world().attach_disk(world.id(0), &spec);
    };
    copy(world.world().disk_id(world.id(0), 0));
    world.write(0, 1, 0, b"another");
    let is_untracked = |outcome: &support::driver::Outcome, id: &str| {
        assert!(matches!(outcome.full[id], FullReason::NoTracking(_)), "{:?}", outcome.full);
    };
    let outcome = machine.backup("web").unwrap();
    is_untracked(&outcome, "scsi0:0");
    is_untracked(&outcome, "scsi0:1");
    // Swapped, they are what they were not, and no tracking says so.
    world.swap(0, 0, 1);
    let outcome = machine.backup("web").unwrap();
    assert_eq!(outcome.full.len(), 2, "{:?}", outcome.full);
    // The one that is left may be either of them.
    world.place(0, 0, 7);
    machine.exclude = vec![DiskId("scsi0:7".into())];
    let outcome = machine.backup("web").unwrap();
    is_untracked(&outcome, "scsi0:0");
    // Once they differ, they are tracked again.
    copy(Uuid::from_u128(77));
    machine.exclude.clear();
    machine.backup("web").unwrap();
    let outcome = machine.backup("web").unwrap();
    assert!(outcome.full.is_empty(), "{:?}", outcome.full);
    assert_clean(&world, &machine);
}

#[test]
fn a_disk_that_the_host_leaves_out_is_named() {
    let (world, mut machine) = one_vm();
    world.faults(|faults| faults.skipped_disk = Some(1));
    let outcome = machine.backup("web").unwrap();
    assert!(outcome.warnings.iter().any(|text| text.contains("scsi0:1")), "{:?}", outcome.warnings);
    assert_eq!(machine.points.last().unwrap().disks.len(), 1);
}

#[test]
fn a_renamed_vm_keeps_its_line_and_old_configurations_have_none() {
    let (world, mut machine) = one_vm();
    machine.backup("web").unwrap();
    world.world().rename(world.id(0), "shop");
    let outcome = machine.backup("shop").unwrap();
    assert!(outcome.full.is_empty(), "{:?}", outcome.full);
    assert_clean(&world, &machine);
    world.world().set(world.id(0), "Version", "5.0");
    let outcome = machine.backup("shop").unwrap();
    assert!(matches!(outcome.full["scsi0:0"], FullReason::NoTracking(_)), "{:?}", outcome.full);
    assert_clean(&world, &machine);
    world.world().set(world.id(0), "Version", "7.1");
    let outcome = machine.backup("shop").unwrap();
    assert!(outcome.warnings.iter().any(|text| text.contains("7.1")), "{:?}", outcome.warnings);
}

#[test]
fn reference_points_are_known_after_the_host_was_upgraded() {
    let (world, mut machine) = one_vm();
    machine.backup("web").unwrap();
    // Another repository's, whose job was killed before it was told that its restore point stands.
    let mut weekly = Machine::new(&world);
    weekly.state = tempfile::tempdir_in(machine.state.path()).unwrap();
    weekly.lineage = "fedcba9876543210".into();
    weekly.backup("web").unwrap();
    weekly.killed_after_commit = true;
    weekly.backup("web").unwrap_err();
    weekly.killed_after_commit = false;
    world.cut(None);
    world.pass(60_000);
    assert_eq!(world.points(0).len(), 3);
    world.world().configure(|options| options.short_point_ids = true);
    for machine in [&mut machine, &mut weekly] {
        world.write(0, 0, 100, b"since");
        let outcome = machine.backup("web").unwrap();
        assert!(outcome.full.is_empty(), "{:?}", outcome.full);
    }
    assert_eq!(world.points(0).len(), 2, "the older ones are gone");
}

#[test]
fn two_repositories_keep_their_own_bases() {
    let (world, mut nightly) = one_vm();
    let mut weekly = Machine::new(&world);
    weekly.state = tempfile::tempdir_in(nightly.state.path()).unwrap();
    weekly.lineage = "fedcba9876543210".into();
    nightly.backup("web").unwrap();
    weekly.backup("web").unwrap();
    for _ in 0..2 {
        world.write(0, 0, 3, b"y");
        assert!(nightly.backup("web").unwrap().full.is_empty());
        assert!(weekly.backup("web").unwrap().full.is_empty());
    }
    assert_eq!(world.points(0).len(), 2);
    // Of a full backup nobody names the base: it is known here which point it replaces.
    nightly.full = true;
    nightly.backup("web").unwrap();
    assert_eq!(world.points(0).len(), 2);
}

#[test]
fn a_second_job_on_a_vm_is_refused_and_the_first_goes_on() {
    let (world, machine) = one_vm();
    let mut frozen = machine.hypervisor().freeze(&machine.request("web")).unwrap();
    let error = machine.hypervisor().freeze(&machine.request("web")).err().unwrap();
    assert!(matches!(error, HypervisorError::Busy { .. }), "{error}");
    let report = machine.hypervisor().reap().unwrap();
    assert!(report.removed.is_empty() && report.in_use.len() == 1, "{report:?}");
    frozen.check().unwrap();
    frozen.seal().unwrap();
    frozen.commit().unwrap();
    assert_eq!((world.leftovers().len(), world.points(0).len()), (0, 1));
}

#[test]
fn what_carries_our_name_is_left_to_another_installation_until_it_is_old() {
    let (world, mut machine) = one_vm();
    world.add_named(0, "vmtide 0123456789abcdef", 3600);
    let error = machine.backup("web").unwrap_err();
    assert!(matches!(error, HypervisorError::Busy { .. }), "{error}");
    assert!(error.to_string().contains("Remove-VMSnapshot"), "{error}");
    assert_eq!(machine.hypervisor().reap().unwrap().in_use.len(), 1);
    // Old as it is, it may be read by somebody: it is told, keeps no backup waiting, and goes when a person says so.
    world.pass(80 * 3600 * 1000);
    let outcome = machine.backup("web").unwrap();
    let is_told = |lines: &[String]| lines.iter().any(|line| line.contains("--remove-leftovers"));
    assert!(is_told(&outcome.warnings), "{:?}", outcome.warnings);
    let report = machine.hypervisor().reap().unwrap();
    assert!(is_told(&report.notes) && report.removed.is_empty(), "{report:?}");
    assert_eq!(world.leftovers(), ["vmtide 0123456789abcdef"]);
    world.add_named(0, "web - Backup", 3600);
    let report = machine.hypervisor().reap_orphans().unwrap();
    assert!(report.removed.len() == 1 && report.notes.is_empty(), "{report:?}");
    let names = world.world().leftovers().recovery_snapshots;
    assert_eq!(names, ["web - Backup"], "another product's stays");
}

#[test]
fn a_disk_that_is_attached_while_the_checkpoint_is_made_is_not_waited_for() {
    let (world, mut machine) = one_vm();
    world.faults(|faults| faults.disk_at_checkpoint = true);
    let outcome = machine.backup("web").unwrap();
    assert_eq!(outcome.left, Vec::<String>::new());
    assert_clean(&world, &machine);
    // What is left out is waited for: the checkpoint holds it all the same.
    world.faults(|faults| faults.merge_ms = Some(3600 * 1000));
    machine.exclude = vec![DiskId("scsi0:0".into())];
    let outcome = machine.backup("web").unwrap();
    assert!(outcome.left[0].contains("web-scsi0-0_"), "{:?}", outcome.left);
}

#[test]
fn a_merge_that_lasts_is_told_and_looked_after() {
    let (world, mut machine) = one_vm();
    world.faults(|faults| faults.merge_ms = Some(3600 * 1000));
    let outcome = machine.backup("web").unwrap();
    assert!(outcome.left.iter().any(|text| text.contains("merged")), "{:?}", outcome.left);
    assert_eq!(machine.state_files("journal").len(), 1);
    let error = machine.backup("web").unwrap_err().to_string();
    assert!(error.contains("merging"), "{error}");
    world.pass(3600 * 1000);
    assert_eq!(machine.hypervisor().reap().unwrap().removed, Vec::<String>::new());
    assert_eq!(machine.state_files("journal"), Vec::<String>::new());
    assert!(machine.backup("web").unwrap().full.is_empty());
}

#[test]
fn a_merge_of_somebody_elses_that_the_host_is_at_is_waited_for() {
    let (world, mut machine) = one_vm();
    world.set_faults(Faults { merge_ms: Some(20_000), ..Faults::default() });
    let vm = world.id(0);
    let ids: Vec<Uuid> = (0..2).filter_map(|_| world.world().user_checkpoint(vm)).collect();
    world.world().remove_checkpoint(ids[0]);
    machine.backup("web").unwrap();
    // Not for ever.
    world.set_faults(Faults { merge_ms: Some(3600 * 1000), ..Faults::default() });
    let point = world.world().user_checkpoint(vm).unwrap();
    world.world().remove_checkpoint(point);
    let error = machine.backup("web").unwrap_err().to_string();
    assert!(error.contains("32775"), "{error}");
    assert_eq!(machine.state_files("journal"), Vec::<String>::new());
    world.pass(3600 * 1000);
    machine.backup("web").unwrap();
}

#[test]
fn a_reference_point_that_sticks_is_told_and_tried_again() {
    let (world, mut machine) = one_vm();
    machine.backup("web").unwrap();
    world.faults(|faults| faults.point_destruction_code = Some(32775));
    let outcome = machine.backup("web").unwrap();
    assert!(outcome.left.iter().any(|text| text.contains("reference point")), "{:?}", outcome.left);
    assert_eq!(world.points(0).len(), 2);
    world.faults(|faults| faults.point_destruction_code = None);
    machine.hypervisor().reap().unwrap();
    assert_clean(&world, &machine);
}

#[test]
fn a_cancelled_job_leaves_nothing() {
    let (world, machine) = one_vm();
    let request = machine.request("web");
    let mut frozen = machine.hypervisor().freeze(&request).unwrap();
    request.cancel.cancel();
    frozen.seal().unwrap_err();
    frozen.abort().unwrap();
    world.pass(10_000);
    machine.hypervisor().reap().unwrap();
    assert_eq!((world.leftovers().len(), world.points(0).len()), (0, 0));
    assert_eq!(machine.state_files("journal"), Vec::<String>::new());
    let error = machine.hypervisor().freeze(&request).err().unwrap();
    assert!(matches!(error, HypervisorError::Block(_)), "{error}");
}

#[test]
fn vms_are_selected_by_name_id_and_the_tags_in_their_notes() {
    let world = TestHost::new();
    for name in ["web1", "web2", "db"] {
        world.add_vm(name, &[4096]);
    }
    let notes = CimValue::strings(["the shop's\nvmtide:tag=gold"]);
    world.world().set(world.id(2), "Notes", notes);
    let id = world.id(0);
    let hypervisor = Machine::new(&world).hypervisor();
    let names = |text: &str| -> Vec<String> {
        let selector: VmSelector = text.parse().unwrap();
        hypervisor.select(&selector).unwrap().into_iter().map(|vm| vm.name).collect()
    };
    assert_eq!(names("web*"), ["web1", "web2"]);
    assert_eq!(names("tag:Gold"), ["db"]);
    assert_eq!(names(&id.to_string()), ["web1"]);
    assert_eq!(names("all").len(), 3);
    assert!(hypervisor.has_lasting_ids());
    let listed = hypervisor.list().unwrap();
    assert_eq!((listed.len(), listed[0].disks, listed[0].state.as_str()), (3, 1, "running"));
}
