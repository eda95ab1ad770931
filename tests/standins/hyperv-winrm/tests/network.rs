//! Hyper-V's backup cycle over the network: vmtide's WS-Management client, the stand-in for WinRM, the stand-in host.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use hyperv_winrm::HostSchema;
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::CancelToken;
use vmtide_cim::{Cim, CimInstance, ObjectPath};
use vmtide_hyperv::{
    Clock, Host, HostOptions, HypervHypervisor, HypervOptions, SnapshotKind, VmRecord, VmSettings,
};
use vmtide_hypervisor::{
    Base, Changes, Consistency, DiskId, FreezeRequest, FrozenVm, Hypervisor, JobId, TrackingId,
};
use vmtide_standin_hyperv_host::{VmSpec, World, WorldOptions};
use vmtide_wsman::{Authentication, Credentials, WsmanCim, WsmanOptions};
use wsman_server::{Effect, Operation, Server, ServerOptions, Switch};
use zeroize::Zeroizing;

const MIB: u64 = 1 << 20;

/// The host's simulated time: waiting lets it go on.
struct SimulatedClock(World);

impl Clock for SimulatedClock {
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

struct Lab {
    world: World,
    vm: Uuid,
    server: Server,
    state: tempfile::TempDir,
    _volumes: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let volumes = tempfile::tempdir().unwrap();
        let world = World::new(volumes.path(), WorldOptions::default());
        let vm = world.add_vm(&VmSpec::new("Büro & Co. <1>", &[8 * MIB, 4 * MIB, 4 * MIB]));
        for (disk, byte) in [7, 8, 9].into_iter().enumerate() {
            world.write(vm, disk, 100_000, &[byte; 200_000]);
        }
        let server =
            Server::start(ServerOptions::default(), world.cim(), Arc::new(HostSchema)).unwrap();
        Self { world, vm, server, state: tempfile::tempdir().unwrap(), _volumes: volumes }
    }

    fn client(&self) -> Arc<dyn Cim> {
        let mut options = WsmanOptions::new("127.0.0.1");
        options.port = Some(self.server.address().port());
        options.authentication = Authentication::Ntlm;
        options.credentials =
            Some(Credentials::new("admin", Zeroizing::new("P4ssw0rd!".into())).unwrap());
        Arc::new(WsmanCim::new(options).unwrap())
    }

    fn host(&self, cim: Arc<dyn Cim>) -> Host {
        let clock = Arc::new(SimulatedClock(self.world.clone()));
        Host::new(cim, HostOptions { clock, ..HostOptions::default() })
    }

    fn hypervisor(&self) -> HypervHypervisor {
        let options = HypervOptions::new(self.state.path());
        HypervHypervisor::new(self.host(self.client()), self.world.files(), options)
    }

    fn freeze(
        &self,
        bases: &BTreeMap<DiskId, Base>,
    ) -> vmtide_hypervisor::Result<Box<dyn FrozenVm>> {
        self.hypervisor().freeze(&FreezeRequest {
            vm: self.vm.to_string(),
            job: JobId::random(),
            lineage: "0123456789abcdef".into(),
            consistency: Consistency::Application,
            allow_downgrade: false,
            bases: bases.clone(),
            exclude: Vec::new(),
            cancel: CancelToken::new(),
        })
    }

    /// Every disk reads as the guest's was when it was frozen.
    fn want_content(&self, frozen: &dyn FrozenVm) {
        let contents = self.world.frozen_content(self.vm).unwrap();
        assert_eq!(frozen.disks().len(), contents.len());
        for (number, disk) in frozen.disks().iter().enumerate() {
            let content = &contents[&self.world.disk_id(self.vm, number)];
            content.compare(disk.device.as_ref()).unwrap();
        }
    }

    /// What the host refused. Backups ask for classes that a host need not have; nothing else is refused in one that
    /// goes well.
    fn faults(&self) -> Vec<String> {
        let log = self.server.log();
        let refused = log.iter().filter(|seen| seen.status == 500);
        let refused = refused.filter(|seen| {
            let missing = seen.reason.contains("does not exist in the namespace");
            !missing || seen.operation != Some(Operation::Enumerate)
        });
        refused.map(|seen| format!("{} {}: {}", seen.action, seen.resource, seen.reason)).collect()
    }
}

fn bases(tracking: BTreeMap<DiskId, TrackingId>, frozen: &dyn FrozenVm) -> BTreeMap<DiskId, Base> {
    let sizes: BTreeMap<DiskId, u64> =
        frozen.disks().iter().map(|disk| (disk.id.clone(), disk.device.size_bytes())).collect();
    tracking
        .into_iter()
        .map(|(id, tracking)| {
            let size_bytes = sizes[&id];
            (id, Base { tracking: Some(tracking), size_bytes })
        })
        .collect()
}

