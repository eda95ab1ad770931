//! VMs with content on the stand-in host, their backups and restores.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::{BlockDevice, CancelToken, CopyOptions, Progress, copy_device};
use vmtide_hyperv::{Clock, Host, HostOptions, HypervHypervisor, HypervOptions, HypervRestorer};
use vmtide_hypervisor::{
    Base, Consistency, DiskId, DiskToRestore, FreezeRequest, FrozenVm, Hypervisor, InPlaceRequest,
    JobId, NetworkPlan, NewVmRequest, RestoreRoute, RestoredVm, RestoringVm, Result, VmIdentity,
    VmRestorer,
};
use vmtide_standin_hyperv_host::{AnswerForm, Content, VmSpec, World, WorldOptions};

/// Time of the stand-in: waiting makes its jobs go on.
pub struct WorldClock(pub World);

impl Clock for WorldClock {
    fn now_ms(&self) -> u64 {
        self.0.now_ms()
    }
    fn sleep_ms(&self, ms: u64) {
        self.0.advance(ms);
    }
    fn unix_s(&self) -> i64 {
        self.0.unix_s().try_into().unwrap()
    }
}

pub fn host(world: &World, form: AnswerForm) -> Host {
    let clock = Arc::new(WorldClock(world.clone()));
    Host::new(world.cim_in(form), HostOptions { clock, ..HostOptions::default() })
}

pub fn restorer(world: &World, state: &Path) -> HypervRestorer {
    HypervRestorer::new(host(world, AnswerForm::Typed), world.files(), state)
}

/// A VM with two disks that is off, and what its guest has written.
pub fn source(directory: &Path) -> (World, Uuid, Vec<Content>) {
    source_of(directory, WorldOptions::default(), |_| {})
}

/// The same on a host and of a VM that are changed.
pub fn source_of(
    directory: &Path,
    options: WorldOptions,
    change: impl FnOnce(&mut VmSpec),
) -> (World, Uuid, Vec<Content>) {
    let world = World::new(directory, options);
    world.add_switch("External");
    world.add_switch("Lab");
    let mut spec = VmSpec::new("web", &[8 << 20, 4 << 20]);
    spec.memory_mib = 3072;
    spec.processors = 3;
    spec.notes = vec!["the web server".into()];
    change(&mut spec);
    let vm = world.add_vm(&spec);
    world.write(vm, 0, 0, b"boot");
    world.write(vm, 0, (5 << 20) + 7, &[0xAB; 100_000]);
    world.write(vm, 1, (4 << 20) - 4096, &[0xCD; 4096]);
    world.power(vm, false);
    let contents = vec![world.content(vm, 0), world.content(vm, 1)];
    assert!(contents.iter().all(|content| content.written_bytes() > 0), "the guest wrote nothing");
    (world, vm, contents)
}

pub fn freeze(world: &World, state: &Path) -> Box<dyn FrozenVm> {
    try_freeze(world, state, "web").unwrap()
}

pub fn try_freeze(world: &World, state: &Path, vm: &str) -> Result<Box<dyn FrozenVm>> {
    freeze_from(world, state, vm, "0123456789abcdef", BTreeMap::new())
}

/// Freezes a VM for a line of restore points, from its last one.
pub fn freeze_from(
    world: &World,
    state: &Path,
    vm: &str,
    line: &str,
    bases: BTreeMap<DiskId, Base>,
) -> Result<Box<dyn FrozenVm>> {
    let hypervisor = HypervHypervisor::new(
        host(world, AnswerForm::Typed),
        world.files(),
        HypervOptions::new(state),
    );
    let request = FreezeRequest {
        vm: vm.into(),
        job: JobId::random(),
        lineage: line.into(),
        consistency: Consistency::Crash,
        allow_downgrade: true,
        bases,
        exclude: Vec::new(),
        cancel: CancelToken::new(),
    };
    hypervisor.freeze(&request)
}

