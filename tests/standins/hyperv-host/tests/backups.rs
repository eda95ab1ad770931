//! Backups of a VM whose disks are real VHDX chains, by the cycle that vmtide uses: whatever happens to the VM, the
//! host and the job, a restore point holds what the guest had written at its moment, and nothing is left.
//!
//! A few runs are part of the tests. More:
//! `cargo test -p vmtide-standin-hyperv-host --release --test backups -- --ignored`, from another seed with
//! `VMTIDE_SEED=N`, as many as `VMTIDE_RUNS=N`.

#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test with small disks, which fails where it panics"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::CancelToken;
use vmtide_hyperv::{Clock, Host, HostOptions, HypervHypervisor, HypervOptions, SnapshotKind};
use vmtide_hypervisor::{
    Base, Changes, Consistency, DiskId, FreezeRequest, FrozenVm, Hypervisor, HypervisorError,
    JobId, TrackingId,
};
use vmtide_standin_hyperv_host::{
    AnswerForm, Content, Event, FaultPlan, Faults, PointIds, Random, VmSpec, When, World,
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

/// A disk of a restore point.
#[derive(Clone)]
struct Stored {
    bytes: Vec<u8>,
    tracking: Option<TrackingId>,
}

type Point = BTreeMap<DiskId, Stored>;

fn hypervisor(world: &World, state: &Path, plan: &FaultPlan, form: AnswerForm) -> HypervHypervisor {
    let clock = Arc::new(WorldClock(world.clone()));
    let host =
        Host::new(plan.cim(world.cim_in(form)), HostOptions { clock, ..HostOptions::default() });
    HypervHypervisor::new(host, plan.files(world.files()), HypervOptions::new(state))
}

fn request(vm: Uuid, base: Option<&Point>) -> FreezeRequest {
    let base_of = |(id, disk): (&DiskId, &Stored)| {
        let size_bytes = disk.bytes.len() as u64;
        (id.clone(), Base { tracking: disk.tracking.clone(), size_bytes })
    };
    FreezeRequest {
        vm: vm.to_string(),
        job: JobId::random(),
        lineage: "0123456789abcdef".into(),
        consistency: Consistency::Application,
        allow_downgrade: true,
        bases: base.into_iter().flatten().map(base_of).collect(),
        exclude: Vec::new(),
        cancel: CancelToken::new(),
    }
}

/// What a restore point of the frozen disks holds: the base with what is said to have changed read over it.
fn assemble(frozen: &dyn FrozenVm, base: Option<&Point>) -> Result<Point, HypervisorError> {
    let mut point = Point::new();
    for disk in frozen.disks() {
        let size = usize::try_from(disk.device.size_bytes()).unwrap();
        let from = frozen.moved_from(&disk.id).unwrap_or(&disk.id);
        let mut bytes = vec![0; size];
        match &disk.changes {
            Changes::Everything(_) => disk.device.read_at(&mut bytes, 0)?,
            Changes::Ranges(ranges) => {
                bytes.clone_from(&base.unwrap()[from].bytes);
                for range in ranges.iter() {
                    let (start, end) = (range.offset as usize, range.end() as usize);
                    disk.device.read_at(&mut bytes[start..end], range.offset)?;
                }
            }
        }
        point.insert(disk.id.clone(), Stored { bytes, tracking: None });
    }
    Ok(point)
}

/// The disk at a location: `scsi0:3` is at 3.
fn location(id: &DiskId) -> u32 {
    id.0.rsplit(':').next().unwrap().parse().unwrap()
}

fn assert_true(point: &Point, truth: &BTreeMap<u32, Content>, context: &str) {
    for (id, disk) in point {
        let wanted = &truth[&location(id)];
        let found = wanted.read(0, usize::try_from(wanted.size_bytes()).unwrap());
        let differs = found.iter().zip(&disk.bytes).position(|(a, b)| a != b);
        assert!(
            found.len() == disk.bytes.len() && differs.is_none(),
            "{context}: silently incomplete: {id} at byte {differs:?}"
        );
    }
}

/// One backup: the restore point where it was committed. Where the plan ended the job its errors are as they are.
fn backup(
    world: &World,
    vm: Uuid,
    hypervisor: &HypervHypervisor,
    points: &mut Vec<Point>,
    random: &mut Random,
    context: &str,
) -> Result<Vec<String>, HypervisorError> {
    let base = points.last().cloned();
    let mut frozen = hypervisor.freeze(&request(vm, base.as_ref()))?;
    let truth = world.frozen_at(vm);
    // The guest goes on.
    world.write_around(vm, random, 3);
    let sealed = assemble(frozen.as_ref(), base.as_ref()).and_then(|point| {
        frozen.check()?;
        Ok((point, frozen.seal()?))
    });
    match sealed {
        Ok((mut point, seal)) => {
            assert_true(&point, &truth, context);
            for (id, tracking) in seal.tracking {
                point.get_mut(&id).unwrap().tracking = Some(tracking);
            }
            points.push(point);
            frozen.commit()
        }
        Err(error) => {
            drop(frozen.abort());
            Err(error)
        }
    }
}

/// Removes the checkpoints of which nothing tells that they are ours, as an administrator does who was told of them: a job
/// that was killed, or lost its answer, when the host had just begun to make one.
fn clear_doubt(hypervisor: &HypervHypervisor, vm: Uuid) {
    let told = hypervisor.reap().unwrap().notes;
    for snapshot in hypervisor.host().snapshots(vm).unwrap() {
        if snapshot.kind == SnapshotKind::Recovery {
            assert!(told.iter().any(|line| line.contains(&snapshot.settings.name)), "{told:?}");
            hypervisor.host().destroy_snapshot(&snapshot, &CancelToken::new()).unwrap();
        }
    }
}

fn one_run(seed: u64) {
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new(seed);
    let options = WorldOptions {
        seed,
        short_point_ids: random.one_in(3),
        points_name_checkpoint_disks: random.one_in(4),
        resize_loses_ids: random.one_in(2),
        ..WorldOptions::default()
    };
    let form = if random.one_in(2) { AnswerForm::Typed } else { AnswerForm::Texts };
    let world = World::new(directory.path().join("host"), options);
    let vm = world.add_vm(&VmSpec::new("x", &[2 << 20, 1 << 20]));
    let state = directory.path().join("state");
    let mut points = Vec::new();
    let mut happened: Vec<Event> = Vec::new();
    let mut went = Vec::new();
    world.write_around(vm, &mut random, 20);
    let foreign = world.foreign_reference_point(vm).unwrap();
    for _ in 0..4 {
        happened.push(world.disturb(vm, &mut random));
        let faults = Faults::any(&mut random);
        world.faults(|known| known.clone_from(&faults));
        let at = 1 + random.below(80);
        let when = if random.one_in(2) { When::Before } else { When::After };
        // By the ids of the frozen files a job that was killed while it converted proves that the new reference
        // point is its own. Where they are not told, or differ, it leaves the point: it may be another product's.
        let provable = !faults.most_recent_differs && faults.point_ids == PointIds::Whole;
        let plan = match random.below(4) {
            0 if provable => FaultPlan::kill_at(at, when),
            1 if provable => FaultPlan::lose_at(at, when),
            _ => FaultPlan::none(),
        };
        let context = format!("seed {seed}, {happened:?}, {faults:?}, call {at} {when:?}");
        let hypervisor = hypervisor(&world, &state, &plan, form);
        let result = backup(&world, vm, &hypervisor, &mut points, &mut random, &context);
        went.push(format!("{faults:?}, call {at} {when:?} of {}: {result:?}", plan.calls()));
        world.advance(random.below(5000));
    }
    world.faults(|faults| *faults = Faults::default());
    world.settle();
    let context = format!("seed {seed}, {happened:?}, {went:#?}");
    let calm = hypervisor(&world, &state, &FaultPlan::none(), form);
    clear_doubt(&calm, vm);
    world.settle();
    backup(&world, vm, &calm, &mut points, &mut random, &context)
        .unwrap_or_else(|error| panic!("{context}: {error}"));
    world.settle();
    calm.reap().unwrap_or_else(|error| panic!("{context}: {error}"));
    world.settle();
    let left = world.leftovers();
    assert!(left.recovery_snapshots.is_empty(), "{context}: {left:?}");
    assert!(left.unmerged_files.is_empty() && left.open_files.is_empty(), "{context}: {left:?}");
    assert!(left.reference_points.contains(&foreign), "{context}: the other product's is gone");
    let needed: Vec<&str> = points
        .last()
        .unwrap()
        .values()
        .filter_map(|d| Some(d.tracking.as_ref()?.0.as_str()))
        .collect();
    let ours = left.reference_points.iter().filter(|point| **point != foreign);
    let is_needed = |point: &&String| {
        let id = point.replace('\\', "\\\\");
        needed.iter().any(|token| token.contains(&id))
    };
    let (used, unused): (Vec<_>, Vec<_>) = ours.partition(is_needed);
    assert_eq!(used.len(), usize::from(!needed.is_empty()), "{context}: {left:?} {needed:?}");
    // Other products' points of later events are theirs.
    let theirs = happened.iter().filter(|event| **event == Event::OtherProduct).count();
    assert!(unused.len() <= theirs, "{context}: reference points are left: {unused:?}");
}

#[test]
fn backups_of_real_chains_hold_what_the_guest_wrote_and_leave_nothing() {
    for seed in 0..10 {
        one_run(seed);
    }
}

#[test]
#[ignore = "minutes: see the head of this file for the command"]
fn many_backups_of_real_chains_hold_what_the_guest_wrote_and_leave_nothing() {
    let number = |name: &str, usual: u64| {
        std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
    };
    let first = number("VMTIDE_SEED", 1000);
    for seed in first..first + number("VMTIDE_RUNS", 2000) {
        one_run(seed);
    }
}
