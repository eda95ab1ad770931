//! The configuration of a VM and the look over a host, over the stand-in's objects and files.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that panics has failed"
)]

use std::sync::Arc;
use vmtide_hyperv::{
    Clock, Host, HostOptions, SnapshotRequest, capture_files, configuration_files, doctor,
    native_settings,
};
use vmtide_hypervisor::{Consistency, HealthState};
use vmtide_standin_hyperv_host::{AnswerForm, DiskKind, DiskSpec, VmSpec, World, WorldOptions};

/// The host's own time: waiting lets it go on.
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

fn spec() -> VmSpec {
    let mut spec = VmSpec::new("web", &[4 << 20, 2 << 20]);
    spec.memory_mib = 4096;
    spec.processors = 3;
    spec.notes = vec!["the shop".into()];
    spec.adapters[0].mac = ("00155D01AF45".into(), true);
    spec.adapters[0].vlan = Some(42);
    spec.disks.push(DiskSpec { controller: 1, ..DiskSpec::scsi(7, 1 << 20) });
    spec
}

#[test]
fn a_configuration_is_the_same_however_it_is_asked_for_and_at_a_checkpoint() {
    let mut seen = Vec::new();
    for form in [AnswerForm::Typed, AnswerForm::Texts] {
        let directory = tempfile::tempdir().unwrap();
        let world = World::new(directory.path(), WorldOptions::default());
        let id = world.add_vm(&spec());
        let host = host(&world, form);
        let vm = host.vm(id).unwrap();
        let mut configuration = host.configuration(&vm, &vm.settings).unwrap();
        host.describe_disks(&mut configuration);
        let config = configuration.config;
        assert_eq!((config.processors, config.memory_bytes), (Some(3), Some(4 << 30)));
        assert_eq!(config.notes.as_deref(), Some("the shop"));
        let disks: Vec<_> =
            config.disks.iter().map(|disk| (disk.id.0.as_str(), disk.size_bytes)).collect();
        assert_eq!(disks.len(), 3, "{disks:?}");
        let sizes: u64 = disks.iter().map(|(_, size)| size).sum();
        assert_eq!(sizes, 7 << 20, "{disks:?}");
        for (disk, index) in [(0, "system"), (1, "data")] {
            let id = world.disk_id(id, disk).to_string();
            assert!(config.disks.iter().any(|one| one.image_id.as_deref() == Some(&id)), "{index}");
        }
        let adapter = &config.network_adapters[0];
        assert_eq!(adapter.mac.as_deref(), Some("00:15:5d:01:af:45"));
        assert_eq!((adapter.network.as_deref(), adapter.vlan), (Some("External"), Some(42)));
        assert_eq!(adapter.static_mac, Some(true));
        // A checkpoint has the same, but for the paths of its files.
        let request = SnapshotRequest {
            consistency: Consistency::Application,
            backup_type: vmtide_hyperv::BackupType::Copy,
            ignore_non_snapshottable: true,
        };
        let cancel = vmtide_block::CancelToken::new();
        let snapshot = host.create_recovery_snapshot(&vm, &request, &cancel).unwrap();
        let mut frozen = host.configuration(&vm, &snapshot.settings).unwrap();
        host.describe_disks(&mut frozen);
        let portable = |mut config: vmtide_hypervisor::VmConfig| {
            config.native.clear();
            config
        };
        assert_eq!(portable(frozen.config.clone()), portable(config.clone()));
        let files = world.files();
        let captured = capture_files(files.as_ref(), &snapshot.settings);
        let mut whole = frozen.config;
        whole.native.extend(captured.files);
        let kept = configuration_files(&whole).unwrap();
        assert!(kept.iter().any(|(name, _)| name.to_lowercase().ends_with(".vmcx")), "{kept:?}");
        host.destroy_snapshot(&snapshot, &cancel).unwrap();
        seen.push((config.clone(), native_settings(&config).unwrap().unwrap()));
    }
    let second = seen.pop().unwrap();
    let first = seen.pop().unwrap();
    assert_eq!(first.0.disks, second.0.disks);
    assert_eq!(first.1, second.1);
}

#[test]
fn doctor_finds_what_is_wrong_with_a_host() {
    for form in [AnswerForm::Typed, AnswerForm::Texts] {
        let directory = tempfile::tempdir().unwrap();
        let world = World::new(directory.path(), WorldOptions::default());
        world.add_vm(&spec());
        let mut old = VmSpec::new("old", &[1 << 20]);
        old.generation = 1;
        old.version = "5.0".into();
        old.running = false;
        old.disks[0].kind = DiskKind::Vhd;
        old.disks[0].ide = true;
        old.disks.push(DiskSpec { kind: DiskKind::PassThrough, ..DiskSpec::scsi(1, 1 << 20) });
        world.add_vm(&old);
        let host = host(&world, form);
        let files = world.files();
        let checks = doctor::examine(&host, Some(files.as_ref()), None);
        let worst = |vm: &str| {
            let of_vm = checks.iter().filter(|one| one.detail.contains(vm));
            of_vm.map(|one| one.state).max().unwrap()
        };
        assert_eq!(worst("web"), HealthState::Ok, "{checks:#?}");
        assert_eq!(worst("old"), HealthState::Warn, "{checks:#?}");
        let names: Vec<_> = checks.iter().map(|one| one.name.as_str()).collect();
        for name in
            ["host", "rights", "Windows", "virus scanner", "version", "change tracking", "space"]
        {
            assert!(names.contains(&name), "{name}: {names:?}");
        }
        assert!(checks.iter().all(|one| one.state != HealthState::Fail), "{checks:#?}");
    }
}
