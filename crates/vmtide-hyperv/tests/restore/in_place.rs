//! VMs whose disks go back to a restore point.

use crate::fake::{Content, FakeHost, Fault, File, SystemBuilder, guid};
use crate::support::restorer;
use uuid::Uuid;
use vmtide_block::{BlockDevice, ByteRange, CancelToken};
use vmtide_cim::{CimInstance, CimValue};
use vmtide_hypervisor::{
    DiskContent, DiskId, DiskToRestore, InPlaceRequest, JobId, TrackingId, VmConfig, VmRestorer,
};

const VM: Uuid = Uuid::from_u128(0x1234);
const DISK: Uuid = Uuid::from_u128(0xD1);
const FILE: &str = r"D:\VMs\db.vhdx";
const SIZE: usize = 1 << 20;

/// A VM that is off, with one disk, a reference point of ours and one of another product.
fn world() -> FakeHost {
    let fake = FakeHost::new();
    let system = SystemBuilder::new(VM, "db", 2)
        .scsi(0xC1)
        .drive(&format!(r"{}\0", guid(0xC1)), 0, 17, Some(FILE))
        .build();
    crate::support::put_disk(&fake, FILE, vec![7; SIZE], Some(DISK));
    fake.change(|state| {
        state.systems.push(system);
        for name in ["ours", "theirs"] {
            let point = CimInstance::new("Msvm_VirtualSystemReferencePoint")
                .with("InstanceID", format!("Microsoft:{name}"))
                .with("VirtualSystemIdentifier", VM.to_string().to_uppercase())
                .with("ReferencePointType", CimValue::Uint16(2));
            state.points.push(point);
        }
        for name in [r"D:\VMs\db.vhdx.rct", r"D:\VMs\db.vhdx.mrt", r"D:\VMs\other.vhdx.rct"] {
            let file = File { path: name.into(), content: Content::Bytes(Vec::new()) };
            state.files.insert(name.to_lowercase(), file);
        }
    });
    fake
}

/// The tracking id that a restore point of this VM has.
fn tracking() -> TrackingId {
    TrackingId(format!(
        r#"{{"v":1,"rct":"rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:00000001","disk":"{DISK}","vm":"{VM}","point":"Microsoft:ours","line":"0123456789abcdef","size":{SIZE},"sector":512,"subtype":"dynamic"}}"#
    ))
}

fn request(name: &str) -> InPlaceRequest {
    InPlaceRequest {
        vm: name.into(),
        config: VmConfig::default(),
        point: "3fa9c1d2".into(),
        job: JobId::random(),
        disks: vec![DiskToRestore {
            id: DiskId("scsi0:0".into()),
            size_bytes: SIZE as u64,
            data_bytes: None,
            tracking: Some(tracking()),
        }],
        known_tracking: vec![tracking()],
        cancel: CancelToken::new(),
    }
}

fn names(fake: &FakeHost) -> Vec<String> {
    fake.0.lock().systems.iter().map(|one| one.name().to_owned()).collect()
}

fn marks(fake: &FakeHost) -> usize {
    fake.inventory().iter().filter(|line| line.contains("INCOMPLETE")).count()
}

#[test]
fn only_what_changed_is_looked_at_and_tracking_is_forgotten_before_the_first_write() {
    let (fake, state) = (world(), tempfile::tempdir().unwrap());
    fake.change(|state| state.changes = Some([ByteRange::new(65536, 4096)].into_iter().collect()));
    let vm = restorer(&fake, state.path()).begin_in_place(&request("db")).unwrap();
    let [disk] = vm.disks() else { panic!("one disk") };
    let expected = [ByteRange::new(65536, 4096)].into_iter().collect();
    assert_eq!(disk.content, DiskContent::DiffersWithin(expected));
    assert_eq!((names(&fake), marks(&fake)), (vec!["db (restore incomplete)".to_owned()], 1));
    let points: Vec<_> =
        fake.0.lock().points.iter().map(|one| one.text("InstanceID").unwrap().to_owned()).collect();
    assert_eq!(points, ["Microsoft:theirs"], "another product's stays");
    let files: Vec<_> = fake.0.lock().files.keys().cloned().collect();
    assert!(!files.iter().any(|name| name.contains("db.vhdx.")), "{files:?}");
    assert!(files.iter().any(|name| name.contains("other.vhdx.rct")), "{files:?}");
    disk.device.write_at(&[1; 4096], 65536).unwrap();
    disk.device.flush().unwrap();
    let done = vm.finish(true).unwrap();
    assert!(done.powered_on && done.same_id);
    assert_eq!((names(&fake), marks(&fake)), (vec!["db".to_owned()], 0));
    let log = fake.0.lock().log.clone();
    let at = |word: &str| {
        log.iter()
            .position(|line| line.starts_with(word))
            .unwrap_or_else(|| panic!("{word}: {log:?}"))
    };
    let write = at("write ");
    for before in [
        "DestroyReferencePoint",
        "remove D:\\VMs\\db.vhdx.rct",
        "ModifySystemSettings",
        "make D:\\VMs\\INCOMPLETE",
    ] {
        assert!(at(before) < write, "{before}: {log:?}");
    }
    assert_eq!(
        restorer(&fake, state.path()).reap_restores().unwrap(),
        vmtide_hypervisor::ReapReport::default()
    );
}