/// Ends a backup as a job does. Answers with the bases of the next.
pub fn commit(mut frozen: Box<dyn FrozenVm>) -> BTreeMap<DiskId, Base> {
    frozen.check().unwrap();
    let sizes: Vec<_> =
        frozen.disks().iter().map(|disk| (disk.id.clone(), disk.device.size_bytes())).collect();
    let sealed = frozen.seal().unwrap();
    let base = |(id, size_bytes): (DiskId, u64)| {
        let tracking = sealed.tracking.get(&id).cloned();
        assert!(tracking.is_some(), "{id} has no tracking id: {:?}", sealed.warnings);
        (id, Base { tracking, size_bytes })
    };
    let bases = sizes.into_iter().map(base).collect();
    frozen.commit().unwrap();
    bases
}

pub fn request(frozen: &dyn FrozenVm, name: &str, route: RestoreRoute) -> NewVmRequest {
    NewVmRequest {
        config: frozen.config().clone(),
        name: name.into(),
        job: JobId::random(),
        disks: disks(frozen, &BTreeMap::new()),
        identity: VmIdentity::Auto,
        route,
        directory: Some(r"C:\Restored".into()),
        networks: NetworkPlan::default(),
        firmware: None,
        cancel: CancelToken::new(),
    }
}

pub fn in_place(frozen: &dyn FrozenVm, vm: &str, bases: &BTreeMap<DiskId, Base>) -> InPlaceRequest {
    InPlaceRequest {
        vm: vm.into(),
        config: frozen.config().clone(),
        point: "3fa9c1d2".into(),
        job: JobId::random(),
        disks: disks(frozen, bases),
        into_other_vm: false,
        known_tracking: bases.values().filter_map(|base| base.tracking.clone()).collect(),
        cancel: CancelToken::new(),
    }
}

fn disks(frozen: &dyn FrozenVm, bases: &BTreeMap<DiskId, Base>) -> Vec<DiskToRestore> {
    let disk = |disk: &vmtide_hypervisor::FrozenDisk| DiskToRestore {
        id: disk.id.clone(),
        size_bytes: disk.device.size_bytes(),
        data_bytes: None,
        tracking: bases.get(&disk.id).and_then(|base| base.tracking.clone()),
    };
    frozen.disks().iter().map(disk).collect()
}

/// Writes what `contents` hold to the disks, in their order.
pub fn write(vm: &dyn RestoringVm, contents: &[Content]) -> vmtide_block::Result<()> {
    for (disk, content) in vm.disks().iter().zip(contents) {
        let size = usize::try_from(content.size_bytes()).unwrap();
        let source = vmtide_block::MemoryDevice::from_bytes(content.read(0, size));
        let options = CopyOptions {
            target_is_zero: disk.content == vmtide_hypervisor::DiskContent::Zeros,
            workers: 1,
            ..CopyOptions::default()
        };
        copy_device(&source, &*disk.device, &options, &Progress::new(), &CancelToken::new())?;
    }
    Ok(())
}

/// A whole restore of a new VM.
pub fn restore(
    restorer: &HypervRestorer,
    request: &NewVmRequest,
    contents: &[Content],
) -> Result<RestoredVm> {
    let vm = restorer.begin(request)?;
    if let Err(error) = write(&*vm, contents) {
        vm.abort()?;
        return Err(error.into());
    }
    vm.finish(false)
}

/// A VM of the host holds `contents`, by its own files.
pub fn assert_holds(world: &World, vm: Uuid, contents: &[Content], what: &str) {
    let host = host(world, AnswerForm::Typed);
    let record = host.vm(vm).unwrap();
    let attached = host.disks(&record.settings).unwrap();
    assert_eq!(attached.len(), contents.len(), "{what}");
    for (disk, content) in attached.iter().zip(contents) {
        let file = world.files().open_disk(&disk.host_resource).unwrap();
        content.compare(&*file.device).unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}
