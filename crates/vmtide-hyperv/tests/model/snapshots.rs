//! Checkpoints and reference points are made, named and removed.

use crate::finding::uuid;
use crate::support::{
    Fake, SHAPES, SNAPSHOT, Shape, Tables, WEB, code, done, job_path, started, world,
};
use vmtide_block::CancelToken;
use vmtide_cim::{CimError, CimInstance, CimValue, MethodOutput, ObjectPath};
use vmtide_hyperv::{
    BackupType, Host, ReferencePointRecord, SnapshotRecord, SnapshotRequest, VmRecord,
};
use vmtide_hypervisor::{Consistency, HypervisorError, Result};

const NAMESPACE: (&str, &str) = (r"root\virtualization\v2", "msvm_virtualsystemsettingdata");

fn request(consistency: Consistency) -> SnapshotRequest {
    SnapshotRequest { consistency, backup_type: BackupType::Copy, ignore_non_snapshottable: true }
}

fn path_of(id: &str) -> ObjectPath {
    let id = format!("Microsoft:{id}");
    ObjectPath::new("Msvm_VirtualSystemSettingData", &[("InstanceID", &id)])
}

/// The host has a checkpoint more.
fn appear(tables: &mut Tables, id: &str) {
    let mut instance = world::settings(id, WEB, "Snapshot:Recovery", "web - Backup");
    instance.path = Some(path_of(id));
    let key = (NAMESPACE.0.to_owned(), NAMESPACE.1.to_owned());
    tables.classes.get_mut(&key).unwrap().push(instance);
}

fn disappear(tables: &mut Tables, id: &str) {
    let key = (NAMESPACE.0.to_owned(), NAMESPACE.1.to_owned());
    let id = format!("Microsoft:{id}");
    tables.classes.get_mut(&key).unwrap().retain(|one| one.text("InstanceID") != Ok(id.as_str()));
}

fn create(host: &Host, consistency: Consistency) -> Result<SnapshotRecord> {
    let vm: VmRecord = host.find("web").unwrap();
    host.create_recovery_snapshot(&vm, &request(consistency), &CancelToken::new())
}

#[test]
fn a_checkpoint_is_found_however_the_host_names_it() {
    // By the answer, by the job's results, and only by not having been there before.
    for (shape, way) in SHAPES.into_iter().flat_map(|shape| (0..3).map(move |way| (shape, way))) {
        let fake = Fake::new(shape);
        fake.add(world::settings(
            "99999999-0000-0000-0000-00000000000F",
            WEB,
            "Snapshot:Recovery",
            "another product's",
        ));
        fake.job("j", &[2, 4, 7], |last| last);
        fake.on("CreateSnapshot", move |tables, parameters| {
            let given: Vec<_> = parameters.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(given, ["AffectedSystem", "SnapshotSettings", "SnapshotType"]);
            assert_eq!(parameters[2].1, CimValue::Uint16(32768));
            appear(tables, SNAPSHOT);
            let mut answer = if way == 0 { done() } else { started("j") };
            if way == 0 {
                answer.parameters.set("ResultingSnapshot", &path_of(SNAPSHOT));
            }
            if way == 1 {
                let row = CimInstance::new("Msvm_AffectedJobElement")
                    .with("AffectedElement", &path_of(SNAPSHOT))
                    .with("ElementEffects", world::words(&[5]));
                tables.affected.insert(job_path("j").to_string(), Ok(vec![row]));
            }
            Ok(answer)
        });
        let made = create(&fake.host(), Consistency::Application).unwrap();
        assert_eq!(made.settings.path, path_of(SNAPSHOT), "{shape:?} {way}");
        let sent = fake.tables.lock().unwrap().embedded.clone();
        assert_eq!(
            sent,
            ["<INSTANCE CLASSNAME=\"Msvm_VirtualSystemSnapshotSettingData\">\
              <PROPERTY NAME=\"ConsistencyLevel\" TYPE=\"uint8\"><VALUE>1</VALUE></PROPERTY>\
              <PROPERTY NAME=\"GuestBackupType\" TYPE=\"uint8\"><VALUE>2</VALUE></PROPERTY>\
              <PROPERTY NAME=\"IgnoreNonSnapshottableDisks\" TYPE=\"boolean\"><VALUE>TRUE</VALUE></PROPERTY>\
              </INSTANCE>"]
        );
    }
}

