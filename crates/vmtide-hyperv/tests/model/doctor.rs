//! What a look over a host finds.

use crate::configuration::some_files;
use crate::support::{Fake, SHAPES, SNAPSHOT, Shape, WEB, world};
use vmtide_cim::{CimInstance, CimValue};
use vmtide_hyperv::doctor::examine;
use vmtide_hyperv::gates::{Checkpoints, job_of_checkpoint};
use vmtide_hypervisor::{HealthCheck, HealthState};

fn find<'a>(checks: &'a [HealthCheck], name: &str, part: &str) -> &'a HealthCheck {
    let found = checks.iter().find(|one| one.name == name && one.detail.contains(part));
    found.unwrap_or_else(|| panic!("no {name} with {part:?} in {checks:#?}"))
}

#[test]
fn a_host_is_looked_over() {
    for shape in SHAPES {
        let fake = Fake::new(shape);
        let checks = examine(&fake.host(), None, None);
        assert_eq!(find(&checks, "host", "2 VMs").state, HealthState::Ok);
        assert_eq!(find(&checks, "rights", "").state, HealthState::Ok);
        assert_eq!(find(&checks, "Windows", "20348").state, HealthState::Ok);
        let scanner = find(&checks, "virus scanner", "rct");
        assert_eq!(scanner.state, HealthState::Warn);
        assert!(!scanner.detail.contains("*.vhdx"), "{scanner:?}");
        assert_eq!(find(&checks, "version", "web").state, HealthState::Ok);
        assert_eq!(find(&checks, "version", "5.0").state, HealthState::Warn);
        assert_eq!(find(&checks, "virtual TPM", "web").state, HealthState::Warn);
        let name = "application consistency";
        assert_eq!(find(&checks, name, "guest of web answers").state, HealthState::Ok);
        assert_eq!(find(&checks, name, "old does not run").state, HealthState::Ok);
        assert_eq!(find(&checks, "change tracking", "scsi1:0").state, HealthState::Ok);
        assert_eq!(find(&checks, "change tracking", "old.vhd").state, HealthState::Warn);
        assert_eq!(find(&checks, "disk", "handed through").state, HealthState::Warn);
        assert_eq!(find(&checks, "merges", "data.avhdx").state, HealthState::Warn);
        assert_eq!(find(&checks, "space", r"500 GiB free for C:\VMs\web").state, HealthState::Ok);
        assert_eq!(find(&checks, "space", r"1 GiB free for D:\VMs\web").state, HealthState::Warn);
        for check in &checks {
            assert_eq!(check.mend.is_some(), check.state != HealthState::Ok, "{check:?}");
            assert!(!check.detail.contains('\n'), "{check:?}");
        }
    }
}

#[test]
fn one_vm_is_looked_over_alone_with_the_way_to_its_files() {
    let fake = Fake::new(Shape::Typed);
    let checks = examine(&fake.host(), Some(&some_files()), Some("old"));
    assert!(checks.iter().all(|one| !one.detail.contains("web,")), "{checks:#?}");
    assert_eq!(find(&checks, "way to the files", "not there").state, HealthState::Warn);
    assert_eq!(find(&checks, "space", "5 GiB").state, HealthState::Warn);
}

