//! `vmtide doctor` of a Hyper-V host: the VMs that are meant, the network, the rights that are missing.

use super::common::Run;
use super::{Lab, NO_GROUP, NO_HYPER_V, PASSWORD, Way};
use serde_json::Value;

/// The checks of a run.
fn checks(run: &Run) -> Vec<Value> {
    run.summary()["checks"].as_array().unwrap().clone()
}

/// The details of the checks of this name, with how they stand.
fn of_name(checks: &[Value], name: &str) -> Vec<(String, String)> {
    let text = |check: &Value, key: &str| check[key].as_str().unwrap().to_owned();
    let named = checks.iter().filter(|check| check["name"] == name);
    named.map(|check| (text(check, "status"), text(check, "detail"))).collect()
}

/// What of `checks` is of this name and says this, and how it stands.
fn find(checks: &[Value], name: &str, part: &str) -> String {
    let found = of_name(checks, name).into_iter().find(|(_, detail)| detail.contains(part));
    found.unwrap_or_else(|| panic!("no {name} with {part:?} in {checks:#?}")).0
}

/// The VMs that were looked at: each has a version.
fn vms(checks: &[Value]) -> Vec<String> {
    let versions = of_name(checks, "version").into_iter();
    versions.map(|(_, detail)| detail.split(':').next().unwrap().to_owned()).collect()
}

#[test]
fn the_vms_that_backup_would_take_are_looked_at() {
    for way in [Way::Agent, Way::Winrm] {
        let lab = super::many::lab(way);
        let all = ["db", "mail", "sick", "web", "web-1", "web-2"];
        let cases: [(&str, &[&str]); 6] = [
            ("", &all),
            ("all", &all),
            ("web", &["web"]),
            ("web-*", &["web-1", "web-2"]),
            ("tag:nightly", &["db", "web-1", "web-2"]),
            ("mail,tag:gold", &["db", "mail"]),
        ];
        for (selection, expected) in cases {
            let run = lab.run_with(&["doctor", &lab.url(selection), "--json"], true);
            assert!([0, 3].contains(&run.code), "{way:?} {selection:?}: {}", run.stdout);
            assert_eq!(vms(&checks(&run)), expected, "{way:?} {selection:?}");
        }
        for selection in ["nobody", "tag:weekly", "x*"] {
            let run = lab.run_with(&["doctor", &lab.url(selection), "--json"], true);
            let checks = checks(&run.must_end_with(1));
            assert_eq!(find(&checks, "VM", selection), "fail", "{way:?}");
            assert!(vms(&checks).is_empty(), "{way:?}");
        }
    }
}

#[test]
fn the_network_is_looked_at() {
    let lab = Lab::new(Way::Winrm);
    let url = lab.url("web");
    let words = ["doctor", &url, "--json"];
    let found = checks(&lab.run_where(&words, &[]));
    let winrm = "WinRM over HTTP, each message sealed";
    assert_eq!(find(&found, "network", winrm), "ok");
    assert_eq!(find(&found, "network", "logged in by NTLM"), "ok");
    assert_eq!(find(&found, "network", "encrypted by AES-"), "ok");
    assert_eq!(find(&found, "network", "this machine's"), "ok");
    assert!(of_name(&found, "network").iter().all(|(status, _)| status == "ok"), "{found:#?}");

    let found = checks(&lab.run_where(&words, &[("VMTIDE_SMB_PROTECTION", "signed")]));
    assert_eq!(find(&found, "network", "signed, not encrypted"), "ok");

    // A port that nobody listens on: the files are out of reach, and the line says which port.
    let run = lab.run_where(&words, &[("VMTIDE_SMB_PORT", "1")]).must_end_with(1);
    let found = checks(&run);
    assert_eq!(find(&found, "network", "cannot reach"), "fail");
    let failed = found.iter().find(|check| check["name"] == "network" && check["status"] == "fail");
    assert!(failed.unwrap()["advice"].as_str().unwrap().contains("port 1 "), "{failed:?}");

    lab.world.advance(3_600_000);
    let found = checks(&lab.run_where(&words, &[]));
    assert_eq!(find(&found, "network", "s ahead of this machine's"), "warn");
}

#[test]
fn a_right_that_is_missing_is_named() {
    let lab = Lab::new(Way::Winrm);
    let url = lab.url("web");
    let samba = lab.samba.as_ref().unwrap();
    let user = samba.login().user;
    let smb = [("VMTIDE_SMB_USER", user.as_str()), ("VMTIDE_SMB_PASSWORD", PASSWORD)];
    let mut told = Vec::new();
    for (name, group, command) in [
        (NO_GROUP, "the group Remote Management Users is missing", "S-1-5-32-580"),
        (NO_HYPER_V, "the group Hyper-V Administrators is missing", "S-1-5-32-578"),
    ] {
        let settings = [&smb[..], &[("VMTIDE_WINRM_USER", name)]].concat();
        let run = lab.run_where(&["doctor", &url, "--json"], &settings).must_end_with(1);
        let found = checks(&run);
        assert_eq!(find(&found, "rights", group), "fail");
        let rights = found.iter().find(|check| check["name"] == "rights").unwrap();
        assert!(rights["advice"].as_str().unwrap().contains(command), "{rights}");
        // What does not depend on it is looked at all the same.
        assert_eq!(find(&found, "network", "encrypted by AES-"), "ok");
        let run = lab.run_where(&["backup", &url], &settings).must_end_with(4);
        assert!(run.stderr.contains(group), "{}", run.stderr);
        told.push(run.stderr);
    }

    // Hosts may also show nothing instead of refusing.
    lab.world.faults(|faults| faults.nothing_shown = true);
    let run = lab.run_where(&["doctor", &url, "--json"], &[]).must_end_with(1);
    let group = "Hyper-V Administrators";
    let found = checks(&run);
    assert_eq!(find(&found, "rights", group), "fail");
    let run = lab.run_where(&["backup", &url], &[]).must_end_with(4);
    assert!(run.stderr.contains(group), "{}", run.stderr);
    told.push(run.stderr);
    lab.world.faults(|faults| faults.nothing_shown = false);

    // The files of the VMs are somebody else's.
    let words = ["--smb-map", r"C:=\\127.0.0.1\private"];
    let run = lab.run_where(&[&["doctor", url.as_str(), "--json"][..], &words[..]].concat(), &[]);
    let found = checks(&run.must_end_with(1));
    assert_eq!(find(&found, "way to the files", "private"), "fail");
    let run =
        lab.run_where(&[&["backup", url.as_str()][..], &words[..]].concat(), &[]).must_end_with(4);
    assert!(run.stderr.contains("private"), "{}", run.stderr);
    told.push(run.stderr);
    told.sort();
    told.dedup();
    assert_eq!(told.len(), 4, "each says something else: {told:#?}");
    let left = lab.world.leftovers();
    assert!(left.recovery_snapshots.is_empty() && left.reference_points.is_empty(), "{left:?}");
}
