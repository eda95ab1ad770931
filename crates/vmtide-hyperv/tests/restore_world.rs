//! Restores of backups, both on the stand-in host that is held to the documented schema: what its guests
//! wrote is backed up by the cycle and restored by both routes, and compared byte by byte.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::{BlockDevice, CancelToken, CopyOptions, Progress, copy_device};
use vmtide_hyperv::{Clock, Host, HostOptions, HypervHypervisor, HypervOptions, HypervRestorer};
use vmtide_hypervisor::{
    Consistency, DiskToRestore, FreezeRequest, FrozenVm, Hypervisor, InPlaceRequest, JobId,
    NetworkPlan, NewVmRequest, RestoreRoute, RestoredVm, Result, VmIdentity, VmRestorer,
};
use vmtide_standin_hyperv_host::{AnswerForm, Content, VmSpec, World, WorldOptions};

/// Time of the stand-in: waiting makes its jobs go on.
struct WorldClock(World);

impl Clock for WorldClock {
    fn now_ms(&self) -> u64 {
        self.0.now_ms()
    }
    fn sleep_ms(&self, ms: u64) {
        self.0.advance(ms);
    }
}

fn host(world: &World, form: AnswerForm) -> Host {
    let clock = Arc::new(WorldClock(world.clone()));
    Host::new(world.cim_in(form), HostOptions { clock, ..HostOptions::default() })
}

/// A VM with two disks, and what its guest has written.
fn source(directory: &Path) -> (World, Uuid, Vec<Content>) {
    let world = World::new(directory, WorldOptions::default());
    world.add_switch("External");
    world.add_switch("Lab");
    let mut spec = VmSpec::new("web", &[8 << 20, 4 << 20]);
    spec.running = false;
    spec.memory_mib = 3072;
    spec.processors = 3;
    spec.notes = vec!["the web server".into()];
    let vm = world.add_vm(&spec);
    world.write(vm, 0, 0, b"boot");
    world.write(vm, 0, (5 << 20) + 7, &[0xAB; 100_000]);
    world.write(vm, 1, (4 << 20) - 4096, &[0xCD; 4096]);
    let contents = vec![world.content(vm, 0), world.content(vm, 1)];
    (world, vm, contents)
}

fn freeze(world: &World, state: &Path) -> Box<dyn FrozenVm> {
    try_freeze(world, state, "web").unwrap()
}

fn try_freeze(world: &World, state: &Path, vm: &str) -> Result<Box<dyn FrozenVm>> {
    let hypervisor = HypervHypervisor::new(
        host(world, AnswerForm::Typed),
        world.files(),
        HypervOptions::new(state),
    );
    let request = FreezeRequest {
        vm: vm.into(),
        job: JobId::random(),
        lineage: "0123456789abcdef".into(),
        consistency: Consistency::Crash,
        allow_downgrade: true,
        bases: BTreeMap::new(),
        exclude: Vec::new(),
        cancel: CancelToken::new(),
    };
    hypervisor.freeze(&request)
}

fn restore(
    restorer: &HypervRestorer,
    frozen: &dyn FrozenVm,
    change: impl FnOnce(&mut NewVmRequest),
) -> RestoredVm {
    let disks = frozen.disks().iter().map(|disk| DiskToRestore {
        id: disk.id.clone(),
        size_bytes: disk.device.size_bytes(),
        data_bytes: None,
        tracking: None,
    });
    let mut request = NewVmRequest {
        config: frozen.config().clone(),
        name: "web".into(),
        job: JobId::random(),
        disks: disks.collect(),
        identity: VmIdentity::Auto,
        route: RestoreRoute::Auto,
        directory: Some(r"C:\Restored".into()),
        networks: NetworkPlan::default(),
        firmware: None,
        cancel: CancelToken::new(),
    };
    change(&mut request);
    let vm = restorer.begin(&request).unwrap();
    for disk in vm.disks() {
        let source = frozen.disks().iter().find(|one| one.id == disk.id).unwrap();
        let options = CopyOptions { target_is_zero: true, workers: 1, ..CopyOptions::default() };
        copy_device(&source.device, &*disk.device, &options, &Progress::new(), &CancelToken::new())
            .unwrap();
    }
    vm.finish(false).unwrap()
}