#[test]
fn a_selection_is_looked_over_as_backup_would_take_it() {
    let fake = Fake::new(Shape::Texts);
    let looked_at = |vm: &str| {
        let checks = examine(&fake.host(), None, Some(vm));
        let versions = checks.iter().filter(|one| one.name == "version");
        versions.map(|one| one.detail.split(':').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(looked_at("all"), ["old", "web"]);
    assert_eq!(looked_at("w*"), ["web"]);
    assert_eq!(looked_at("OLD,web"), ["old", "web"]);
    assert_eq!(looked_at("web"), ["web"]);
    let checks = examine(&fake.host(), None, Some("tag:weekly"));
    assert_eq!(find(&checks, "VM", "tag:weekly").state, HealthState::Fail);
}

#[test]
fn directories_that_are_left_out_of_scanning_count() {
    for (directory, state) in
        [(r"D:\", HealthState::Ok), (r"d:\vms\WEB", HealthState::Ok), (r"D:\VM", HealthState::Warn)]
    {
        let fake = Fake::new(Shape::Texts);
        let defender = r"root\Microsoft\Windows\Defender";
        fake.forget(defender, "MSFT_MpPreference");
        let preference = CimInstance::new("MSFT_MpPreference")
            .with("DisableAutoExclusions", true)
            .with("ExclusionPath", CimValue::strings([r"C:\VMs", directory]));
        fake.add_at(defender, preference, None);
        let checks = examine(&fake.host(), None, Some("web"));
        assert_eq!(find(&checks, "virus scanner", "web").state, state, "{directory}");
    }
}

#[test]
fn checkpoints_are_told_by_whose_they_are() {
    let fake = Fake::new(Shape::Typed);
    fake.add(world::settings(SNAPSHOT, WEB, "Snapshot:Recovery", "vmtide 0123456789abcdef"));
    let other = "99999999-0000-0000-0000-000000000002";
    fake.add(world::settings(other, WEB, "Snapshot:Recovery", "web - Backup - today"));
    let user = "99999999-0000-0000-0000-000000000003";
    fake.add(world::settings(user, WEB, "Snapshot:Realized", "vmtide 0123456789abcdef"));
    let host = fake.host();
    let web = host.find("web").unwrap();
    let sorted = Checkpoints::of(host.snapshots(web.id).unwrap());
    assert_eq!((sorted.ours.len(), sorted.others.len(), sorted.of_users.len()), (1, 1, 1));
    let checks = examine(&host, None, Some("web"));
    assert_eq!(find(&checks, "leftovers", "0123456789abcdef").state, HealthState::Warn);
    assert_eq!(find(&checks, "leftovers", "another backup's").state, HealthState::Warn);
    // A differencing file is in its place while a checkpoint stands.
    assert!(checks.iter().all(|one| one.name != "merges"));
    for name in ["vmtide", "vmtide x", "vmtide 0123456789ABCDEF", "0123456789abcdef"] {
        assert_eq!(job_of_checkpoint(name), None, "{name}");
    }
}

#[test]
fn a_guest_that_does_not_answer_is_named() {
    let component = |state: u16, status: u16| {
        CimInstance::new("Msvm_VssComponent")
            .with("SystemName", WEB)
            .with("EnabledState", CimValue::Uint16(state))
            .with("OperationalStatus", world::words(&[status, 5]))
    };
    for (components, part, state) in [
        (vec![], "no integration service", HealthState::Warn),
        (vec![component(3, 2)], "switched off", HealthState::Warn),
        (vec![component(2, 12)], "no contact", HealthState::Warn),
        (vec![component(2, 13)], "contact lost", HealthState::Warn),
        (vec![component(2, 3)], "answers", HealthState::Ok),
    ] {
        let fake = Fake::new(Shape::Texts);
        fake.retain("Msvm_VssComponent", |_| false);
        for one in components {
            fake.add_at(r"root\virtualization\v2", one, None);
        }
        let checks = examine(&fake.host(), None, Some("web"));
        assert_eq!(find(&checks, "application consistency", part).state, state);
    }
}

#[test]
fn what_keeps_us_out_is_named() {
    let fake = Fake::new(Shape::Typed);
    fake.retain("Msvm_VirtualSystemSnapshotService", |_| false);
    let checks = examine(&fake.host(), None, Some("web"));
    let rights = find(&checks, "rights", "checkpoints");
    assert_eq!(rights.state, HealthState::Fail);
    assert!(rights.mend.as_deref().unwrap().contains("Hyper-V Administrators"));
    let checks = examine(&fake.host(), None, Some("nobody"));
    assert_eq!(find(&checks, "VM", "nobody").state, HealthState::Fail);
    // No Hyper-V at all, and a service that does not run.
    let fake = Fake::new(Shape::Typed);
    fake.forget(r"root\virtualization\v2", "Msvm_VirtualSystemSettingData");
    fake.forget(r"root\cimv2", "Win32_Service");
    fake.add_at(
        r"root\cimv2",
        CimInstance::new("Win32_Service").with("Name", "vmms").with("State", "Stopped"),
        None,
    );
    let checks = examine(&fake.host(), None, None);
    assert_eq!(find(&checks, "service", "Stopped").state, HealthState::Fail);
    assert_eq!(checks[0].state, HealthState::Fail);
}
