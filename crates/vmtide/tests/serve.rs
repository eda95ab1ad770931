//! `vmtide serve` and exports as sources and targets, with the tools of QEMU at the other end.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "helpers of tests: a failed unwrap is a failed test"
)]

#[allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    reason = "shared by test programs that each use a part of it; a failed unwrap is a failed test"
)]
mod common;

use common::Place;
use common::disks::{
    MIB, Server, must, must_equal, one_clear_line, qemu, qemu_nbd, sparse_disk, wait_for,
};
use serde_json::Value;
use std::process::Command;

#[test]
fn exports_are_converted_from_and_to() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 8 * MIB);
    must(&place, "qemu-img", &["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    let (source, url) = qemu_nbd(&place, "disk.qcow2", "qcow2");
    place.run(&["convert", &url, "from.qcow2"]).must_end_with(0);
    drop(source);
    must_equal(&place, ("disk.raw", "raw"), ("from.qcow2", "qcow2"));
    must(&place, "qemu-img", &["create", "-q", "-f", "qcow2", "blank.qcow2", "9M"]);
    let (target, url) = qemu_nbd(&place, "blank.qcow2", "qcow2");
    place.run(&["convert", "disk.qcow2", &url]).must_end_with(0);
    let run = place.run(&["convert", "disk.qcow2", &url]).must_end_with(1);
    one_clear_line(&run, "--overwrite");
    let run = place.run(&["convert", "disk.raw", &url, "--in-place", "--json"]).must_end_with(0);
    assert_eq!(run.summary()["written_bytes"], 0);
    place.run(&["convert", "disk.raw", &url, "--overwrite"]).must_end_with(0);
    place.run(&["compare", "disk.raw", &url]).must_end_with(0);
    place.run(&["convert", "disk.raw", &url, "--to", "qcow2"]).must_end_with(2);
    drop(target);
    must_equal(&place, ("disk.raw", "raw"), ("blank.qcow2", "qcow2"));
}

#[test]
fn images_are_served_and_written_through_the_server() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 8 * MIB);
    place.run(&["convert", "disk.raw", "disk.qcow2"]).must_end_with(0);
    let serve = |arguments: &[&str]| {
        let socket = place.path("vmtide.sock");
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("vmtide"));
        let address = format!("unix:{}", socket.display());
        command.args(arguments).args(["--json", "--nbd", &address]);
        let child = command
            .current_dir(place.directory.path())
            .env("XDG_CONFIG_HOME", place.path("config"))
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut server = Server(child);
        let mut out = std::io::BufReader::new(server.0.stdout.take().unwrap());
        let mut line = String::new();
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        let event: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(event["type"], "listening");
        (server, event["exports"][0]["url"].as_str().unwrap().to_owned())
    };
    let end = |mut server: Server| {
        let pid = rustix::process::Pid::from_child(&server.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert_eq!(server.0.wait().unwrap().code(), Some(0));
    };
    let (server, url) = serve(&["serve", "disk.qcow2"]);
    must_equal(&place, (&url, "raw"), ("disk.raw", "raw"));
    let denied = qemu(&place, "qemu-io", &["-f", "raw", "-c", "write 0 512", &url]);
    assert!(!denied.status.success());
    end(server);
    assert!(!place.path("vmtide.sock").exists());
    let (server, url) = serve(&["serve", "disk.qcow2", "--writable"]);
    for (file, target) in [("disk.raw", true), (url.as_str(), false)] {
        let command = "write -P 77 3333k 333k";
        assert!(
            qemu(&place, "qemu-io", &["-f", "raw", "-c", command, file]).status.success(),
            "{target}"
        );
    }
    end(server);
    must(&place, "qemu-img", &["check", "-q", "disk.qcow2"]);
    must_equal(&place, ("disk.raw", "raw"), ("disk.qcow2", "qcow2"));
    one_clear_line(&place.run(&["serve", "none.raw", "--nbd", "unix:x.sock"]), "none.raw");
    place.run(&["serve", "disk.raw", "--nbd", "x.sock"]).must_end_with(2);
}

#[test]
fn restore_points_are_served() {
    let place = Place::with_repository();
    place.image("web.raw", 2 * MIB);
    place.run(&["backup", "web.raw"]).must_end_with(0);
    std::fs::rename(place.path("web.raw"), place.path("old.raw")).unwrap();
    let socket = place.path("point.sock");
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("vmtide"));
    let child = command
        .args(["serve", "web@latest", "--nbd", &format!("unix:{}", socket.display())])
        .current_dir(place.directory.path())
        .env("VMTIDE_PASSWORD", common::PASSWORD)
        .env("VMTIDE_REPOSITORY", place.repository())
        .env("XDG_CONFIG_HOME", place.path("config"))
        .spawn()
        .unwrap();
    let _server = Server(child);
    wait_for(&socket);
    let url = format!("nbd+unix:///?socket={}", socket.display());
    must_equal(&place, (&url, "raw"), ("old.raw", "raw"));
    place.run(&["serve", "web", "--nbd", "unix:x.sock", "--writable"]).must_end_with(2);
    let run = place.run(&["serve", "web", "--nbd", "unix:x.sock", "--disk", "d9"]).must_end_with(6);
    one_clear_line(&run, "d9");
}