#[test]
fn a_checkpoint_that_cannot_be_told_from_another_is_not_taken_for_ours() {
    let fake = Fake::new(Shape::Typed);
    fake.on("CreateSnapshot", |tables, _| {
        appear(tables, SNAPSHOT);
        appear(tables, "99999999-0000-0000-0000-00000000000E");
        Ok(done())
    });
    let error = create(&fake.host(), Consistency::Crash).unwrap_err();
    assert!(error.to_string().contains("several"), "{error}");
    let fake = Fake::new(Shape::Typed);
    fake.on("CreateSnapshot", |_, _| Ok(done()));
    let error = create(&fake.host(), Consistency::Crash).unwrap_err();
    assert!(matches!(error, HypervisorError::Protocol { .. }), "{error}");
}

#[test]
fn only_a_failure_that_may_be_the_guests_is_one_of_consistency() {
    for (answer, wanted, is_consistency) in [
        (32768, Consistency::Application, true),
        (32770, Consistency::FileSystem, true),
        (32768, Consistency::Crash, false),
        (32775, Consistency::Application, false),
        (32769, Consistency::Application, false),
    ] {
        let fake = Fake::new(Shape::Typed);
        fake.on("CreateSnapshot", move |_, _| Ok(code(answer)));
        let error = create(&fake.host(), wanted).unwrap_err();
        let is = matches!(error, HypervisorError::ConsistencyNotReached { .. });
        assert_eq!(is, is_consistency, "{answer}: {error}");
    }
    let fake = Fake::new(Shape::Texts);
    fake.job("j", &[4, 10], |mut last| {
        last.set("ErrorCode", CimValue::Uint16(32768));
        last.with("ErrorDescription", "VSS writers inside the VM failed.")
    });
    fake.on("CreateSnapshot", |_, _| Ok(started("j")));
    let error = create(&fake.host(), Consistency::Application).unwrap_err();
    assert!(matches!(error, HypervisorError::ConsistencyNotReached { .. }), "{error}");
    assert!(error.to_string().contains("VSS writers"), "{error}");
}

#[test]
fn a_checkpoint_is_renamed_by_nothing_but_its_name() {
    let fake = Fake::new(Shape::Texts);
    fake.on("ModifySystemSettings", |_, _| Ok(done()));
    let host = fake.host();
    let web = host.find("web").unwrap();
    host.rename(&web.settings, "vmtide <1>").unwrap();
    let sent = fake.tables.lock().unwrap().embedded.clone();
    assert_eq!(
        sent,
        [format!(
            "<INSTANCE CLASSNAME=\"Msvm_VirtualSystemSettingData\">\
             <PROPERTY NAME=\"InstanceID\" TYPE=\"string\"><VALUE>Microsoft:{WEB}</VALUE></PROPERTY>\
             <PROPERTY NAME=\"ElementName\" TYPE=\"string\"><VALUE>vmtide &lt;1&gt;</VALUE></PROPERTY>\
             </INSTANCE>"
        )]
    );
}

fn with_snapshot(fake: &Fake) {
    fake.add(world::settings(SNAPSHOT, WEB, "Snapshot:Recovery", "vmtide 0123456789abcdef"));
}

