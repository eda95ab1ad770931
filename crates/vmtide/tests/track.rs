//! `vmtide track` with QEMU's tools as its guests: what it says changed is what differs, through stops and kills.

#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "helpers of tests: a failed unwrap is a failed test"
)]

use crate::common;

use common::Place;
use common::disks::{MIB, Server, must, one_clear_line, qemu, sparse_disk};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use vmtide_block::{ByteRange, RangeSet};

const SIZE: usize = 48 * MIB;

/// A hosted image: its server and the URL for QEMU's tools.
fn host(place: &Place, image: &str) -> (Server, String) {
    let address = format!("unix:{}", place.path("guest.sock").display());
    let child = Command::new(assert_cmd::cargo::cargo_bin!("vmtide"))
        .args(["track", image, "--json", "--listen", &address])
        .current_dir(place.directory.path())
        .env("XDG_CONFIG_HOME", place.path("config"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut server = Server(child);
    let mut out = std::io::BufReader::new(server.0.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(event["type"], "listening", "{line}");
    assert_eq!(event["tracking"]["enabled"], true, "{line}");
    (server, event["exports"][0]["url"].as_str().unwrap().to_owned())
}

fn stop(mut server: Server) {
    let pid = rustix::process::Pid::from_child(&server.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(server.0.wait().unwrap().code(), Some(0));
}

fn write(place: &Place, url: &str, commands: &[&str]) {
    let mut arguments = vec!["-f", "raw"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(url);
    must(place, "qemu-io", &arguments);
}

fn changes(place: &Place, image: &str, id: &str) -> RangeSet {
    let run = place.run(&["track", image, "--changes", id]).must_end_with(0);
    serde_json::from_str(&run.stdout).unwrap()
}

fn seal(place: &Place, image: &str) -> String {
    place.run(&["track", image, "--checkpoint"]).must_end_with(0).stdout.trim().to_owned()
}

/// The old copy with the changed ranges of the new one in it is the new one, byte by byte.
fn must_lead_from(place: &Place, old: &str, new: &str, changed: &RangeSet) {
    let read = |name: &str| std::fs::read(place.path(name)).unwrap();
    let (mut patched, new) = (read(old), read(new));
    for range in changed.iter() {
        let range = range.offset as usize..range.end() as usize;
        patched[range.clone()].copy_from_slice(&new[range]);
    }
    assert!(patched == new, "something changed that was not told");
}

fn copy(place: &Place, url: &str, name: &str) {
    must(place, "qemu-img", &["convert", "-f", "raw", "-O", "raw", url, name]);
}

#[test]
fn what_is_told_is_what_qemu_wrote() {
    for format in ["raw", "vhdx"] {
        let place = Place::new();
        sparse_disk(&place, "start.raw", SIZE);
        let image = format!("disk.{format}");
        must(&place, "qemu-img", &["convert", "-f", "raw", "-O", format, "start.raw", &image]);
        let (server, url) = host(&place, &image);
        write(&place, &url, &["write -P 1 0 64k", "flush"]);
        let first = seal(&place, &image);
        copy(&place, &url, "first.raw");
        write(&place, &url, &["write -P 2 1000k 100k", "write -z 10M 1M", "discard 20M 64k"]);
        let block = 64 << 10;
        let expected: RangeSet = vec![
            ByteRange::from_bounds(15 * block, 18 * block),
            ByteRange::new(10 << 20, 1 << 20),
            ByteRange::new(20 << 20, block),
        ]
        .into();
        assert_eq!(changes(&place, &image, &first), expected, "{format}: while it is hosted");
        copy(&place, &url, "second.raw");
        must_lead_from(&place, "first.raw", "second.raw", &expected);
        one_clear_line(&place.run(&["track", &image, "--listen", "unix:x.sock"]), "has it open");
        let refused = qemu(&place, "qemu-io", &["-f", format, "-c", "write 0 512", &image]);
        assert!(!refused.status.success(), "{refused:?}");
        stop(server);
        assert_eq!(changes(&place, &image, &first), expected, "{format}: after a planned stop");
        let (server, url) = host(&place, &image);
        assert_eq!(changes(&place, &image, &first), expected, "{format}: hosted again");
        let second = seal(&place, &image);
        assert!(changes(&place, &image, &second).is_empty() && second != first);
        write(&place, &url, &["write -P 3 30M 512"]);
        stop(server);
        let since: Vec<_> = changes(&place, &image, &second).iter().collect();
        assert_eq!(since, [ByteRange::new(30 << 20, block)]);
        // Somebody else writes to the image; then nothing is worth anything, and is said so.
        std::thread::sleep(std::time::Duration::from_millis(20));
        write_offline(&place, &image, format);
        let run = place.run(&["track", &image, "--changes", &first]).must_end_with(1);
        one_clear_line(&run, "changed or copied");
        let state = place.run(&["track", &image, "--state", "--json"]).must_end_with(0).summary();
        assert_eq!(state["enabled"], false);
    }
}

fn write_offline(place: &Place, image: &str, format: &str) {
    must(place, "qemu-io", &["-f", format, "-c", "write -P 9 5M 64k", image]);
}

#[test]
fn kills_in_the_middle_of_writes_lose_no_change() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", SIZE);
    let (mut server, mut url) = host(&place, "disk.raw");
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut next = |end: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % end
    };
    for round in 1..=4u64 {
        let id = seal(&place, "disk.raw");
        copy(&place, &url, "before.raw");
        // In the first MiB only: the answer shall not be of the whole disk.
        let commands: Vec<_> =
            (0..400).map(|_| format!("write -q -P {round} {}k 4k", next(255) * 4)).collect();
        let mut guest = Command::new("qemu-io");
        guest.args(["-f", "raw"]);
        for command in &commands {
            guest.args(["-c", command]);
        }
        let mut guest =
            guest.arg(&url).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(10 + next(60)));
        server.0.kill().unwrap();
        server.0.wait().unwrap();
        // Its disk is gone.
        guest.wait().unwrap();
        let told = changes(&place, "disk.raw", &id);
        must_lead_from(&place, "before.raw", "disk.raw", &told);
        let most = 4 * (16 << 20);
        assert!(told.total_bytes() <= most, "{} bytes", told.total_bytes());
        (server, url) = host(&place, "disk.raw");
        assert_eq!(changes(&place, "disk.raw", &id), told, "round {round}");
    }
    stop(server);
}

#[test]
fn tracking_is_switched_and_asked_without_a_host() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", MIB);
    place.run(&["track", "disk.raw"]).must_end_with(2);
    place.run(&["track", "disk.raw", "--state", "--enable"]).must_end_with(2);
    place.run(&["track", "none.raw", "--state"]).must_end_with(6);
    place.run(&["track", ".", "--state"]).must_end_with(1);
    let run = place.run(&["track", "disk.raw", "--checkpoint"]).must_end_with(1);
    one_clear_line(&run, "off");
    let state = place.run(&["track", "disk.raw", "--enable", "--json"]).must_end_with(0).summary();
    let id = state["most_recent_id"].as_str().unwrap();
    assert!(id.starts_with("rctX:") && id.ends_with(":00000001"), "{id}");
    assert_eq!((&state["enabled"], &state["newer_changes"]), (&true.into(), &false.into()));
    assert!(changes(&place, "disk.raw", id).is_empty());
    let unknown = place.run(&["track", "disk.raw", "--changes", &"x".repeat(255)]).must_end_with(1);
    one_clear_line(&unknown, "not known");
    // A file that only looks like tracking.
    let rct = std::fs::File::options().write(true).open(place.path("disk.raw.rct")).unwrap();
    rct.write_all_at(b"damage", 40).unwrap();
    one_clear_line(&place.run(&["track", "disk.raw", "--changes", id]), "damaged");
    place.run(&["track", "disk.raw", "--disable"]).must_end_with(0);
    assert!(!place.path("disk.raw.rct").exists() && !place.path("disk.raw.mrt").exists());
    one_clear_line(&place.run(&["track", "disk.raw", "--listen", "nowhere"]), "no address");
    one_clear_line(
        &place.run(&["track", "disk.raw", "--listen", "unix:a.sock", "--granularity", "5000"]),
        "granularity",
    );
}
