//! Conversions that cannot be done, fail or are interrupted: one clear line, and nothing left.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "helpers of tests: a failed unwrap is a failed test"
)]

use crate::common;

use common::Place;
use common::disks::{MIB, Server, must, names, one_clear_line, sparse_disk, wait_for};
use serde_json::Value;
use std::process::Command;

#[test]
fn bad_input_is_one_clear_line_and_leaves_nothing() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 4 * MIB);
    must(&place, "qemu-img", &["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    let whole = std::fs::read(place.path("disk.qcow2")).unwrap();
    std::fs::write(place.path("cut.qcow2"), &whole[..whole.len() / 3]).unwrap();
    std::fs::write(place.path("head.qcow2"), &whole[..60]).unwrap();
    let mut garbage = b"QFI\xfb\0\0\0\x03".to_vec();
    garbage.resize(65536, 0xa5);
    std::fs::write(place.path("garbage.qcow2"), garbage).unwrap();
    std::fs::create_dir(place.path("directory")).unwrap();
    // What is only named like an image is damage, never a raw disk without a word.
    std::fs::write(place.path("text.qcow2"), "just text").unwrap();
    std::fs::write(place.path("zeros.vhdx"), vec![0; 65536]).unwrap();
    std::fs::write(place.path("cut.vhd"), vec![1; 4096]).unwrap();
    std::fs::write(place.path("other.vmdk"), vec![1; 4096]).unwrap();
    std::fs::copy(place.path("disk.qcow2"), place.path("wrong.vhdx")).unwrap();
    std::fs::write(place.path("disk-flat.vmdk"), vec![1; 4096]).unwrap();
    let before = names(&place);
    for (arguments, codes, word) in [
        (&["convert", "none.qcow2", "out.raw"][..], &[6][..], "none.qcow2"),
        (&["convert", "directory", "out.raw"], &[1], "directory"),
        (&["convert", "text.qcow2", "out.raw"], &[5], "QFI"),
        (&["info", "text.qcow2"], &[5], "begins with \"just tex\""),
        (&["check", "zeros.vhdx"], &[5], "\"vhdxfile\" at 0x0"),
        (&["map", "zeros.vhdx"], &[5], "zeros.vhdx"),
        (&["compare", "zeros.vhdx", "disk.raw"], &[5], "zeros.vhdx"),
        (&["compare", "disk.raw", "zeros.vhdx"], &[5], "zeros.vhdx"),
        (&["chain", "list", "zeros.vhdx"], &[5], "zeros.vhdx"),
        (&["convert", "cut.vhd", "out.raw"], &[5], "conectix"),
        (&["serve", "cut.vhd", "--nbd", "unix:socket"], &[5], "conectix"),
        (&["convert", "other.vmdk", "out.raw"], &[5], "give the descriptor"),
        (&["convert", "wrong.vhdx", "out.raw"], &[1], "--format qcow2"),
        (&["convert", "cut.qcow2", "out.raw"], &[5], "cut.qcow2"),
        (&["convert", "head.qcow2", "out.raw"], &[5], "head.qcow2"),
        (&["convert", "garbage.qcow2", "out.raw"], &[5], "garbage.qcow2"),
        (&["info", "garbage.qcow2"], &[5], "garbage.qcow2"),
        (&["map", "garbage.qcow2"], &[5], "garbage.qcow2"),
        (&["info", "none.vhdx"], &[6], "none.vhdx"),
        (&["info", "directory"], &[1], "directory"),
        (&["convert", "disk.raw", "out.xyz"], &[2], "out.xyz"),
        (&["convert", "disk.raw", "disk.qcow2"], &[1], "--overwrite"),
        (&["convert", "disk.raw", "disk.raw", "--overwrite"], &[1], "disk.raw"),
        (&["convert", "disk.raw", "directory", "--overwrite", "--to", "raw"], &[1], "directory"),
        (&["convert", "disk.raw", "none/out.raw"], &[6], "none/out.raw"),
        (&["convert", "disk.raw", "out.raw", "--compress"], &[2], "compress"),
        (&["convert", "disk.raw", "out.raw", "--subformat", "fixed"], &[1], "subformat"),
        (&["convert", "disk.raw", "out.raw", "--snapshot", "x"], &[1], "snapshot"),
        (&["convert", "disk.raw", "out.raw", "--from", "qcow2"], &[5], "disk.raw"),
        (&["convert", "disk.raw", "s3://bucket/x"], &[2], "s3"),
        (&["convert", "disk.raw", "out.raw", "--from", "ext4"], &[2], "ext4"),
        (&["convert", "disk.raw", "out.qcow2", "--block-size", "100"], &[1], "100"),
        (&["convert", "disk.raw", "out.vhdx", "--logical-sector", "1024"], &[2], "1024"),
    ] {
        let run = place.run(arguments);
        assert!(codes.contains(&run.code), "{arguments:?}: {} {}", run.code, run.stderr);
        assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
        assert!(run.stderr.starts_with("error: "), "{arguments:?}: {}", run.stderr);
        assert!(run.stderr.contains(word), "{arguments:?}: {}", run.stderr);
        assert_eq!(names(&place), before, "{arguments:?}");
    }
    let run = place.run(&["convert", "cut.qcow2", "out.raw", "--json"]).must_end_with(5);
    let events = run.events();
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["exit_code"]), (&"error".into(), &5.into()));
    place.run(&["info", "text.qcow2", "--format", "raw"]).must_end_with(0);
    place.run(&["info", "disk-flat.vmdk"]).must_end_with(0);
}

