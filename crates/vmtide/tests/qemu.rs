//! A running machine of QEMU, through the command line: without a guest agent and without a guest.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests: a failed unwrap is a failed test, and they say what is missing"
)]

#[allow(dead_code, reason = "shared by test programs that each use a part of it")]
mod common;

use common::Place;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

/// A running machine, ended with the test.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already, and then there is nothing to do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a machine with two disks. Its firmware finds nothing to boot and waits.
fn start(place: &Place) -> (Machine, String) {
    let socket = place.path("web.qmp");
    let child = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-display", "none", "-accel", "tcg", "-m", "32", "-name", "web"])
        .args(["-drive", "file=system.qcow2,if=none,id=d0,format=qcow2"])
        .args(["-device", "virtio-blk-pci,drive=d0,id=system"])
        .args(["-drive", "file=data.raw,if=none,id=d1,format=raw"])
        .args(["-device", "virtio-blk-pci,drive=d1,id=data"])
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .current_dir(place.directory.path())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(child) = child else {
        panic!("qemu-system-x86_64 is needed: install qemu-system-x86 (scripts/test.sh does)");
    };
    let machine = Machine(child);
    let begun = Instant::now();
    while !socket.exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "QEMU does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    (machine, format!("qemu+unix://{}", socket.display()))
}

#[test]
fn a_running_machine_is_listed_backed_up_and_restored() {
    let place = Place::with_repository();
    place.image("data.raw", 4 * MIB);
    place.image("plain.raw", 4 * MIB);
    let converted = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2", "plain.raw", "system.qcow2"])
        .current_dir(place.directory.path())
        .status();
    assert!(converted.is_ok_and(|status| status.success()), "qemu-img is needed");
    let (_machine, source) = start(&place);

    let list = place.run(&["vm", "list", &source, "--json"]).must_end_with(0).summary();
    assert_eq!((&list["vms"][0]["name"], &list["vms"][0]["disks"]), (&"web".into(), &2.into()));
    let show = place.run(&["vm", "show", &source]).must_end_with(0);
    assert!(show.stdout.contains("data.raw"), "{}", show.stdout);
    let doctor = place.run(&["doctor", &source, "--json"]);
    assert!([0, 3].contains(&doctor.code), "{}", doctor.stdout);

    // Whoever asks for no consistency gets what there is, and no complaint.
    let full = place.run(&["backup", &source, "--json"]).must_end_with(0).summary();
    assert_eq!((&full["vm"], &full["consistency"]), (&"web".into(), &"crash".into()));
    assert_eq!(full["level"], "full");
    // Whoever asks for one gets it, or an error, or a warning.
    place.run(&["backup", &source, "--consistency", "fs"]).must_end_with(1);
    let arguments = ["backup", &source, "--consistency", "fs", "--allow-downgrade", "--json"];
    let second = place.run(&arguments).must_end_with(3).summary();
    assert_eq!(second["level"], "incremental");
    for disk in second["disks"].as_array().unwrap() {
        assert_eq!((&disk["tracking"]["used"], &disk["read_bytes"]), (&true.into(), &0.into()));
    }

    let restored = place.run(&["restore", "web", "--to", "out", "--json"]).must_end_with(0);
    let expected = std::fs::read(place.path("plain.raw")).unwrap();
    let summary = restored.summary();
    let disks = summary["disks"].as_array().unwrap();
    assert_eq!(disks.len(), 2);
    for disk in disks {
        let path = place.path(disk["path"].as_str().unwrap());
        assert_eq!(std::fs::read(path).unwrap(), expected, "{disk}");
    }
    assert!(place.path("out/vm-config.json").exists());
    let excluded = disks[0]["id"].as_str().unwrap();
    let run = place.run(&["backup", &source, "--disk-exclude", excluded, "--json"]);
    assert_eq!(run.must_end_with(0).summary()["disks"].as_array().unwrap().len(), 1);

    // Its images are not copied or changed behind its back.
    for arguments in [
        &["backup", "system.qcow2"][..],
        &["backup", "data.raw"],
        &["restore", "web", "--disk", "0", "--to", "data.raw", "--in-place"],
        &["restore", "web", "--disk", "0", "--to", "data.raw", "--force"],
    ] {
        let run = place.run(arguments).must_end_with(1);
        assert!(run.stderr.contains("a running QEMU"), "{arguments:?}: {}", run.stderr);
    }

    // Tracking ends for this repository, and the next backup knows.
    let run = place.run(&["vm", "untrack", &source, "--name", "other", "--json"]).must_end_with(0);
    assert_eq!(run.summary()["removed"].as_array().unwrap().len(), 0);
    let run = place.run(&["vm", "untrack", &source, "--json"]).must_end_with(0);
    assert!(!run.summary()["removed"].as_array().unwrap().is_empty());
    let run = place.run(&["backup", &source, "--json"]).must_end_with(3);
    for disk in run.summary()["disks"].as_array().unwrap() {
        assert_eq!(disk["tracking"]["used"], false, "{disk}");
    }
    place.run(&["vm", "untrack", "plain.raw"]).must_end_with(2);
}
