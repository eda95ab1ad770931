//! The host through the records that backups use: one whole cycle, by hand.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that panics has failed"
)]

use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::{ByteRange, CancelToken, RangeSet};
use vmtide_cim::CimError;
use vmtide_hyperv::{
    BackupType, ChangesError, Clock, Host, HostOptions, ReferencePointRecord, SnapshotRecord,
    SnapshotRequest,
};
use vmtide_hypervisor::{Consistency, HypervisorError};
use vmtide_standin_hyperv_host::{
    AnswerForm, ChangesFault, DiskKind, DiskSpec, Event, PointIds, Random, VmSpec, Vss, World,
    WorldOptions,
};

/// The host's own time: waiting lets it go on.
struct WorldClock(World);

impl Clock for WorldClock {
    fn now_ms(&self) -> u64 {
        self.0.now_ms()
    }
    fn sleep_ms(&self, ms: u64) {
        self.0.advance(ms);
    }
    fn unix_s(&self) -> i64 {
        i64::try_from(self.0.unix_s()).unwrap()
    }
}

struct Bench {
    _directory: tempfile::TempDir,
    world: World,
    vm: Uuid,
    host: Host,
}

fn bench_with(spec: &VmSpec, options: WorldOptions, form: AnswerForm) -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let world = World::new(directory.path(), options);
    let vm = world.add_vm(spec);
    let clock = Arc::new(WorldClock(world.clone()));
    let host = Host::new(world.cim_in(form), HostOptions { clock, ..HostOptions::default() });
    Bench { _directory: directory, world, vm, host }
}

fn bench(form: AnswerForm) -> Bench {
    bench_with(&VmSpec::new("web", &[4 << 20, 2 << 20]), WorldOptions::default(), form)
}

fn request(consistency: Consistency) -> SnapshotRequest {
    SnapshotRequest { consistency, backup_type: BackupType::Copy, ignore_non_snapshottable: true }
}

impl Bench {
    fn freeze(&self) -> vmtide_hypervisor::Result<SnapshotRecord> {
        let vm = self.host.vm(self.vm)?;
        let request = request(Consistency::Application);
        self.host.create_recovery_snapshot(&vm, &request, &CancelToken::new())
    }

    fn convert(&self, snapshot: &SnapshotRecord) -> Option<ReferencePointRecord> {
        self.host.convert_to_reference_point(snapshot, &CancelToken::new()).unwrap()
    }

    /// The changes of a frozen disk by the management interface, page by page.
    fn changes(&self, path: &str, id: &str, size: u64) -> Result<RangeSet, ChangesError> {
        let mut all = RangeSet::new();
        let mut at = 0;
        while at < size {
            let range = ByteRange::from_bounds(at, size);
            let page = self.host.virtual_disk_changes(path, id, range)?;
            assert!(page.processed_bytes > 0, "nothing was processed");
            page.ranges.iter().for_each(|range| all.insert(range));
            at += page.processed_bytes;
        }
        Ok(all)
    }
}

#[test]
fn a_cycle_freezes_seals_merges_and_tells_what_changed() {
    for form in [AnswerForm::Typed, AnswerForm::Texts] {
        let bench = bench(form);
        let (world, vm, host) = (&bench.world, bench.vm, &bench.host);
        world.write(vm, 0, 0, &[1; 4096]);
        let base = world.disks(vm)[0].1.clone();
        let snapshot = bench.freeze().unwrap();
        host.rename(&snapshot.settings, "vmtide job 1").unwrap();
        assert_eq!(world.leftovers().recovery_snapshots, ["vmtide job 1"]);
        // The guest goes on while it is frozen.
        world.write(vm, 0, 4096, &[2; 4096]);
        let frozen = world.frozen_content(vm).unwrap();
        let disks = host.disks(&snapshot.settings).unwrap();
        assert_eq!(disks.len(), 2);
        assert_eq!(disks[0].host_resource, base);
        for disk in &disks {
            let file = world.files().open_disk(&disk.host_resource).unwrap();
            frozen[&file.disk_id.unwrap()].compare(&*file.device).unwrap();
        }
        let live = host.disks(&host.vm(vm).unwrap().settings).unwrap();
        assert!(live[0].host_resource.ends_with(".avhdx"), "{}", live[0].host_resource);
        let busy = world.files().open_disk(&live[0].host_resource);
        assert!(matches!(busy.map(|_| ()), Err(HypervisorError::Busy { .. })));

        let point = bench.convert(&snapshot).expect("the host names the reference point");
        assert_eq!((point.kind, point.disk_identifiers.len()), (2, 2));
        assert_eq!(world.known_ids(vm, 0), [point.tracking_ids[0].clone()]);
        world.settle();
        assert_eq!(world.disks(vm)[0].1, base, "the disk is its base again");
        assert!(world.leftovers().unmerged_files.is_empty());

        world.write(vm, 0, 65536, &[3; 512]);
        let again = bench.freeze().unwrap();
        let disk = &host.disks(&again.settings).unwrap()[0];
        let changed = bench.changes(&disk.host_resource, &point.tracking_ids[0], 4 << 20).unwrap();
        let wanted = [ByteRange::new(4096, 4096), ByteRange::new(65536, 4096)];
        assert_eq!(changed, wanted.into_iter().collect(), "{form:?}");
        host.destroy_snapshot(&again, &CancelToken::new()).unwrap();
        world.settle();
        let device = {
            world.set_running(vm, false);
            world.files().open_disk(&base).unwrap().device
        };
        world.content(vm, 0).compare(&*device).unwrap();
        // The old point alone stood for its id.
        host.destroy_reference_point(&point, &CancelToken::new()).unwrap();
        drop(device);
        let lost = bench.changes(&base, &point.tracking_ids[0], 4 << 20);
        assert!(lost.is_err(), "{lost:?}");
        assert!(world.leftovers().reference_points.is_empty());
    }
}

