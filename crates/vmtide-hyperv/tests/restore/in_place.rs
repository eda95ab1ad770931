//! VMs whose disks go back to a restore point.

use crate::fake::{Content, FakeHost, Fault, File, System, SystemBuilder, guid};
use crate::support::restorer;
use uuid::Uuid;
use vmtide_block::{BlockDevice, ByteRange, CancelToken};
use vmtide_cim::{CimInstance, CimValue};
use vmtide_hypervisor::{
    DiskConfig, DiskContent, DiskId, DiskToRestore, FullReason, InPlaceRequest, JobId, TrackingId,
    VmConfig, VmRestorer,
};

const VM: Uuid = Uuid::from_u128(0x1234);
const DISK: Uuid = Uuid::from_u128(0xD1);
const FILE: &str = r"D:\VMs\db.vhdx";
const OTHER: &str = r"D:\VMs\other.vhdx";
const SIZE: usize = 1 << 20;

/// A VM that is off, with one disk, a reference point of ours and one of another product.
fn world() -> FakeHost {
    let fake = FakeHost::new();
    let system = attached(&[(0, FILE)]);
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
        r#"{{"v":1,"rct":"rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:00000001","disk":"{DISK}","vm":"{VM}","point":"Microsoft:ours","line":"0123456789abcdef","size":{SIZE},"sector":512,"subtype":"dynamic","held":""}}"#
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
        into_other_vm: false,
        known_tracking: vec![tracking()],
        cancel: CancelToken::new(),
    }
}

fn is_theirs(point: &CimInstance) -> bool {
    point.text("InstanceID").unwrap().ends_with("theirs")
}