#[test]
fn every_doubt_means_that_all_is_compared() {
    for doubt in ["no answer", "another disk", "no token"] {
        let (fake, state) = (world(), tempfile::tempdir().unwrap());
        let mut wanted = request("db");
        match doubt {
            "no answer" => {}
            "another disk" => {
                fake.change(|state| state.changes = Some(vmtide_block::RangeSet::new()));
                let other =
                    tracking().0.replace(&DISK.to_string(), &Uuid::from_u128(9).to_string());
                wanted.disks[0].tracking = Some(TrackingId(other));
            }
            _ => wanted.disks[0].tracking = Some(TrackingId("bitmap1".into())),
        }
        let vm = restorer(&fake, state.path()).begin_in_place(&wanted).unwrap();
        assert!(matches!(vm.disks()[0].content, DiskContent::Unknown(_)), "{doubt}");
        vm.finish(false).unwrap();
    }
}

#[test]
fn a_vm_that_is_not_at_rest_is_left_alone() {
    let refused = |change: fn(&mut crate::fake::State), word: &str| {
        let (fake, state) = (world(), tempfile::tempdir().unwrap());
        fake.change(change);
        let before = (fake.inventory(), names(&fake));
        let error = restorer(&fake, state.path()).begin_in_place(&request("db")).map(drop);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert_eq!((fake.inventory(), names(&fake)), before);
        assert_eq!(fake.0.lock().points.len(), 2);
    };
    refused(|state| state.systems[0].running = true, "not off");
    refused(
        |state| {
            let mut checkpoint = SystemBuilder::new(VM, "before the update", 2).build().settings;
            checkpoint.set("InstanceID", "Microsoft:CHECKPOINT");
            checkpoint.set("VirtualSystemType", "Microsoft:Hyper-V:Snapshot:Realized");
            state.checkpoints.push(checkpoint);
        },
        "before the update",
    );
    refused(
        |state| {
            for one in &mut state.systems[0].resources {
                if one.value("HostResource").is_some() {
                    one.set("HostResource", CimValue::strings([r"D:\VMs\db_1.avhdx"]));
                }
            }
        },
        "merged",
    );
    refused(
        |state| state.systems[0].resources.retain(|one| one.value("HostResource").is_none()),
        "no disk scsi0:0",
    );
    let (fake, state) = (world(), tempfile::tempdir().unwrap());
    let mut wanted = request("db");
    wanted.disks[0].size_bytes = 2 * SIZE as u64;
    let error = restorer(&fake, state.path()).begin_in_place(&wanted).map(drop).unwrap_err();
    assert!(error.to_string().contains("new VM"), "{error}");
}

#[test]
fn an_interrupted_restore_stays_marked_and_the_same_one_goes_on() {
    let (fake, state) = (world(), tempfile::tempdir().unwrap());
    fake.change(|state| state.changes = Some(vmtide_block::RangeSet::new()));
    let vm = restorer(&fake, state.path()).begin_in_place(&request("db")).unwrap();
    vm.disks()[0].device.write_at(&[1; 512], 0).unwrap();
    // The process is killed: nothing reaches the host any more.
    fake.change(|state| state.dead = true);
    vm.abort().unwrap();
    fake.change(|state| state.dead = false);
    let restorer = restorer(&fake, state.path());
    let report = restorer.reap_restores().unwrap();
    assert_eq!(report.in_use.len(), 1, "{report:?}");
    assert_eq!((names(&fake), marks(&fake)), (vec!["db (restore incomplete)".to_owned()], 1));
    let vm = restorer.begin_in_place(&request("db")).unwrap();
    // What the host says now is not believed: it does not know what was written.
    assert!(matches!(vm.disks()[0].content, DiskContent::Unknown(_)));
    assert_eq!(vm.disks()[0].device.size_bytes(), SIZE as u64);
    vm.finish(false).unwrap();
    assert_eq!((names(&fake), marks(&fake)), (vec!["db".to_owned()], 0));
    assert_eq!(restorer.reap_restores().unwrap(), vmtide_hypervisor::ReapReport::default());
}

#[test]
fn whatever_breaks_before_the_first_write_leaves_the_vm_whole_or_marked() {
    for fault in [Fault::Refused, Fault::Lost, Fault::Dead, Fault::DeadAfter] {
        for call in 1.. {
            let (fake, state) = (world(), tempfile::tempdir().unwrap());
            fake.change(|state| state.fault = Some((call, fault)));
            let begun = restorer(&fake, state.path()).begin_in_place(&request("db"));
            let (calls, is_ok) = (fake.0.lock().calls, begun.is_ok());
            fake.change(|state| {
                state.dead = false;
                state.fault = None;
            });
            drop(begun);
            let what = format!("{fault:?} at {call}");
            let name = names(&fake).remove(0);
            assert!(["db", "db (restore incomplete)"].contains(&name.as_str()), "{what}: {name}");
            assert_eq!(names(&fake).len(), 1);
            // The same restore goes through now.
            let vm = restorer(&fake, state.path()).begin_in_place(&request("db"));
            vm.unwrap_or_else(|error| panic!("{what}: {error}")).finish(false).unwrap();
            assert_eq!((names(&fake), marks(&fake)), (vec!["db".to_owned()], 0), "{what}");
            assert_eq!(
                restorer(&fake, state.path()).reap_restores().unwrap(),
                vmtide_hypervisor::ReapReport::default(),
                "{what}"
            );
            if call > calls {
                assert!(is_ok);
                break;
            }
        }
    }
}
