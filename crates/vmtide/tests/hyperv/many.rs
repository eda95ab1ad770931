//! Many VMs of one host by one command: which are selected, how many at a time, how it ends, what the last event counts.

use super::common::Run;
use super::{Lab, MIB, Way};
use serde_json::Value;
use vmtide_standin_hyperv_host::VmSpec;

/// The VMs beside `web`, which has two disks and no tag: name, disks, notes.
const VMS: [(&str, u64, &str); 5] = [
    ("web-1", 1, "vmtide:tag=nightly"),
    ("web-2", 2, "vmtide:tag=nightly"),
    ("db", 1, "Owner: Ann\nvmtide:tag=gold,Nightly"),
    ("mail", 1, ""),
    ("sick", 1, ""),
];

/// A host with all of them.
pub fn lab(way: Way) -> Lab {
    let mut lab = Lab::new(way);
    for (name, disks, notes) in VMS {
        let sizes: Vec<u64> = (0..disks).map(|_| 4 * MIB).collect();
        let notes = vec![notes.to_owned()];
        let vm = lab.world.add_vm(&VmSpec { notes, ..VmSpec::new(name, &sizes) });
        lab.world.write_around(vm, &mut lab.random, 8);
    }
    lab
}

impl Lab {
    /// Backs up what `selection` says.
    fn back_up(&self, selection: &str, more: &[&str]) -> Run {
        let url = self.url(selection);
        let run = self.run_with(&[&["backup", &url, "--json"], more].concat(), false);
        self.world.settle();
        let left = self.world.leftovers();
        assert!(left.recovery_snapshots.is_empty() && left.unmerged_files.is_empty(), "{left:?}");
        run
    }

    /// No disk of this VM can be opened from now on.
    fn spoil(&self, name: &str) {
        let vms = self.world.vms().into_iter();
        let vm = vms.filter(|vm| self.world.describe(*vm).starts_with(&format!("{name} (")));
        let disks = vm.flat_map(|vm| self.world.disks(vm));
        let paths: Vec<String> = disks.map(|(_, path)| path).collect();
        assert!(!paths.is_empty());
        self.world.faults(|faults| faults.unopenable.extend(paths));
    }
}

/// The VMs that the last event names and how each ended, by their names.
fn results(summary: &Value) -> Vec<(&str, u64)> {
    let text = |one: &Value| one["exit_code"].as_u64().unwrap();
    let results = summary["results"].as_array().unwrap();
    let mut results: Vec<_> =
        results.iter().map(|one| (one["vm"].as_str().unwrap(), text(one))).collect();
    results.sort_unstable();
    results
}

fn counts(summary: &Value) -> [u64; 5] {
    ["vms", "done", "with_warnings", "failed", "not_begun"]
        .map(|name| summary[name].as_u64().unwrap_or_else(|| panic!("no {name} in {summary}")))
}

/// The disks that the backups of a run stored, as `VM/DISK`.
fn stored(run: &Run) -> Vec<String> {
    let events = run.events();
    let of_vms =
        events.iter().filter(|event| event["type"] == "summary" && event["disks"].is_array());
    let disks = of_vms.flat_map(|summary| {
        let vm = summary["vm"].as_str().unwrap();
        summary["disks"]
            .as_array()
            .unwrap()
            .iter()
            .map(move |disk| format!("{vm}/{}", disk["id"].as_str().unwrap()))
    });
    let mut disks: Vec<_> = disks.collect();
    disks.sort();
    disks
}

#[test]
fn selections_mean_the_vms_that_they_say() {
    let lab = lab(Way::Agent);
    let all = ["db", "mail", "sick", "web", "web-1", "web-2"];
    let cases: [(&str, &[&str], &[&str]); 6] = [
        ("all", &[], &all),
        ("tag:nightly", &["--parallel", "1"], &["db", "web-1", "web-2"]),
        ("WEB-*", &["--parallel", "3"], &["web-1", "web-2"]),
        ("mail,tag:gold,web", &[], &["db", "mail", "web"]),
        ("all", &["--exclude-vm", "web*", "--exclude-vm", "tag:gold"], &["mail", "sick"]),
        ("*", &["--exclude-vm", "web,sick"], &["db", "mail", "web-1", "web-2"]),
    ];
    for (selection, more, expected) in cases {
        let run = lab.back_up(selection, more).must_end_with(0);
        let summary = run.summary();
        let ended: Vec<_> = expected.iter().map(|name| (*name, 0)).collect();
        assert_eq!(results(&summary), ended, "{selection} {more:?}");
        let count = expected.len() as u64;
        assert_eq!(counts(&summary), [count, count, 0, 0, 0], "{summary}");
        assert!(summary.get("warnings").is_none(), "{summary}");
        // Each has a summary of its own before, with the point that the last one names.
        for one in summary["results"].as_array().unwrap() {
            let own = |event: &&Value| event["type"] == "summary" && event["vm"] == one["vm"];
            let events = run.events();
            let found: Vec<_> = events.iter().filter(own).collect();
            assert_eq!(found.len(), 1, "{one}");
            assert_eq!(found[0]["point"], one["point"], "{one}");
        }
    }
    let run = lab.back_up("tag:weekly", &[]).must_end_with(6);
    assert!(run.stderr.contains("tag:weekly"), "{}", run.stderr);
    lab.back_up("all", &["--exclude-vm", "*"]).must_end_with(6);
    let run = lab.back_up("all", &["--name", "one"]).must_end_with(2);
    assert!(run.stderr.contains("--name"), "{}", run.stderr);
}

