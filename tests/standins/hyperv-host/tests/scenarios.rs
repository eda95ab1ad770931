//! The cycle of backups over the stand-in host with real VHDX chains: seeded lives of a VM with faults, kills and lost
//! answers, every restore point compared byte by byte with what the guest had written.
//!
//! More of them: `VMTIDE_RUNS=1000 cargo test -p vmtide-standin-hyperv-host --release --test scenarios`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "a test that panics has failed, and its disks are small"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::{CancelToken, MemoryDevice};
use vmtide_hyperv::{Clock, Host, HostOptions, HypervHypervisor, HypervOptions, SnapshotKind};
use vmtide_hypervisor::{
    Base, Changes, Consistency, DiskId, FreezeRequest, FrozenVm, Hypervisor, HypervisorError,
    JobId, TrackingId,
};
use vmtide_standin_hyperv_host::{
    AnswerForm, FaultPlan, Faults, Random, VmSpec, When, World, WorldOptions,
};

/// The stand-in's own time.
struct WorldClock(World);

impl Clock for WorldClock {
    fn now_ms(&self) -> u64 {
        self.0.now_ms()
    }
    fn sleep_ms(&self, ms: u64) {
        self.0.advance(ms);
    }
    fn unix_s(&self) -> i64 {
        self.0.unix_s() as i64
    }
}

/// A restore point: the disks with their tracking.
type Point = BTreeMap<DiskId, (Vec<u8>, Option<TrackingId>)>;

fn hypervisor(world: &World, plan: &FaultPlan, form: AnswerForm, state: &Path) -> HypervHypervisor {
    let clock = Arc::new(WorldClock(world.clone()));
    let host =
        Host::new(plan.cim(world.cim_in(form)), HostOptions { clock, ..HostOptions::default() });
    HypervHypervisor::new(host, plan.files(world.files()), HypervOptions::new(state))
}

fn backup(
    hypervisor: &HypervHypervisor,
    world: &World,
    plan: &FaultPlan,
    vm: Uuid,
    points: &mut Vec<Point>,
    random: &mut Random,
) -> Result<bool, HypervisorError> {
    let newest = points.last();
    let bases = newest.into_iter().flatten().map(|(id, (bytes, tracking))| {
        (id.clone(), Base { tracking: tracking.clone(), size_bytes: bytes.len() as u64 })
    });
    let mut frozen = hypervisor.freeze(&FreezeRequest {
        vm: vm.to_string(),
        job: JobId::random(),
        lineage: "0123456789abcdef".into(),
        consistency: Consistency::Application,
        allow_downgrade: true,
        bases: bases.collect(),
        exclude: Vec::new(),
        cancel: CancelToken::new(),
    })?;
    world.write_around(vm, random, 4);
    match store(frozen.as_mut(), world, vm, newest) {
        Ok((point, full)) if !plan.has_struck() => {
            points.push(point);
            frozen.commit()?;
            Ok(full)
        }
        Ok(_) => Err(HypervisorError::failed("commit", "killed, or the answer was lost")),
        Err(error) => {
            let _ = frozen.abort();
            Err(error)
        }
    }
}

fn store(
    frozen: &mut dyn FrozenVm,
    world: &World,
    vm: Uuid,
    newest: Option<&Point>,
) -> Result<(Point, bool), HypervisorError> {
    let truth = world.frozen_at(vm);
    let (mut point, mut full) = (Point::new(), false);
    for disk in frozen.disks() {
        let from = frozen.moved_from(&disk.id).unwrap_or(&disk.id);
        let size = disk.device.size_bytes() as usize;
        let bytes = match &disk.changes {
            Changes::Everything(_) => {
                full = true;
                let mut bytes = vec![0; size];
                disk.device.read_at(&mut bytes, 0)?;
                bytes
            }
            Changes::Ranges(ranges) => {
                let mut bytes = newest.unwrap()[from].0.clone();
                for range in ranges.iter() {
                    let part = &mut bytes[range.offset as usize..range.end() as usize];
                    disk.device.read_at(part, range.offset)?;
                }
                bytes
            }
        };
        let location: u32 = disk.id.0.rsplit(':').next().unwrap().parse().unwrap();
        let device = MemoryDevice::from_bytes(bytes.clone());
        if let Err(difference) = truth[&location].compare(&device) {
            panic!("SILENTLY INCOMPLETE: {} {:?}: {difference}", disk.id, disk.changes);
        }
        point.insert(disk.id.clone(), (bytes, None));
    }
    frozen.check()?;
    for (id, token) in frozen.seal()?.tracking {
        point.get_mut(&id).unwrap().1 = Some(token);
    }
    Ok((point, full))
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

fn one_run(seed: u64) -> (usize, usize) {
    let mut random = Random::new(seed);
    let (directory, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let options = WorldOptions {
        seed,
        short_point_ids: random.one_in(2),
        points_name_checkpoint_disks: random.one_in(2),
        resize_loses_ids: random.one_in(2),
        ..WorldOptions::default()
    };
    let world = World::new(directory.path(), options);
    let vm = world.add_vm(&VmSpec::new("web", &[1 << 20, 2 << 20]));
    let form = if random.one_in(2) { AnswerForm::Typed } else { AnswerForm::Texts };
    let (mut points, mut incremental, mut failed) = (Vec::new(), 0, 0);
    for _ in 0..3 + random.below(3) {
        world.disturb(vm, &mut random);
        let faults = Faults::any(&mut random);
        world.faults(|known| *known = faults);
        let call = 1 + random.below(160);
        let plan = match random.below(5) {
            0 => FaultPlan::kill_at(call, When::Before),
            1 => FaultPlan::kill_at(call, When::After),
            2 => FaultPlan::lose_at(call, When::After),
            _ => FaultPlan::none(),
        };
        let machine = hypervisor(&world, &plan, form, state.path());
        match backup(&machine, &world, &plan, vm, &mut points, &mut random) {
            Ok(full) => incremental += usize::from(!full),
            Err(_) => failed += 1,
        }
        world.advance(random.below(60_000));
    }
    // Without faults the next backup puts everything right.
    world.faults(|known| *known = Faults::default());
    world.advance(3_600_000);
    world.settle();
    let plan = FaultPlan::none();
    let machine = hypervisor(&world, &plan, form, state.path());
    clear_doubt(&machine, vm);
    world.settle();
    backup(&machine, &world, &plan, vm, &mut points, &mut random).unwrap();
    world.settle();
    machine.reap().unwrap();
    let left = world.leftovers();
    assert!(left.recovery_snapshots.is_empty() && left.open_files.is_empty(), "{left:?}");
    assert!(left.unmerged_files.is_empty(), "{left:?}");
    let journals = std::fs::read_dir(state.path().join("journal")).unwrap().count();
    assert_eq!(journals, 0);
    (incremental, failed)
}

#[test]
fn seeded_lives_of_a_vm_leave_nothing_and_lose_nothing() {
    let number = |name: &str, default: u64| {
        std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let (first, runs) = (number("VMTIDE_SEED", 1), number("VMTIDE_RUNS", 12));
    let (mut incremental, mut failed) = (0, 0);
    for seed in first..first + runs {
        let run = std::panic::catch_unwind(|| one_run(seed));
        let Ok((more, fewer)) = run else { panic!("seed {seed} failed") };
        incremental += more;
        failed += fewer;
    }
    println!("{runs} runs: {incremental} incremental, {failed} failed");
    assert!(runs < 10 || (incremental > 0 && failed > 0), "{incremental} {failed}");
}
