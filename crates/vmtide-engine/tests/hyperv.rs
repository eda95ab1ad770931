//! The engine with Hyper-V's cycle and a real repository, against the stand-in host of the cycle's own tests.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::type_complexity,
    reason = "a test that panics has failed, and its disks are small"
)]

#[path = "../../vmtide-hyperv/tests/support/host.rs"]
#[allow(dead_code, reason = "shared with the tests of the cycle, which use all of it")]
mod host;
#[allow(dead_code, reason = "shared by test programs that each use a part of it")]
mod support;

use host::TestHost;
use std::collections::BTreeMap;
use support::TestRepository;
use vmtide_block::{BlockDevice, CancelToken, Progress};
use vmtide_cim::CimValue;
use vmtide_engine::{
    BackupJob, BackupSummary, JobContext, LevelChoice, Limits, Result, Silent, backup, run_limited,
};
use vmtide_hyperv::{HypervHypervisor, HypervOptions};
use vmtide_hypervisor::{Hypervisor, VmSelector};
use vmtide_repo::{BackupOptions, Level};
use vmtide_standin_hyperv_host::VmSpec;

const SIZE: usize = 256 * 1024;

fn hypervisor(world: &TestHost, state: &std::path::Path) -> HypervHypervisor {
    let (host, files) = world.connect();
    HypervHypervisor::new(host, files, HypervOptions::new(state))
}

fn run(
    repository: &TestRepository,
    hypervisor: &dyn Hypervisor,
    vm: &str,
    level: LevelChoice,
) -> Result<BackupSummary> {
    let job = BackupJob {
        repository: &repository.repository,
        hypervisor,
        vm: vm.into(),
        name: None,
        source: "hyperv://hv1/".into(),
        level,
        outside_changes: false,
        consistency: None,
        allow_downgrade: false,
        tags: BTreeMap::new(),
        exclude: Vec::new(),
        is_one_of_many: false,
        check_unchanged: 0,
        options: BackupOptions { workers: 2, ..BackupOptions::default() },
    };
    let (progress, cancel) = (Progress::new(), CancelToken::new());
    let observer = Silent;
    backup(&job, JobContext { progress: &progress, cancel: &cancel, observer: &observer })
}

/// The newest restore point of a name is what the disks of the VM hold.
fn assert_restores(repository: &TestRepository, world: &TestHost, vm: usize) {
    let name = world.world().setting(world.id(vm), "ElementName").unwrap();
    let name = name.as_str().unwrap();
    let point = repository.repository.latest(name).unwrap().unwrap();
    assert_eq!(point.disks.len(), world.disks(vm));
    for disk in 0..world.disks(vm) {
        let id = format!("scsi0:{}", world.location(vm, disk));
        let device = repository.repository.open_disk(&point, &id).unwrap();
        let mut bytes = vec![0; world.size(vm, disk)];
        device.read_at(&mut bytes, 0).unwrap();
        assert!(bytes == world.data(vm, disk), "{name} {id}");
    }
}

#[test]
fn a_line_of_restore_points_goes_by_the_vm_and_its_disks() {
    let (repository, world) = (TestRepository::new(), TestHost::new());
    let state = tempfile::tempdir().unwrap();
    let id = world.add_vm("web", &[SIZE, 2 * SIZE]).to_string();
    world.write(0, 0, 1000, &[1; 50_000]);
    let hypervisor = hypervisor(&world, state.path());
    let first = run(&repository, &hypervisor, "web", LevelChoice::Auto).unwrap();
    assert_eq!((first.level, first.consistency.as_str()), (Level::Full, "app"));
    assert_eq!(first.warnings, Vec::<String>::new());
    // The restore point has the id of the reference point, which came after all was read.
    let tracking = first.disks[0].tracking.id.as_ref().unwrap().to_lowercase();
    assert!(tracking.contains(&world.points(0)[0]), "{tracking}");
    assert_restores(&repository, &world, 0);
    // It is renamed, and its disks trade places.
    world.world().rename(world.id(0), "shop");
    world.swap(0, 0, 1);
    world.write(0, 1, 300_000, &[2; 100]);
    let second = run(&repository, &hypervisor, &id, LevelChoice::Auto).unwrap();
    assert_eq!((second.level, second.vm.as_str()), (Level::Incremental, "shop"));
    assert!(second.warnings.iter().any(|text| text.contains("is web")), "{:?}", second.warnings);
    assert!(second.disks.iter().all(|disk| disk.tracking.used), "{:?}", second.disks);
    let read: u64 = second.disks.iter().map(|disk| disk.counts.read_bytes).sum();
    // One block of what changed, and one at the end of each disk that is looked at always.
    assert!(read <= 3 * 65_536, "{read}");
    assert_restores(&repository, &world, 0);
    // Another VM gets the old name: it has no base, and leaves the first one's alone.
    let directory = r"C:\VMs\another".to_owned();
    world.add(&VmSpec { directory, ..VmSpec::new("web", &[SIZE as u64]) });
    let third = run(&repository, &hypervisor, "web", LevelChoice::Auto).unwrap();
    assert_eq!(third.level, Level::Full);
    assert_restores(&repository, &world, 1);
    let fourth = run(&repository, &hypervisor, "shop", LevelChoice::Auto).unwrap();
    assert!(
        fourth.level == Level::Incremental && fourth.disks.iter().all(|disk| disk.tracking.used)
    );
    assert_eq!((world.points(0).len(), world.points(1).len()), (1, 1));
    assert_eq!(world.leftovers(), Vec::<String>::new());
}

#[test]
fn fifty_vms_four_at_a_time_stay_in_their_memory() {
    const VMS: usize = 50;
    let (repository, world) = (TestRepository::new(), TestHost::new());
    let state = tempfile::tempdir().unwrap();
    for n in 0..VMS {
        world.add_vm(&format!("vm{n:02}"), &[SIZE, SIZE]);
        world.write(n, 0, n * 100, &vec![n as u8 + 1; 60_000]);
    }
    world.world().set(world.id(7), "Notes", CimValue::strings(["vmtide:tag=gold"]));
    let hypervisor = hypervisor(&world, state.path());
    let selector: VmSelector = "vm*".parse().unwrap();
    for (round, level) in [Level::Full, Level::Incremental].into_iter().enumerate() {
        let vms = hypervisor.select(&selector).unwrap();
        assert_eq!(vms.len(), VMS);
        let done = run_limited(
            &vms,
            |_| vec!["c:".into()],
            Limits { parallel: 4, per_volume: None },
            &CancelToken::new(),
            |vm| run(&repository, &hypervisor, vm.id.as_deref().unwrap(), LevelChoice::Auto),
        );
        for (n, summary) in done.into_iter().enumerate() {
            let summary = summary.unwrap().unwrap();
            assert_eq!((summary.level, summary.warnings.len()), (level, 0), "{round} {n}");
            assert_restores(&repository, &world, n);
            world.write(n, 1, 5000, b"between");
        }
    }
    assert_eq!(world.leftovers(), Vec::<String>::new());
    assert!((0..VMS).all(|n| world.points(n).len() == 1));
    #[cfg(target_os = "linux")]
    {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
        // With the stand-in's own disks, 25 MiB and their frozen copies.
        assert!(kib <= 512 * 1024, "{kib} KiB");
        println!("peak {kib} KiB");
    }
}