#[test]
fn a_full_disk_leaves_no_target() {
    let place = Place::new();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(16 * MIB)
    .collect();
    std::fs::write(place.path("large.raw"), noise).unwrap();
    std::fs::create_dir(place.path("small")).unwrap();
    let script = "set -e
        mount -t tmpfs -o size=4m tmpfs small
        for out in out.raw out.qcow2; do
            code=0; $VMTIDE convert large.raw small/$out || code=$?
            echo \"code $code\"
        done
        ls -A small";
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script])
        .current_dir(place.directory.path())
        .env("VMTIDE", assert_cmd::cargo::cargo_bin!("vmtide"))
        .env("XDG_CONFIG_HOME", place.path("config"))
        .output()
        .unwrap_or_else(|error| panic!("unshare is needed: install util-linux: {error}"));
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stdout}\n{stderr}");
    assert_eq!(stdout, "code 1\ncode 1\n", "{stderr}");
    assert!(stderr.contains("No space left"), "{stderr}");
}

/// A raw disk served so slowly that there is time to interrupt.
fn slow_export(place: &Place, image: &str) -> (Server, String) {
    let socket = place.path("slow.sock");
    let file = place.path(image);
    let child = Command::new("qemu-nbd")
        .args(["-t", "-e", "8", "--object", "throttle-group,id=slow,x-bps-total=4194304"])
        .args(["--image-opts", "-k"])
        .arg(&socket)
        .arg(format!(
            "driver=throttle,throttle-group=slow,file.driver=file,file.filename={}",
            file.display()
        ))
        .spawn()
        .unwrap_or_else(|error| panic!("qemu-nbd is needed: install qemu-utils: {error}"));
    let server = Server(child);
    wait_for(&socket);
    (server, format!("nbd+unix:///?socket={}", socket.display()))
}

#[test]
fn an_interruption_leaves_no_target() {
    let place = Place::new();
    place.image("disk.raw", 128 * MIB);
    let (_server, url) = slow_export(&place, "disk.raw");
    let before = names(&place);
    let mut child = Command::new(assert_cmd::cargo::cargo_bin!("vmtide"))
        .args(["convert", &url, "out.qcow2", "--json"])
        .current_dir(place.directory.path())
        .env("XDG_CONFIG_HOME", place.path("config"))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("\"progress\"") {
        line.clear();
        assert_ne!(std::io::BufRead::read_line(&mut out, &mut line).unwrap(), 0);
    }
    assert!(!place.path("out.qcow2").exists());
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut out, &mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest}");
    let last: Value = serde_json::from_str(rest.lines().last().unwrap()).unwrap();
    assert_eq!((&last["type"], &last["exit_code"]), (&"error".into(), &130.into()));
    assert_eq!(names(&place), before);
}

#[test]
fn a_failure_in_an_image_of_several_files_leaves_none_of_them() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 3 * MIB);
    std::fs::write(place.path("out-flat.vmdk"), "mine").unwrap();
    let before = names(&place);
    let arguments = ["convert", "disk.raw", "out.vmdk", "--subformat", "monolithicFlat"];
    one_clear_line(&place.run(&arguments).must_end_with(1), "out-flat.vmdk");
    assert_eq!(names(&place), before);
    assert_eq!(std::fs::read(place.path("out-flat.vmdk")).unwrap(), b"mine");
}