#[test]
fn a_file_that_is_held_open_is_not_merged() {
    let bench = bench(AnswerForm::Typed);
    let snapshot = bench.freeze().unwrap();
    let path = bench.host.disks(&snapshot.settings).unwrap()[0].host_resource.clone();
    let file = bench.world.files().open_disk(&path).unwrap();
    bench.convert(&snapshot);
    for _ in 0..20 {
        bench.world.advance(60_000);
    }
    let left = bench.world.leftovers();
    assert_eq!((left.unmerged_files.len(), left.open_files.len()), (1, 1));
    drop(file);
    bench.world.settle();
    assert!(bench.world.leftovers().unmerged_files.is_empty());
}

#[test]
fn an_application_consistent_checkpoint_needs_a_guest_that_answers() {
    let mut spec = VmSpec::new("db", &[1 << 20]);
    spec.vss = Vss::Missing;
    let bench = bench_with(&spec, WorldOptions::default(), AnswerForm::Typed);
    let refused = bench.freeze().map(|_| ()).unwrap_err();
    assert!(matches!(refused, HypervisorError::ConsistencyNotReached { .. }), "{refused}");
    let vm = bench.host.vm(bench.vm).unwrap();
    let crash = request(Consistency::Crash);
    bench.host.create_recovery_snapshot(&vm, &crash, &CancelToken::new()).unwrap();
    assert!(bench.freeze().is_err(), "one checkpoint for a backup at a time");
}

#[test]
fn disks_that_cannot_be_frozen_are_skipped_only_where_that_is_asked_for() {
    let mut spec = VmSpec::new("mixed", &[1 << 20]);
    for (location, kind) in [(1, DiskKind::Vhd), (2, DiskKind::VhdSet), (3, DiskKind::PassThrough)]
    {
        spec.disks.push(DiskSpec { kind, ..DiskSpec::scsi(location, 1 << 20) });
    }
    let bench = bench_with(&spec, WorldOptions::default(), AnswerForm::Typed);
    let vm = bench.host.vm(bench.vm).unwrap();
    assert_eq!(bench.host.disks(&vm.settings).unwrap().len(), 4);
    let strict = SnapshotRequest { ignore_non_snapshottable: false, ..request(Consistency::Crash) };
    assert!(bench.host.create_recovery_snapshot(&vm, &strict, &CancelToken::new()).is_err());
    let snapshot = bench.freeze().unwrap();
    let frozen = bench.host.disks(&snapshot.settings).unwrap();
    assert!(frozen.iter().filter(|disk| !disk.pass_through).count() == 2, "{frozen:?}");
    let point = bench.convert(&snapshot).unwrap();
    assert_eq!(point.tracking_ids.len(), 1, "a VHD is not tracked");
    bench.world.settle();
}

