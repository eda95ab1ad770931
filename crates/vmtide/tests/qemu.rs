//! A running machine of QEMU, through the command line: without a guest agent and without a guest.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests: a failed unwrap is a failed test, and they say what is missing"
)]

use crate::common;

use common::Place;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
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
        .args(["-qmp", "unix:administrator.qmp,server=on,wait=off"])
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

/// What an administrator does at the machine's other monitor.
struct Administrator(BufReader<UnixStream>);

impl Administrator {
    fn at(place: &Place) -> Self {
        let begun = Instant::now();
        let stream = loop {
            // The socket may be there before QEMU listens, or not yet.
            match UnixStream::connect(place.path("administrator.qmp")) {
                Ok(stream) => break stream,
                Err(error) => assert!(begun.elapsed() < Duration::from_secs(60), "{error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut this = Self(BufReader::new(stream));
        this.0.read_line(&mut String::new()).unwrap();
        this.run("qmp_capabilities", &json!({}));
        this
    }

    /// Runs a command and waits until it is done.
    fn run(&mut self, command: &str, arguments: &Value) {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.0.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "{command}: QEMU is gone");
            let answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if answer.get("return").is_some() {
                return;
            }
        }
    }
}

/// A qcow2 and a raw disk of the same content; answers with that content.
fn make_disks(place: &Place) -> Vec<u8> {
    place.image("data.raw", 4 * MIB);
    place.image("plain.raw", 4 * MIB);
    let converted = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2", "plain.raw", "system.qcow2"])
        .current_dir(place.directory.path())
        .status();
    assert!(converted.is_ok_and(|status| status.success()), "qemu-img is needed");
    std::fs::read(place.path("plain.raw")).unwrap()
}

/// Both disks of a restore point, which must hold `expected`.
fn assert_restored(place: &Place, to: &str, expected: &[u8]) {
    let restored = place.run(&["restore", "web", "--to", to, "--json"]).must_end_with(0).summary();
    let disks = restored["disks"].as_array().unwrap();
    assert_eq!(disks.len(), 2);
    for disk in disks {
        let found = std::fs::read(place.path(disk["path"].as_str().unwrap())).unwrap();
        assert_eq!(found.len(), expected.len(), "{disk}");
        let differs = found.iter().zip(expected).position(|(found, expected)| found != expected);
        assert_eq!(differs, None, "first byte that is not as it must be, of {disk}");
    }
}

/// QEMU keeps a bitmap through a resize and reports nothing of what was cut off: by size and bitmap
/// such a disk looks unchanged. Its end is zeros all the same.
#[test]
fn a_disk_that_was_cut_and_regrown_between_two_backups_is_read_in_full() {
    let place = Place::with_repository();
    let mut expected = make_disks(&place);
    let (_machine, source) = start(&place);
    let mut administrator = Administrator::at(&place);
    place.run(&["backup", &source, "--json"]).must_end_with(0);
    assert_restored(&place, "first", &expected);

    for disk in ["d0", "d1"] {
        for size in [MIB, 4 * MIB] {
            administrator.run("block_resize", &json!({"device": disk, "size": size}));
        }
    }
    expected[MIB..].fill(0);
    let summary = place.run(&["backup", &source, "--json"]).must_end_with(3).summary();
    for disk in summary["disks"].as_array().unwrap() {
        assert_eq!(disk["tracking"]["used"], false, "{disk}");
        let reason = disk["tracking"]["reason"].as_str().unwrap();
        assert!(reason.contains("were not reported"), "{reason}");
    }
    assert_restored(&place, "second", &expected);

    // Tracking is whole again: the next backup reads what changed, which is nothing.
    let summary = place.run(&["backup", &source, "--json"]).must_end_with(0).summary();
    for disk in summary["disks"].as_array().unwrap() {
        assert_eq!(disk["tracking"]["used"], true, "{disk}");
    }
    assert_restored(&place, "third", &expected);
}

#[test]
fn a_running_machine_is_listed_backed_up_and_restored() {
    let place = Place::with_repository();
    let expected = make_disks(&place);
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

    assert_restored(&place, "out", &expected);
    assert!(place.path("out/vm-config.json").exists());
    let excluded = full["disks"][0]["id"].as_str().unwrap();
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