#[test]
fn what_was_backed_up_on_one_host_is_restored_on_another_by_both_routes() {
    for form in [AnswerForm::Typed, AnswerForm::Texts] {
        for route in [RestoreRoute::Exact, RestoreRoute::Portable] {
            let directory = tempfile::tempdir().unwrap();
            let (origin, vm, contents) = source(&directory.path().join("origin"));
            let frozen = freeze(&origin, &directory.path().join("state1"));
            let target = World::new(directory.path().join("target"), WorldOptions::default());
            target.add_switch("Lab");
            let there = host(&target, form);
            let restorer =
                HypervRestorer::new(there.clone(), target.files(), directory.path().join("state2"));
            let done = restore(&restorer, &*frozen, |request| {
                request.route = route;
                request.networks.map.insert("External".into(), "Lab".into());
            });
            let what = format!("{route:?} {form:?}");
            assert_eq!(done.route, Some(route), "{what}");
            assert_eq!(done.same_id, route == RestoreRoute::Exact, "{what}");
            let id = Uuid::parse_str(&done.id).unwrap();
            assert_eq!(id == vm, done.same_id);
            let record = there.vm(id).unwrap();
            let now = there.configuration(&record, &record.settings).unwrap().config;
            let was = frozen.config();
            assert_eq!(
                (&now.name, now.firmware, now.processors, now.memory_bytes, &now.notes),
                (&was.name, was.firmware, was.processors, was.memory_bytes, &was.notes),
                "{what}"
            );
            assert_eq!((&now.controllers, now.secure_boot), (&was.controllers, was.secure_boot));
            let networks: Vec<_> =
                now.network_adapters.iter().map(|one| one.network.as_deref()).collect();
            assert_eq!(networks, [Some("Lab")], "{what}");
            for (disk, content) in there.disks(&record.settings).unwrap().iter().zip(&contents) {
                let file = target.files().open_disk(&disk.host_resource).unwrap();
                content.compare(&*file.device).unwrap_or_else(|error| panic!("{what}: {error}"));
            }
            assert_eq!(target.vms(), [id], "{what}");
            let files = target.all_files();
            let is_temporary = |name: &&String| name.contains("INCOMPLETE");
            assert_eq!(files.iter().filter(is_temporary).count(), 0, "{what}: {files:?}");
            frozen.abort().unwrap();
        }
    }
}

#[test]
fn a_copy_lives_beside_its_original() {
    let directory = tempfile::tempdir().unwrap();
    let (world, vm, contents) = source(&directory.path().join("host"));
    let state = directory.path().join("state");
    let frozen = freeze(&world, &state);
    let there = host(&world, AnswerForm::Typed);
    let restorer = HypervRestorer::new(there.clone(), world.files(), &state);
    let before: Vec<_> = world.all_files();
    let done = restore(&restorer, &*frozen, |request| request.name = "web-copy".into());
    assert!(!done.same_id);
    let copy = there.find("web-copy").unwrap();
    let disks = there.disks(&copy.settings).unwrap();
    for (index, (disk, content)) in disks.iter().zip(&contents).enumerate() {
        let file = world.files().open_disk(&disk.host_resource).unwrap();
        content.compare(&*file.device).unwrap();
        assert_ne!(file.disk_id, Some(world.disk_id(vm, index)), "its own id");
        assert_eq!(file.device.size_bytes(), content.size_bytes());
    }
    let config = there.configuration(&copy, &copy.settings).unwrap().config;
    assert!(config.network_adapters.iter().all(|one| one.network.is_none()));
    frozen.abort().unwrap();
    world.settle();
    assert!(before.iter().filter(|name| name.contains("VMs")).all(|name| {
        name.contains("avhdx") || name.contains("Snapshots") || world.all_files().contains(name)
    }));
}

#[test]
fn disks_between_two_moments_are_never_backed_up_whatever_the_vm_is_called() {
    for name in ["x".repeat(90), "web".to_owned()] {
        let directory = tempfile::tempdir().unwrap();
        let world = World::new(directory.path().join("host"), WorldOptions::default());
        let mut spec = VmSpec::new(&name, &[1 << 20]);
        spec.running = false;
        let vm = world.add_vm(&spec);
        let state = directory.path().join("state");
        let there = host(&world, AnswerForm::Typed);
        let frozen = try_freeze(&world, &state, &name).unwrap();
        let config = frozen.config().clone();
        let request = InPlaceRequest {
            vm: name.clone(),
            point: "3fa9c1d2".into(),
            job: JobId::random(),
            disks: vec![DiskToRestore {
                id: config.disks[0].id.clone(),
                size_bytes: 1 << 20,
                data_bytes: None,
                tracking: None,
            }],
            config,
            known_tracking: Vec::new(),
            cancel: CancelToken::new(),
        };
        frozen.abort().unwrap();
        world.settle();
        let restorer = HypervRestorer::new(there.clone(), world.files(), &state);
        restorer.begin_in_place(&request).unwrap().abort().unwrap();
        let marked = there.vm(vm).unwrap();
        if marked.name != name {
            there.rename(&marked.settings, &name).unwrap();
        }
        let error = try_freeze(&world, &state, &name).map(drop).unwrap_err();
        assert!(error.to_string().contains("was not finished"), "{error}");
        restorer.begin_in_place(&request).unwrap().finish(false).unwrap();
        try_freeze(&world, &state, &name).unwrap().abort().unwrap();
    }
}