fn disk_config(id: &str) -> DiskConfig {
    let text = format!(r#"{{"id":"{id}","size_bytes":{SIZE},"bus":"scsi","image_id":"{DISK}"}}"#);
    serde_json::from_str(&text).unwrap()
}

/// The VM with disks at these places of its controller.
fn attached(disks: &[(u32, &str)]) -> System {
    let mut builder = SystemBuilder::new(VM, "db", 2).scsi(0xC1);
    for (place, path) in disks {
        builder = builder.drive(&format!(r"{}\0", guid(0xC1)), *place, 17, Some(path));
    }
    builder.build()
}

/// Puts a second disk at `place`.
fn attach(fake: &FakeHost, place: u32, path: &str, id: Uuid) {
    crate::support::put_disk(fake, path, vec![9; SIZE], Some(id));
    let system = attached(&[(0, FILE), (place, path)]);
    fake.change(|state| state.systems[0] = system);
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
    assert!(
        vm.warnings().iter().any(|one| one.contains("1 reference point")),
        "{:?}",
        vm.warnings()
    );
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
    for doubt in ["no answer", "another VM", "no token", "no point", "a twin"] {
        let (fake, state) = (world(), tempfile::tempdir().unwrap());
        let mut wanted = request("db");
        if doubt != "no answer" {
            fake.change(|state| state.changes = Some(vmtide_block::RangeSet::new()));
        }
        match doubt {
            "no answer" => {}
            "another VM" => {
                let other = tracking().0.replace(&VM.to_string(), &Uuid::from_u128(9).to_string());
                wanted.disks[0].tracking = Some(TrackingId(other));
            }
            // The host may still answer for the id of a point that is gone.
            "no point" => fake.change(|state| state.points.retain(is_theirs)),
            "a twin" => attach(&fake, 1, OTHER, DISK),
            _ => wanted.disks[0].tracking = Some(TrackingId("bitmap1".into())),
        }
        let vm = restorer(&fake, state.path()).begin_in_place(&wanted).unwrap();
        assert!(matches!(vm.disks()[0].content, DiskContent::Unknown(_)), "{doubt}");
        vm.finish(false).unwrap();
    }
}

#[test]
fn a_disk_is_never_written_over_another() {
    // Swapped: each has the other's place, and is told by its id.
    let (fake, state) = (world(), tempfile::tempdir().unwrap());
    crate::support::put_disk(&fake, OTHER, vec![9; SIZE], Some(Uuid::from_u128(9)));
    let system = attached(&[(0, OTHER), (1, FILE)]);
    fake.change(|state| state.systems[0] = system);
    let vm = restorer(&fake, state.path()).begin_in_place(&request("db")).unwrap();
    assert_eq!(vm.disks()[0].path, FILE);
    assert!(vm.warnings().iter().any(|one| one.contains("scsi0:1 now")), "{:?}", vm.warnings());
    vm.finish(false).unwrap();
    // It is gone, and another stands in its place: by the id of change tracking, or by the configuration.
    for known_by in ["tracking", "configuration"] {
        let (fake, state) = (world(), tempfile::tempdir().unwrap());
        crate::support::put_disk(&fake, FILE, vec![9; SIZE], Some(Uuid::from_u128(9)));
        let mut wanted = request("db");
        if known_by == "configuration" {
            wanted.disks[0].tracking = None;
            wanted.config.disks = vec![disk_config("scsi0:0")];
        }
        let before = (fake.inventory(), names(&fake));
        let error = restorer(&fake, state.path()).begin_in_place(&wanted).map(drop).unwrap_err();
        assert!(error.to_string().contains("another disk"), "{known_by}: {error}");
        assert_eq!((fake.inventory(), names(&fake)), before, "{known_by}");
        assert_eq!(fake.0.lock().points.len(), 2);
    }
}

#[test]
fn a_vm_is_never_written_over_another() {
    let (fake, state) = (world(), tempfile::tempdir().unwrap());
    let mut wanted = request("db");
    wanted.config.platform = "hyper-v".into();
    wanted.config.id = Some(Uuid::from_u128(9).to_string());
    let before = (fake.inventory(), names(&fake));
    let error = restorer(&fake, state.path()).begin_in_place(&wanted).map(drop).unwrap_err();
    assert!(error.to_string().contains("not the VM"), "{error}");
    assert_eq!((fake.inventory(), names(&fake)), before);
    wanted.config.id = Some(VM.to_string().to_uppercase());
    restorer(&fake, state.path()).begin_in_place(&wanted).unwrap().finish(false).unwrap();
}

#[test]
fn an_interrupted_restore_is_not_completed_by_one_of_fewer_disks() {
    let (fake, state) = (world(), tempfile::tempdir().unwrap());
    let second = Uuid::from_u128(0xD2);
    attach(&fake, 1, OTHER, second);
    let mut both = request("db");
    both.disks.push(DiskToRestore {
        id: DiskId("scsi0:1".into()),
        size_bytes: SIZE as u64,
        data_bytes: None,
        tracking: Some(TrackingId(tracking().0.replace(&DISK.to_string(), &second.to_string()))),
    });
    let ids = ["scsi0:0", "scsi0:1"];
    both.config.disks = ids.iter().map(|id| disk_config(id)).collect();
    let mut one = both.clone();
    one.disks.truncate(1);
    restorer(&fake, state.path()).begin_in_place(&both).unwrap().abort().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    for state in [&state, &elsewhere] {
        let begun = restorer(&fake, state.path()).begin_in_place(&one).map(drop);
        let error = begun.unwrap_err().to_string();
        assert!(error.contains("scsi0:1"), "{error}");
        assert_eq!((names(&fake), marks(&fake)), (vec!["db (restore incomplete)".to_owned()], 1));
    }
    restorer(&fake, state.path()).begin_in_place(&both).unwrap().finish(false).unwrap();
    assert_eq!((names(&fake), marks(&fake)), (vec!["db".to_owned()], 0));
    // A try of one disk is ended by another of it.
    restorer(&fake, state.path()).begin_in_place(&one).unwrap().abort().unwrap();
    restorer(&fake, state.path()).begin_in_place(&one).unwrap().finish(false).unwrap();
    assert_eq!((names(&fake), marks(&fake)), (vec!["db".to_owned()], 0));
}

#[test]
fn a_reference_point_is_the_same_after_the_host_was_upgraded() {
    let (fake, state) = (world(), tempfile::tempdir().unwrap());
    fake.change(|state| state.changes = Some(vmtide_block::RangeSet::new()));
    let mut wanted = request("db");
    let older = tracking().0.replace("Microsoft:ours", &format!(r"Microsoft:{VM}\\ours"));
    wanted.disks[0].tracking = Some(TrackingId(older.clone()));
    wanted.known_tracking = vec![TrackingId(older)];
    let vm = restorer(&fake, state.path()).begin_in_place(&wanted).unwrap();
    assert!(matches!(vm.disks()[0].content, DiskContent::DiffersWithin(_)));
    assert!(fake.0.lock().points.iter().all(is_theirs), "ours would vouch for what was written");
    vm.finish(false).unwrap();
}

#[test]
fn a_vm_of_a_long_or_restored_name_is_known_by_the_file_beside_its_disks() {
    for name in ["x".repeat(90), "db".to_owned()] {
        let (fake, state) = (world(), tempfile::tempdir().unwrap());
        let rename =
            || fake.change(|state| state.systems[0].settings.set("ElementName", name.as_str()));
        rename();
        fake.change(|state| state.changes = Some(vmtide_block::RangeSet::new()));
        let vm = restorer(&fake, state.path()).begin_in_place(&request(&name)).unwrap();
        vm.abort().unwrap();
        // Where it was renamed, somebody gives it its name back.
        rename();
        let restorer = restorer(&fake, state.path());
        assert_eq!(restorer.reap_restores().unwrap().in_use.len(), 1, "{name}");
        let vm = restorer.begin_in_place(&request(&name)).unwrap();
        let DiskContent::Unknown(FullReason::TrackingLost(why)) = &vm.disks()[0].content else {
            panic!("{:?}", vm.disks()[0].content)
        };
        assert!(why.contains("interrupted"), "{why}");
        vm.finish(false).unwrap();
        assert_eq!((names(&fake), marks(&fake)), (vec![name.clone()], 0));
        assert_eq!(restorer.reap_restores().unwrap(), vmtide_hypervisor::ReapReport::default());
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