#[test]
fn a_vm_is_backed_up_again_and_again() {
    let lab = Lab::new();
    let mut known = BTreeMap::new();
    for round in 0..4u8 {
        let mut frozen = lab.freeze(&known).unwrap();
        // The guest goes on meanwhile.
        lab.world.write(lab.vm, 0, MIB, &[0xee; 4096]);
        lab.want_content(frozen.as_ref());
        for disk in frozen.disks() {
            let tracked = matches!(disk.changes, Changes::Ranges(_));
            assert_eq!(tracked, round > 0, "round {round}, disk {}: {:?}", disk.id, disk.changes);
        }
        assert_eq!(frozen.consistency(), Consistency::Application);
        frozen.check().unwrap();
        let seal = frozen.seal().unwrap();
        assert_eq!(seal.tracking.len(), 3, "{:?}", seal.warnings);
        known = bases(seal.tracking, frozen.as_ref());
        let left = frozen.commit().unwrap();
        assert!(left.is_empty(), "{left:?}");
        lab.world.write(lab.vm, 1, 123_456 * (u64::from(round) + 1), &[round + 1; 10_000]);
        lab.world.settle();
        let left = lab.world.leftovers();
        assert_eq!(left.reference_points.len(), 1, "{left:?}");
        assert!(left.recovery_snapshots.is_empty() && left.unmerged_files.is_empty(), "{left:?}");
    }
    let faults = lab.faults();
    assert!(faults.is_empty(), "{faults:#?}");
    assert!(
        lab.server
            .log()
            .iter()
            .all(|seen| seen.sealed || seen.operation.is_none_or(|it| it == Operation::Login))
    );
}

/// Settings without what differs by nature: over the network values have no types, and paths no host.
fn settings(mut settings: VmSettings) -> VmSettings {
    settings.instance = CimInstance::default();
    settings.path.host = None;
    settings
}

#[test]
fn records_are_the_same_as_on_the_host_itself() {
    let lab = Lab::new();
    lab.world.add_vm(&VmSpec { generation: 1, running: false, ..VmSpec::new("second", &[]) });
    let (near, far) = (lab.host(lab.world.cim()), lab.host(lab.client()));
    let vms = |host: &Host| -> Vec<VmRecord> {
        let plain = |vm: VmRecord| VmRecord {
            path: ObjectPath { host: None, ..vm.path },
            settings: settings(vm.settings),
            ..vm
        };
        host.vms().unwrap().into_iter().map(plain).collect()
    };
    assert_eq!(vms(&far).len(), 2);
    assert_eq!(format!("{:#?}", vms(&far)), format!("{:#?}", vms(&near)));
    let paths = |host: &Host| -> Vec<_> {
        let disks = host.disks(&host.vm(lab.vm).unwrap().settings).unwrap();
        disks.into_iter().map(|disk| (disk.instance_id, disk.path, disk.location)).collect()
    };
    assert_eq!(paths(&far).len(), 3);
    assert_eq!(paths(&far), paths(&near));
    let mut frozen = lab.freeze(&BTreeMap::new()).unwrap();
    let snapshots = |host: &Host| -> Vec<_> {
        let found = host.snapshots(lab.vm).unwrap();
        found
            .into_iter()
            .map(|found| (format!("{:#?}", settings(found.settings)), found.kind))
            .collect()
    };
    assert_eq!(snapshots(&far).len(), 1);
    assert_eq!(snapshots(&far), snapshots(&near));
    frozen.seal().unwrap();
    frozen.commit().unwrap();
    let points = far.reference_points(lab.vm).unwrap();
    assert_eq!(points.len(), 1);
    assert_eq!(points, near.reference_points(lab.vm).unwrap());
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

#[test]
fn a_lost_answer_to_any_call_leaves_nothing_behind() {
    // A cycle makes about ten calls; the answer to each of them is lost once.
    for call in 0..12 {
        let lab = Lab::new();
        let effect = if call % 2 == 0 { Effect::CutAfter } else { Effect::CutDuring };
        lab.server.switches().add(Switch { skip: call, ..Switch::once(effect, Operation::Invoke) });
        let done = lab.freeze(&BTreeMap::new()).and_then(|mut frozen| {
            lab.want_content(frozen.as_ref());
            frozen.check()?;
            frozen.seal()?;
            frozen.commit()
        });
        lab.server.switches().clear();
        // A next start at once, while the host may still be at it, and one later.
        for _ in 0..2 {
            lab.hypervisor().reap().unwrap();
            lab.world.settle();
        }
        clear_doubt(&lab.hypervisor(), lab.vm);
        lab.world.settle();
        let left = lab.world.leftovers();
        assert!(
            left.recovery_snapshots.is_empty()
                && left.unmerged_files.is_empty()
                && left.reference_points.len() <= 1,
            "call {call}, {done:?}: {left:?}"
        );
    }
}