#[test]
fn what_is_gone_is_removed() {
    let lost = || CimError::Unreachable {
        peer: "HV1".into(),
        detail: "the answer was lost".into(),
        before_request: false,
    };
    let fake = Fake::new(Shape::Typed);
    with_snapshot(&fake);
    fake.on("DestroySnapshot", move |tables, _| {
        disappear(tables, SNAPSHOT);
        Err(lost())
    });
    let host = fake.host();
    let snapshot = host.snapshots(uuid(WEB)).unwrap().remove(0);
    host.destroy_snapshot(&snapshot, &CancelToken::new()).unwrap();
    // Refused, and still there: an error.
    let fake = Fake::new(Shape::Typed);
    with_snapshot(&fake);
    fake.on("DestroySnapshot", |_, _| Ok(code(32775)));
    let error = fake.host().destroy_snapshot(&snapshot, &CancelToken::new()).unwrap_err();
    assert!(error.to_string().contains("32775"), "{error}");
    let fake = Fake::new(Shape::Typed);
    fake.on("DestroyReferencePoint", |_, parameters| {
        let path = parameters[0].1.as_reference().unwrap();
        assert_eq!(path.key("InstanceID"), Some(r"Microsoft:A\B"));
        Ok(code(32773))
    });
    fake.host().destroy_reference_point(&point(r"Microsoft:A\B"), &CancelToken::new()).unwrap();
}

fn point(instance_id: &str) -> ReferencePointRecord {
    ReferencePointRecord {
        instance_id: instance_id.into(),
        vm: uuid(WEB),
        kind: 2,
        consistency: Some(1),
        disk_identifiers: vec!["a".into(), "b".into()],
        tracking_ids: vec!["rctX:1:00000001".into(), "rctX:2:00000001".into()],
    }
}

fn point_instance(point: &ReferencePointRecord) -> CimInstance {
    CimInstance::new("Msvm_VirtualSystemReferencePoint")
        .with("InstanceID", point.instance_id.as_str())
        .with("VirtualSystemIdentifier", WEB)
        .with("ReferencePointType", CimValue::Uint16(point.kind))
        .with("ConsistencyLevel", CimValue::Uint16(1))
        .with("VirtualDiskIdentifiers", CimValue::strings(point.disk_identifiers.clone()))
        .with("ResilientChangeTrackingIdentifiers", CimValue::strings(point.tracking_ids.clone()))
}

#[test]
fn reference_points_are_read_in_both_forms_of_their_ids() {
    for shape in SHAPES {
        let fake = Fake::new(shape);
        let points = [point(&format!(r"Microsoft:{WEB}\B")), point("Microsoft:C")];
        for one in &points {
            fake.add(point_instance(one));
        }
        let mut bare = point("Microsoft:D");
        bare.disk_identifiers.clear();
        bare.tracking_ids.truncate(1);
        fake.add(point_instance(&bare));
        let found = fake.host().reference_points(uuid(WEB)).unwrap();
        assert_eq!(found, [points[0].clone(), points[1].clone(), bare]);
    }
}

#[test]
fn a_conversion_names_its_point_or_none() {
    for shape in SHAPES {
        for named in [true, false] {
            let fake = Fake::new(shape);
            with_snapshot(&fake);
            fake.add(point_instance(&point("Microsoft:P")));
            fake.job("j", &[4, 7], |last| last);
            fake.on("ConvertToReferencePoint", move |tables, _| {
                disappear(tables, SNAPSHOT);
                let mut answer = started("j");
                if named {
                    let path = ObjectPath::new(
                        "Msvm_VirtualSystemReferencePoint",
                        &[("InstanceID", "Microsoft:P")],
                    );
                    answer.parameters.set("ResultingReferencePoint", &path);
                }
                Ok(answer)
            });
            let host = fake.host();
            let snapshot = host.snapshots(uuid(WEB)).unwrap().remove(0);
            let made = host.convert_to_reference_point(&snapshot, &CancelToken::new()).unwrap();
            assert_eq!(made, named.then(|| point("Microsoft:P")));
        }
    }
}

#[test]
fn a_conversion_whose_job_is_gone_is_not_taken_for_done() {
    for converted in [true, false] {
        let fake = Fake::new(Shape::Typed);
        with_snapshot(&fake);
        fake.on("ConvertToReferencePoint", move |tables, _| {
            if converted {
                disappear(tables, SNAPSHOT);
            }
            Ok(MethodOutput { ..started("gone") })
        });
        let host = fake.host();
        let snapshot = host.snapshots(uuid(WEB)).unwrap().remove(0);
        // Also where the checkpoint is gone: somebody else may have removed it.
        let result = host.convert_to_reference_point(&snapshot, &CancelToken::new());
        assert!(result.is_err(), "{converted}");
    }
}
