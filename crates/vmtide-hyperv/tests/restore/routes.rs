//! Both routes, property by property.

use crate::fake::{Manners, SystemBuilder, guid};
use crate::support::{
    WEB, assert_disks, config_of, disk_at, origin, put_disk, request, restore, restorer, target,
    web,
};
use uuid::Uuid;
use vmtide_hypervisor::{
    DiskBus, DiskConfig, DiskId, Firmware, RestoreRoute, VmConfig, VmIdentity, VmRestorer,
};

const MANNERS: [Manners; 4] = [
    Manners { jobs: false, silent: false, text: false, refuses_imports: None },
    Manners { jobs: true, silent: false, text: true, refuses_imports: None },
    Manners { jobs: true, silent: true, text: false, refuses_imports: None },
    Manners { jobs: false, silent: true, text: true, refuses_imports: None },
];

#[test]
fn the_exact_route_brings_the_vm_back_as_it_was() {
    for manners in MANNERS {
        let (system, state) = (web(), tempfile::tempdir().unwrap());
        let config = config_of(&system, &origin(&system));
        let fake = target(&system);
        fake.change(|state| state.manners = manners);
        let done =
            restore(&restorer(&fake, state.path()), &request(&config, "web", RestoreRoute::Auto));
        let done = done.unwrap();
        assert_eq!((done.route, done.same_id), (Some(RestoreRoute::Exact), true), "{manners:?}");
        assert_eq!(done.id, WEB.to_string());
        fake.change(|state| state.manners = Manners::default());
        assert_disks(&fake, &config, WEB);
        let state = fake.0.lock();
        let found = state.systems.iter().find(|one| one.id == WEB).unwrap();
        assert!(!found.planned && !found.running);
        // Every setting but those that a restore changes.
        for (name, value) in &system.settings.properties {
            if !["ConfigurationDataRoot"].contains(&name.as_str()) {
                assert_eq!(found.settings.value(name), Some(value), "{name}");
            }
        }
        assert_eq!(found.settings.text("ConfigurationDataRoot").unwrap(), r"C:\Hyper-V\web");
        for resource in &system.resources {
            let id = resource.text("InstanceID").unwrap();
            let now = found.resources.iter().find(|one| one.text("InstanceID") == Ok(id));
            if resource.text("ResourceSubType") == Ok("Microsoft:Hyper-V:Virtual CD/DVD Disk") {
                assert!(now.is_none(), "the medium is out of its drive");
                continue;
            }
            for (name, value) in &resource.properties {
                if !["HostResource", "EnabledState"].contains(&name.as_str()) {
                    assert_eq!(now.unwrap().value(name), Some(value), "{id} {name}");
                }
            }
            if resource.value("EnabledState").is_some() {
                assert_eq!(now.unwrap().number::<u16>("EnabledState"), Ok(3), "disconnected");
            }
        }
        // Temporary files are gone, those of the VM are there.
        let files: Vec<_> = state.files.values().map(|file| file.path.as_str()).collect();
        assert_eq!(files.len(), 4, "{files:?}");
        assert!(!state.directories.iter().any(|path| path.contains("import")));
    }
}

