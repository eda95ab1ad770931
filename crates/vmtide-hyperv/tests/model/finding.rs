//! VMs, checkpoints and disks are found.

use crate::support::{Fake, OLD, SHAPES, SNAPSHOT, Shape, WEB, world};
use uuid::Uuid;
use vmtide_cim::{CimInstance, CimValue};
use vmtide_hyperv::{ControllerKind, DiskLocation, Generation, SnapshotKind, VmState, from_cim};
use vmtide_hypervisor::HypervisorError;

pub fn uuid(text: &str) -> Uuid {
    Uuid::parse_str(text).unwrap()
}

#[test]
fn vms_are_found_by_id_and_by_name() {
    for shape in SHAPES {
        for with_paths in [true, false] {
            let fake = Fake::build(shape, with_paths);
            let host = fake.host();
            let vms = host.vms().unwrap();
            let names: Vec<_> = vms.iter().map(|vm| vm.name.as_str()).collect();
            assert_eq!(names, ["old", "web"]);
            let web = host.vm(uuid(WEB)).unwrap();
            assert_eq!((web.state, web.settings.generation), (VmState::Running, Generation::Two));
            assert_eq!((web.settings.version, web.settings.secure_boot), ((9, 0), Some(true)));
            assert_eq!(web.path.key("Name"), Some(WEB));
            assert_eq!(web.path.class, "Msvm_ComputerSystem");
            let instance_id = format!("Microsoft:{WEB}");
            assert_eq!(web.settings.path.key("InstanceID"), Some(instance_id.as_str()));
            for name in ["web", "WEB", WEB, &WEB.to_lowercase(), &format!("{{{WEB}}}")] {
                assert_eq!(host.find(name).unwrap().id, web.id, "{name}");
            }
            let old = host.find("old").unwrap();
            assert_eq!((old.state, old.settings.generation), (VmState::Off, Generation::One));
            assert!(matches!(host.find("none"), Err(HypervisorError::NotFound { .. })));
            assert!(matches!(host.vm(Uuid::nil()), Err(HypervisorError::NotFound { .. })));
        }
    }
}

#[test]
fn a_name_that_several_vms_have_names_their_ids() {
    let fake = Fake::new(Shape::Typed);
    let twin = "12121212-0000-0000-0000-000000000000";
    let system = CimInstance::new("Msvm_ComputerSystem")
        .with("CreationClassName", "Msvm_ComputerSystem")
        .with("Name", twin)
        .with("ElementName", "WEB")
        .with("EnabledState", CimValue::Uint16(3));
    fake.add_at(r"root\virtualization\v2", system, None);
    fake.add(world::settings(twin, twin, "System:Realized", "WEB"));
    let host = fake.host();
    // As it is written goes before case.
    assert_eq!(host.find("WEB").unwrap().id, uuid(twin));
    assert_eq!(host.find("web").unwrap().id, uuid(WEB));
    let error = host.find("Web").unwrap_err().to_string();
    assert!(error.contains(twin) && error.contains(WEB), "{error}");
}

#[test]
fn a_vm_that_cannot_be_read_does_not_keep_others_from_being_found() {
    let fake = Fake::new(Shape::Typed);
    let lost = "12121212-0000-0000-0000-000000000000";
    let unread = world::settings(lost, lost, "System:Realized", "lost").with("Version", "");
    fake.add(unread);
    let host = fake.host();
    for name in ["web", WEB] {
        assert_eq!(host.find(name).unwrap().id, uuid(WEB), "{name}");
    }
    let error = host.find("LOST").unwrap_err();
    assert!(error.to_string().contains("Version"), "{error}");
    // A list of all without it would be taken for whole.
    host.vms().unwrap_err();
}

#[test]
fn checkpoints_are_told_by_their_kinds() {
    for shape in SHAPES {
        let fake = Fake::new(shape);
        for (id, kind) in [
            (SNAPSHOT, "Snapshot:Recovery"),
            ("99999999-0000-0000-0000-000000000002", "Snapshot:Realized"),
            ("99999999-0000-0000-0000-000000000003", "Snapshot:Replica:Standard"),
        ] {
            fake.add(world::settings(id, WEB, kind, "a checkpoint"));
        }
        let host = fake.host();
        let kinds: Vec<_> =
            host.snapshots(uuid(WEB)).unwrap().into_iter().map(|one| one.kind).collect();
        let other = SnapshotKind::Other("Replica:Standard".into());
        assert_eq!(kinds, [SnapshotKind::Recovery, SnapshotKind::Standard, other]);
        assert!(host.snapshots(uuid(OLD)).unwrap().is_empty());
    }
}