#[test]
fn every_switch_of_the_change_query_shows() {
    let bench = bench(AnswerForm::Typed);
    let (world, vm) = (&bench.world, bench.vm);
    let first = bench.freeze().unwrap();
    let id = bench.convert(&first).unwrap().tracking_ids[0].clone();
    world.settle();
    for page in 0..6 {
        world.write(vm, 0, page * 100_000 / 512 * 512, &[7; 512]);
    }
    let second = bench.freeze().unwrap();
    let path = bench.host.disks(&second.settings).unwrap()[0].host_resource.clone();
    let whole = bench.changes(&path, &id, 4 << 20).unwrap();
    assert_eq!(whole.as_slice().len(), 6);
    world.faults(|faults| faults.changes_page = Some(1));
    assert_eq!(bench.changes(&path, &id, 4 << 20).unwrap(), whole, "page by page");
    world.faults(|faults| faults.unsorted_ranges = true);
    world.faults(|faults| faults.changes_page = None);
    assert_eq!(bench.changes(&path, &id, 4 << 20).unwrap(), whole);
    world.faults(|faults| faults.over_report_bytes = Some(1 << 20));
    let more = bench.changes(&path, &id, 4 << 20).unwrap();
    assert!(whole.subtract(&more).is_empty() && more.total_bytes() == 1 << 20, "{more:?}");
    let range = ByteRange::new(0, 4 << 20);
    let ask = |fault| {
        world.faults(|faults| faults.changes = Some(fault));
        let by_job = bench.host.virtual_disk_changes(&path, &id, range);
        (by_job, world.files().changes(&path, &id, range))
    };
    world.faults(|faults| faults.changes_by_job = true);
    for fault in [ChangesFault::InvalidId, ChangesFault::Missing] {
        let (remote, local) = ask(fault);
        assert!(matches!(remote, Err(ChangesError::UnknownId(_))), "{remote:?}");
        assert!(matches!(local, Err(ChangesError::UnknownId(_))), "{local:?}");
    }
    let (remote, local) = ask(ChangesFault::Disabled);
    assert!(matches!(remote, Err(ChangesError::NotTracked(_))), "{remote:?}");
    assert!(matches!(local, Err(ChangesError::NotTracked(_))), "{local:?}");
    let (remote, local) = ask(ChangesFault::NothingProcessed);
    assert_eq!((remote.unwrap().processed_bytes, local.unwrap().processed_bytes), (0, 0));
    let (remote, _) = ask(ChangesFault::UnequalLists);
    assert!(matches!(remote, Err(ChangesError::Failed(_))), "{remote:?}");
}

#[test]
fn points_without_names_ids_or_lengths_come_when_they_are_switched_on() {
    let short = WorldOptions { short_point_ids: true, ..WorldOptions::default() };
    let bench = bench_with(&VmSpec::new("a", &[1 << 20, 1 << 20]), short, AnswerForm::Texts);
    bench.world.faults(|faults| faults.no_resulting_point = true);
    assert_eq!(bench.convert(&bench.freeze().unwrap()), None);
    let points = bench.host.reference_points(bench.vm).unwrap();
    assert!(!points[0].instance_id.contains('\\'), "{points:?}");
    bench.world.faults(|faults| faults.no_resulting_point = false);
    for (ids, count) in [(PointIds::Empty, 0), (PointIds::Shorter, 1), (PointIds::Whole, 2)] {
        bench.world.settle();
        bench.world.faults(|faults| faults.point_ids = ids);
        let point = bench.convert(&bench.freeze().unwrap()).unwrap();
        assert_eq!((point.disk_identifiers.len(), point.tracking_ids.len()), (2, count));
    }
    bench.world.faults(|faults| faults.conversion_code = Some(32775));
    let snapshot = bench.freeze().unwrap();
    let refused = bench.host.convert_to_reference_point(&snapshot, &CancelToken::new());
    assert!(refused.is_err());
    assert_eq!(bench.world.leftovers().recovery_snapshots.len(), 1);
}

#[test]
fn jobs_warn_vanish_never_end_or_are_not_needed() {
    let bench = bench(AnswerForm::Typed);
    let world = &bench.world;
    let once = || {
        let snapshot = bench.freeze()?;
        bench.host.destroy_snapshot(&snapshot, &CancelToken::new())
    };
    world.faults(|faults| faults.job_warnings = true);
    once().unwrap();
    world.faults(|faults| *faults = vmtide_standin_hyperv_host::Faults::default());
    world.faults(|faults| faults.synchronous = true);
    once().unwrap();
    world.faults(|faults| *faults = vmtide_standin_hyperv_host::Faults::default());
    world.faults(|faults| faults.jobs_vanish = true);
    assert!(once().is_err());
    assert_eq!(world.leftovers().recovery_snapshots.len(), 1, "it was made all the same");
    world.faults(|faults| faults.jobs_vanish = false);
    let left = bench.host.snapshots(bench.vm).unwrap();
    bench.host.destroy_snapshot(&left[0], &CancelToken::new()).unwrap();
    world.faults(|faults| faults.endless_job = Some("CreateSnapshot".into()));
    assert!(matches!(once(), Err(HypervisorError::Timeout { .. })));
    world.faults(|faults| faults.access_denied = true);
    let denied = bench.host.vms().unwrap_err();
    assert!(matches!(denied, HypervisorError::Denied { .. }), "{denied}");
}