#[test]
fn the_portable_route_makes_the_same_vm_of_its_settings() {
    for manners in MANNERS {
        let (system, state) = (web(), tempfile::tempdir().unwrap());
        let config = config_of(&system, &origin(&system));
        let fake = target(&system);
        fake.change(|state| state.manners = manners);
        let wanted = request(&config, "web", RestoreRoute::Portable);
        let done = restore(&restorer(&fake, state.path()), &wanted).unwrap();
        assert_eq!((done.route, done.same_id), (Some(RestoreRoute::Portable), false));
        fake.change(|state| state.manners = Manners::default());
        let id = Uuid::parse_str(&done.id).unwrap();
        assert_disks(&fake, &config, id);
        let host = fake.host();
        let vm = host.vm(id).unwrap();
        let now = host.configuration(&vm, &vm.settings).unwrap().config;
        assert_eq!(
            (&now.name, now.processors, now.memory_bytes),
            (&config.name, config.processors, config.memory_bytes)
        );
        assert_eq!((now.firmware, now.secure_boot), (config.firmware, Some(true)));
        assert_eq!(now.secure_boot_template, config.secure_boot_template);
        assert_eq!((&now.notes, &now.controllers), (&config.notes, &config.controllers));
        let boots = |config: &VmConfig| {
            let mut order: Vec<_> =
                config.disks.iter().map(|disk| (disk.boot_index, disk.id.clone())).collect();
            order.sort();
            order.into_iter().map(|(_, id)| id).collect::<Vec<_>>()
        };
        assert_eq!(boots(&now), boots(&config), "{manners:?}");
        assert_eq!(vm.settings.instance.text("BIOSSerialNumber"), Ok("1234-5678"));
        let mut adapters: Vec<_> =
            now.network_adapters.iter().map(|one| (one.name.clone(), one.mac.clone())).collect();
        adapters.sort();
        // A given address is given anew; a set one stays.
        let front = (Some("Front".to_owned()), Some("00:15:5d:00:00:01".to_owned()));
        assert_eq!(adapters, [(Some("Back".into()), None), front]);
        assert!(now.network_adapters.iter().all(|one| one.network.is_none()), "none is connected");
        assert!(done.warnings.iter().any(|line| line.contains("new id")), "{:?}", done.warnings);
    }
}