#[test]
fn one_that_fails_stops_no_other() {
    let lab = lab(Way::Agent);
    lab.spoil("sick");
    for more in [&["--parallel", "1"][..], &["--parallel", "4"]] {
        let run = lab.back_up("all", more).must_end_with(1);
        let summary = run.summary();
        let expected =
            [("db", 0), ("mail", 0), ("sick", 1), ("web", 0), ("web-1", 0), ("web-2", 0)];
        assert_eq!(results(&summary), expected);
        assert_eq!(counts(&summary), [6, 5, 0, 1, 0]);
        let sick = summary["results"].as_array().unwrap().iter().find(|one| one["vm"] == "sick");
        let error = sick.unwrap()["error"].as_str().unwrap();
        assert!(sick.unwrap().get("point").is_none() && !error.is_empty(), "{sick:?}");
        let told: Vec<_> = run.stderr.lines().filter(|line| line.contains(error)).collect();
        assert_eq!(told, [format!("error: sick: {error}")]);
    }
    lab.world.faults(|faults| faults.unopenable.clear());
    let run = lab.back_up("all", &[]).must_end_with(0);
    assert_eq!(counts(&run.summary()), [6, 6, 0, 0, 0]);
}

#[test]
fn of_one_volume_one_after_the_other() {
    let lab = lab(Way::Agent);
    let run = lab.back_up("all", &["--parallel", "4", "--parallel-per-volume", "1"]);
    let run = run.must_end_with(0);
    let events = run.events();
    let vms: Vec<&str> = events.iter().filter_map(|event| event["vm"].as_str()).collect();
    let mut turns = vms.clone();
    turns.dedup();
    assert!(vms.len() > 2 * turns.len(), "each tells several events: {vms:?}");
    // They are all on C:, so all that one tells comes before all of the next.
    assert_eq!(turns.len(), 6, "{turns:?}");
}

#[test]
fn a_disk_is_left_out_of_every_vm_that_has_it() {
    let lab = lab(Way::Agent);
    let run = lab.back_up("all", &["--disk-exclude", "scsi0:1"]).must_end_with(0);
    let expected =
        ["db", "mail", "sick", "web-1", "web-2", "web"].map(|vm| format!("{vm}/scsi0:0"));
    assert_eq!(stored(&run), expected);
    assert_eq!(counts(&run.summary()), [6, 6, 0, 0, 0]);

    let run = lab.back_up("all", &["--disk-exclude", "scsi0:1", "--disk-exclude", "scsi7:7"]);
    let run = run.must_end_with(3);
    let summary = run.summary();
    assert_eq!(counts(&summary), [6, 6, 0, 0, 0], "of no single VM is it a warning");
    let warnings = summary["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), 1, "{summary}");
    assert!(warnings[0].as_str().unwrap().contains("scsi7:7"), "{summary}");
    let told = run.events().iter().filter(|event| event["type"] == "warning").count();
    assert_eq!(told, 1, "{}", run.stdout);

    // Of one VM it is as before.
    let run = lab.back_up("web-1", &["--disk-exclude", "scsi0:1"]).must_end_with(3);
    assert!(run.stdout.contains("scsi0:1 to be left out is none of"), "{}", run.stdout);
}

#[test]
fn many_without_an_agent() {
    let lab = lab(Way::Winrm);
    let more = ["--parallel", "3", "--limit-rate", "1GiB", "--exclude-vm", "mail"];
    let run = lab.back_up("all", &more).must_end_with(0);
    assert_eq!(counts(&run.summary()), [5, 5, 0, 0, 0]);
    let run = lab.back_up("tag:nightly", &["--parallel", "2", "--parallel-per-volume", "1"]);
    let run = run.must_end_with(0);
    assert_eq!(results(&run.summary()), [("db", 0), ("web-1", 0), ("web-2", 0)]);
    let events = run.events();
    let of_vms =
        events.iter().filter(|event| event["type"] == "summary" && event["level"].is_string());
    assert!(of_vms.clone().all(|event| event["level"] == "incremental"), "{}", run.stdout);
    assert_eq!(of_vms.count(), 3);
}