#[test]
fn a_revert_or_a_crash_is_never_told_as_less_than_the_truth() {
    let bench = bench(AnswerForm::Typed);
    let (world, vm) = (&bench.world, bench.vm);
    let first = bench.freeze().unwrap();
    let id = bench.convert(&first).unwrap().tracking_ids[0].clone();
    world.settle();
    world.write(vm, 0, 8192, &[9; 512]);
    world.crash();
    let second = bench.freeze().unwrap();
    let path = bench.host.disks(&second.settings).unwrap()[0].host_resource.clone();
    let changed = bench.changes(&path, &id, 4 << 20).unwrap();
    assert_eq!(changed.as_slice(), [ByteRange::new(0, 1 << 20)], "coarser after a crash");
    bench.host.destroy_snapshot(&second, &CancelToken::new()).unwrap();
    world.settle();
    let user = world.user_checkpoint(vm).unwrap();
    world.write(vm, 0, 0, &[8; 512]);
    let before = world.content(vm, 0).read(0, 1);
    world.revert(user);
    assert_ne!(world.content(vm, 0).read(0, 1), before);
    let third = bench.freeze().unwrap();
    let path = bench.host.disks(&third.settings).unwrap()[0].host_resource.clone();
    assert!(bench.changes(&path, &id, 4 << 20).is_err(), "no id outlives a revert");
}

#[test]
fn names_order_and_types_are_held_to_the_documents() {
    let bench = bench(AnswerForm::Typed);
    let cim = bench.world.cim();
    let vm = bench.host.vm(bench.vm).unwrap();
    let service = bench.host.service("Msvm_VirtualSystemSnapshotService").unwrap();
    let system = ("AffectedSystem", vmtide_cim::CimValue::from(&vm.path));
    let kind = ("SnapshotType", vmtide_cim::CimValue::Uint16(32768));
    let refused = |parameters: &[(&str, vmtide_cim::CimValue)], method: &str| {
        let error = cim.invoke(&service, method, parameters).unwrap_err();
        assert!(matches!(error, CimError::Fault { .. }), "{error}");
    };
    refused(&[kind.clone(), system.clone()], "CreateSnapshot");
    refused(std::slice::from_ref(&kind), "CreateSnapshot");
    refused(&[system.clone(), kind.clone()], "createSnapshot");
    refused(&[system.clone(), ("Snapshottype", kind.1.clone())], "CreateSnapshot");
    refused(&[system.clone(), ("SnapshotType", vmtide_cim::CimValue::Uint32(2))], "CreateSnapshot");
    refused(&[("AffectedSystem", (&service).into()), kind.clone()], "CreateSnapshot");
    let wrong = "<INSTANCE CLASSNAME=\"Msvm_VirtualSystemReferencePointSettingData\"></INSTANCE>";
    let settings = ("SnapshotSettings", vmtide_cim::CimValue::from(wrong));
    let answer = cim.invoke(&service, "CreateSnapshot", &[system, settings, kind]).unwrap();
    assert_eq!(answer.return_value, 32773);
    assert!(cim.query(r"root\cimv2", "SELECT * FROM Msvm_ComputerSystem").is_err());
    assert_eq!(cim.query(r"root\cimv2", "SELECT * FROM Win32_OperatingSystem").unwrap().len(), 1);
}

#[test]
fn whatever_happens_the_files_hold_what_the_guest_wrote() {
    for seed in 0..12 {
        let options = WorldOptions { seed, ..WorldOptions::default() };
        let bench = bench_with(&VmSpec::new("x", &[2 << 20, 1 << 20]), options, AnswerForm::Typed);
        let (world, vm) = (&bench.world, bench.vm);
        let mut random = Random::new(seed);
        let mut happened: Vec<Event> = Vec::new();
        for _ in 0..8 {
            happened.push(world.disturb(vm, &mut random));
            let snapshot = bench.freeze().unwrap_or_else(|e| panic!("{seed} {happened:?}: {e}"));
            world.write_around(vm, &mut random, 4);
            let frozen = world.frozen_content(vm).unwrap();
            for disk in bench.host.disks(&snapshot.settings).unwrap() {
                let file = world.files().open_disk(&disk.host_resource).unwrap();
                let content = &frozen[&file.disk_id.unwrap()];
                content
                    .compare(&*file.device)
                    .unwrap_or_else(|error| panic!("seed {seed}, {happened:?}: {error}"));
            }
            match random.one_in(2) {
                true => drop(bench.convert(&snapshot)),
                false => bench.host.destroy_snapshot(&snapshot, &CancelToken::new()).unwrap(),
            }
            world.advance(random.below(4000));
        }
        world.settle();
        world.set_running(vm, false);
        for (disk, (_, path)) in world.disks(vm).iter().enumerate() {
            let file = world.files().open_disk(path).unwrap();
            world
                .content(vm, disk)
                .compare(&*file.device)
                .unwrap_or_else(|error| panic!("seed {seed}, {happened:?}: {error}"));
        }
        assert!(world.leftovers().unmerged_files.is_empty(), "seed {seed}, {happened:?}");
    }
}