#[test]
fn disks_keep_their_ids_and_sectors_only_where_the_vm_itself_comes_back() {
    for (name, keeps) in [("web", true), ("web-copy", false)] {
        let (system, state) = (web(), tempfile::tempdir().unwrap());
        let config = config_of(&system, &origin(&system));
        let fake = target(&system);
        let done =
            restore(&restorer(&fake, state.path()), &request(&config, name, RestoreRoute::Auto));
        let done = done.unwrap();
        assert_eq!(done.same_id, keeps);
        let path = format!(r"C:\Hyper-V\{name}\Virtual Hard Disks\");
        let (_, first) = disk_at(&fake, &format!("{path}web.vhdx"));
        assert_eq!(first.disk_id, keeps.then(|| Uuid::from_u128(0xD15C)));
        let (_, second) = disk_at(&fake, &format!("{path}{name}-scsi0_3.vhdx"));
        assert_eq!((second.logical_sector_bytes, second.physical_sector_bytes), (4096, 4096));
        let (_, third) = disk_at(&fake, &format!("{path}web-2.vhdx"));
        assert!(third.fixed);
        let state = fake.0.lock();
        let vm = state.systems.iter().find(|one| one.name() == name).unwrap();
        let front = vm.resources.iter().find(|one| one.text("ElementName") == Ok("Front")).unwrap();
        assert_eq!(front.optional_bool("StaticMacAddress"), Ok(Some(keeps)));
    }
}

#[test]
fn adapters_are_connected_where_the_map_says_and_the_switch_is_there() {
    for route in [RestoreRoute::Exact, RestoreRoute::Portable] {
        for (to, is_connected) in [("Lab", true), ("lab", true), ("None such", false)] {
            let (system, state) = (web(), tempfile::tempdir().unwrap());
            let config = config_of(&system, &origin(&system));
            let fake = target(&system);
            let mut wanted = request(&config, "web", route);
            wanted.networks.map.insert("LAN".into(), to.into());
            let done = restore(&restorer(&fake, state.path()), &wanted).unwrap();
            let host = fake.host();
            let vm = host.find("web").unwrap();
            let now = host.configuration(&vm, &vm.settings).unwrap().config;
            let networks: Vec<_> =
                now.network_adapters.iter().filter_map(|one| one.network.clone()).collect();
            let expected: &[&str] = if is_connected { &["Lab"] } else { &[] };
            assert_eq!(networks, expected, "{route:?} {to}");
            let warned = done.warnings.iter().any(|line| line.contains("None such"));
            assert_eq!(warned, !is_connected, "{:?}", done.warnings);
        }
    }
}

#[test]
fn a_host_that_refuses_the_configuration_files_gets_the_settings() {
    // Failed, not supported, file not found.
    for code in [32768, 32770, 32779] {
        a_refused_import_is_replaced(code);
    }
}

fn a_refused_import_is_replaced(code: u32) {
    let (system, state) = (web(), tempfile::tempdir().unwrap());
    let config = config_of(&system, &origin(&system));
    let fake = target(&system);
    fake.change(|state| state.manners.refuses_imports = Some(code));
    let restorer = restorer(&fake, state.path());
    let before = fake.inventory();
    assert!(restore(&restorer, &request(&config, "web", RestoreRoute::Exact)).is_err());
    assert_eq!(fake.inventory(), before);
    let done = restore(&restorer, &request(&config, "web", RestoreRoute::Auto)).unwrap();
    assert_eq!(done.route, Some(RestoreRoute::Portable));
    assert!(
        done.warnings.iter().any(|line| line.contains("configuration files")),
        "{:?}",
        done.warnings
    );
    assert_disks(&fake, &config, Uuid::parse_str(&done.id).unwrap());
}

#[test]
fn vms_of_other_platforms_get_a_generation_and_places() {
    let disk = |id: &str, boot_index| DiskConfig {
        id: DiskId(id.into()),
        size_bytes: (1 << 20) + 100,
        bus: DiskBus::VirtioBlk,
        path: Some(format!("/var/lib/{id}.qcow2")),
        boot_index,
        ..DiskConfig::default()
    };
    let mut config = VmConfig {
        name: "db".into(),
        platform: "qemu".into(),
        processors: Some(4),
        memory_bytes: Some(1_000_000_001),
        firmware: Some(Firmware::Bios),
        disks: vec![disk("virtio0", None), disk("virtio1", Some(1))],
        ..VmConfig::default()
    };
    for (firmware, generation, first) in [
        (Some(Firmware::Bios), 1, "ide0:0"),
        (Some(Firmware::Uefi), 2, "scsi0:0"),
        (None, 1, "ide0:0"),
    ] {
        config.firmware = firmware;
        config.secure_boot = Some(true);
        let (state, fake) = (tempfile::tempdir().unwrap(), crate::fake::FakeHost::new());
        let done =
            restore(&restorer(&fake, state.path()), &request(&config, "db", RestoreRoute::Auto));
        let done = done.unwrap();
        let host = fake.host();
        let vm = host.find("db").unwrap();
        let now = host.configuration(&vm, &vm.settings).unwrap().config;
        assert_eq!(now.machine.as_deref(), Some(format!("generation {generation}").as_str()));
        assert_eq!((now.processors, now.memory_bytes), (Some(4), Some(954 << 20)));
        let booting = now.disks.iter().find(|one| one.id.0 == first).unwrap();
        assert_eq!(
            booting.path.as_deref(),
            Some(r"C:\Hyper-V\db\Virtual Hard Disks\db-virtio1.vhdx")
        );
        let (_, made) = disk_at(&fake, booting.path.as_deref().unwrap());
        assert_eq!(made.size_bytes, (1 << 20) + 512, "whole sectors");
        assert_eq!(now.disks.len(), 2);
        let says = |word: &str| done.warnings.iter().any(|line| line.contains(word));
        assert_eq!(says("secure boot"), generation == 2);
        assert_eq!(says("does not say how"), firmware.is_none());
    }
}

#[test]
fn nothing_that_exists_is_replaced() {
    let (system, state) = (web(), tempfile::tempdir().unwrap());
    let config = config_of(&system, &origin(&system));
    let fake = target(&system);
    fake.change(|state| {
        state.systems.push(SystemBuilder::new(Uuid::from_u128(1), "Taken", 1).build());
        state.systems.push(SystemBuilder::new(WEB, "other", 1).build());
    });
    put_disk(&fake, r"C:\Hyper-V\full\Virtual Hard Disks\x.vhdx", vec![0; 4096], None);
    let restorer = restorer(&fake, state.path());
    let before = fake.inventory();
    let fails = |change: fn(&mut vmtide_hypervisor::NewVmRequest), word: &str| {
        let mut wanted = request(&config, "new", RestoreRoute::Auto);
        change(&mut wanted);
        let error = restore(&restorer, &wanted).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert_eq!(fake.inventory(), before, "{error}");
    };
    fails(|wanted| wanted.name = "taken".into(), "a VM of this name");
    fails(|wanted| wanted.name = "full".into(), "there are files already");
    fails(|wanted| wanted.name = " x".into(), "spaces");
    fails(|wanted| wanted.name = "x".repeat(101), "100 characters");
    fails(|wanted| wanted.name = "vmtide restore 0".into(), "not complete");
    fails(|wanted| wanted.identity = VmIdentity::Original, "--new-id");
    fails(|wanted| wanted.directory = Some("VMs".into()), "drive or share");
    fails(|wanted| wanted.disks[0].data_bytes = Some(1 << 50), "bytes free");
    fails(|wanted| wanted.disks[0].id = DiskId("nvme0".into()), "no place");
    fails(|wanted| wanted.cancel.cancel(), "interrupted");
    // Its own id is taken, so this is a copy.
    let done = restore(&restorer, &request(&config, "web", RestoreRoute::Auto)).unwrap();
    assert!(!done.same_id);
}

#[test]
fn disks_that_are_not_restored_are_not_attached() {
    for route in [RestoreRoute::Exact, RestoreRoute::Portable] {
        let (system, state) = (web(), tempfile::tempdir().unwrap());
        let mut config = config_of(&system, &origin(&system));
        let fake = target(&system);
        let mut wanted = request(&config, "web", route);
        wanted.disks.remove(1);
        let done = restore(&restorer(&fake, state.path()), &wanted).unwrap();
        config.disks.remove(1);
        assert_disks(&fake, &config, Uuid::parse_str(&done.id).unwrap());
    }
}

#[test]
fn a_restore_of_a_living_job_is_left_alone() {
    let (system, state) = (web(), tempfile::tempdir().unwrap());
    let config = config_of(&system, &origin(&system));
    let fake = target(&system);
    let before = fake.inventory();
    let vm =
        restorer(&fake, state.path()).begin(&request(&config, "web", RestoreRoute::Auto)).unwrap();
    let during = fake.inventory();
    let other = restorer(&fake, state.path());
    let report = other.reap_restores().unwrap();
    assert_eq!(
        (report.removed.as_slice(), report.in_use.as_slice()),
        (&[][..], &["web".to_owned()][..])
    );
    assert_eq!(fake.inventory(), during);
    let busy = other.begin(&request(&config, "WEB", RestoreRoute::Auto)).map(drop).unwrap_err();
    assert!(matches!(busy, vmtide_hypervisor::HypervisorError::Busy { .. }), "{busy}");
    vm.abort().unwrap();
    assert_eq!(fake.inventory(), before);
    // Also one that is only dropped.
    drop(other.begin(&request(&config, "web", RestoreRoute::Auto)).unwrap());
    assert_eq!(fake.inventory(), before);
    assert_eq!(other.reap_restores().unwrap().in_use, Vec::<String>::new());
}

#[test]
fn a_vm_that_will_not_start_is_complete_all_the_same() {
    let (system, state) = (web(), tempfile::tempdir().unwrap());
    let config = config_of(&system, &origin(&system));
    let fake = target(&system);
    let vm =
        restorer(&fake, state.path()).begin(&request(&config, "web", RestoreRoute::Auto)).unwrap();
    let done = vm.finish(true).unwrap();
    assert!(done.powered_on);
    assert!(fake.0.lock().systems.iter().any(|one| one.name() == "web" && one.running));
    assert!(guid(1).ends_with("0001"));
}