#[test]
fn disks_are_where_the_guest_sees_them() {
    for shape in SHAPES {
        let fake = Fake::new(shape);
        let host = fake.host();
        let web = host.find("web").unwrap();
        let disks = host.disks(&web.settings).unwrap();
        let shown: Vec<_> = disks
            .iter()
            .map(|disk| (disk.location.to_string(), disk.host_resource.as_str()))
            .collect();
        assert_eq!(
            shown,
            [
                ("scsi0:3".to_owned(), r"D:\VMs\web\data.avhdx"),
                ("scsi1:0".to_owned(), r"C:\VMs\web\system.vhdx"),
            ]
        );
        let old = host.find("old").unwrap();
        let disks = host.disks(&old.settings).unwrap();
        let place = |controller_number, location| DiskLocation {
            controller: ControllerKind::Ide,
            controller_number,
            location,
        };
        assert_eq!(disks.len(), 2);
        assert_eq!((disks[0].location, disks[0].pass_through), (place(0, 0), false));
        assert_eq!((disks[1].location, disks[1].pass_through), (place(1, 1), true));
    }
}

#[test]
fn a_disk_without_a_known_drive_is_no_disk_less() {
    let fake = Fake::new(Shape::Typed);
    fake.retain("Msvm_ResourceAllocationSettingData", |one| {
        !one.text("InstanceID").unwrap().ends_with(r"\3\D")
    });
    let host = fake.host();
    let web = host.find("web").unwrap();
    let error = host.disks(&web.settings).unwrap_err();
    assert!(matches!(error, HypervisorError::Protocol { .. }), "{error}");
}

#[test]
fn broken_settings_are_errors_and_no_panics() {
    for (name, value) in [
        ("Version", "nine"),
        ("VirtualSystemIdentifier", "HV1"),
        ("VirtualSystemSubType", "Microsoft:Hyper-V:SubType:3"),
        ("SecureBootEnabled", "perhaps"),
    ] {
        let fake = Fake::new(Shape::Typed);
        fake.retain("Msvm_VirtualSystemSettingData", |one| one.text("ElementName") != Ok("web"));
        let mut broken = world::settings(WEB, WEB, "System:Realized", "web");
        broken.set(name, value);
        fake.add(broken);
        assert!(fake.host().vms().is_err(), "{name}");
    }
}

#[test]
fn services_are_asked_for_once_and_their_absence_is_a_lack_of_rights() {
    let fake = Fake::new(Shape::Typed);
    let host = fake.host();
    let path = host.service("Msvm_VirtualSystemSnapshotService").unwrap();
    assert_eq!(path.key("SystemName"), Some("HV1"));
    fake.retain("Msvm_VirtualSystemSnapshotService", |_| false);
    assert_eq!(host.service("Msvm_VirtualSystemSnapshotService").unwrap(), path);
    let error = fake.host().service("Msvm_VirtualSystemSnapshotService").unwrap_err();
    assert!(matches!(error, HypervisorError::Denied { .. }), "{error}");
    let error = host.service("Msvm_NoService").unwrap_err();
    assert!(matches!(error, HypervisorError::Unsupported { .. }), "{error}");
    fake.forget(r"root\virtualization\v2", "Msvm_VirtualSystemReferencePoint");
    let error = host.reference_points(uuid(WEB)).unwrap_err();
    assert!(matches!(error, HypervisorError::Unsupported { .. }), "{error}");
}

#[test]
fn errors_of_management_keep_their_kind() {
    use vmtide_cim::CimError as C;
    let peer = || "HV1".to_owned();
    let detail = || "why".to_owned();
    let denied =
        [C::Login { peer: peer(), detail: detail() }, C::Denied { peer: peer(), detail: detail() }];
    for error in denied {
        assert!(matches!(from_cim(error), HypervisorError::Denied { .. }));
    }
    let untrusted = from_cim(C::Untrusted { peer: peer(), detail: detail() });
    assert!(untrusted.to_string().contains("not trusted"), "{untrusted}");
    let code = Some(0x8004_1003);
    let fault = from_cim(C::Fault { action: "asking".into(), detail: detail(), code });
    assert!(fault.to_string().contains("0x80041003"), "{fault}");
}
