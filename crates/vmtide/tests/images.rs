//! The commands over disk images, with qemu-img and qemu-nbd as independent judges.

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

use common::{Place, Run, finish};
use serde_json::Value;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

/// Runs one of QEMU's tools in the place.
fn qemu(place: &Place, program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .current_dir(place.directory.path())
        .output()
        .unwrap_or_else(|error| {
            panic!("{program} is needed: install qemu-utils (scripts/test.sh does): {error}")
        })
}

fn must(place: &Place, program: &str, arguments: &[&str]) -> String {
    let output = qemu(place, program, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Whether qemu-img finds both to hold the same.
fn must_equal(place: &Place, left: (&str, &str), right: (&str, &str)) {
    must(place, "qemu-img", &["compare", "-f", left.1, "-F", right.1, left.0, right.0]);
}

/// A sparse raw disk with data, zeros that are written, and holes.
fn sparse_disk(place: &Place, name: &str, size: usize) {
    let mut bytes = vec![0u8; size];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut at = 0;
    while at + MIB / 2 < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let length = (state as usize) % (MIB / 3) + 1;
        for (index, byte) in bytes[at..at + length].iter_mut().enumerate() {
            *byte = (state.rotate_left((index % 64) as u32) as u8) ^ (index >> 8) as u8;
        }
        at += length + (state >> 20) as usize % MIB;
    }
    std::fs::write(place.path(name), bytes).unwrap();
    must(place, "fallocate", &["--dig-holes", name]);
}

/// What is in the place, but for what the program keeps for itself.
fn names(place: &Place) -> Vec<String> {
    let entries = std::fs::read_dir(place.directory.path()).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| !["state", "config"].contains(&name.as_str()));
    names.sort();
    names
}

/// One line that begins with `error:` and holds `word`.
fn one_clear_line(run: &Run, word: &str) {
    let errors: Vec<_> = run.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{}", run.stderr);
    assert!(errors[0].contains(word), "{word}: {}", run.stderr);
}

/// A running server, ended with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already, and then there is nothing to do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_for(socket: &Path) {
    let begun = Instant::now();
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{} is not served", socket.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// An image served by qemu-nbd, writable, as its own format.
fn qemu_nbd(place: &Place, image: &str, format: &str) -> (Server, String) {
    qemu_nbd_with(place, image, format, &[])
}

fn qemu_nbd_with(place: &Place, image: &str, format: &str, options: &[&str]) -> (Server, String) {
    let socket = place.path(&format!("{image}.sock"));
    let child = Command::new("qemu-nbd")
        .args(["-t", "-e", "8", "-f", format])
        .args(options)
        .arg("-k")
        .arg(&socket)
        .arg(place.path(image))
        .spawn()
        .unwrap_or_else(|error| panic!("qemu-nbd is needed: install qemu-utils: {error}"));
    let server = Server(child);
    wait_for(&socket);
    (server, format!("nbd+unix:///?socket={}", socket.display()))
}

#[test]
fn info_tells_what_an_image_says_of_itself() {
    let place = Place::new();
    must(
        &place,
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", "cluster_size=128k", "base.qcow2", "10M"],
    );
    must(&place, "qemu-img", &["snapshot", "-c", "monday", "base.qcow2"]);
    must(&place, "qemu-img", &["bitmap", "--add", "base.qcow2", "b0"]);
    let made = ["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"];
    must(&place, "qemu-img", &made);
    let text = place.run(&["info", "base.qcow2"]).must_end_with(0).stdout;
    for word in ["qcow2, version 3", "10.0 MiB (10485760 bytes)", "128.0 KiB", "monday", "b0"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let info = place.run(&["info", "top.qcow2", "--chain", "--json"]).must_end_with(0).summary();
    assert_eq!(info["backing"]["name"], "base.qcow2");
    assert_eq!(info["size_bytes"], 10 * MIB);
    assert_eq!(info["chain"].as_array().unwrap().len(), 2);
    assert_eq!(info["chain"][1]["snapshots"][0]["name"], "monday");
    // Without its parent it still tells of itself, and the chain says what is missing.
    std::fs::remove_file(place.path("base.qcow2")).unwrap();
    let text = place.run(&["info", "top.qcow2"]).must_end_with(0).stdout;
    assert!(text.contains("base.qcow2"), "{text}");
    let run = place.run(&["info", "top.qcow2", "--chain"]).must_end_with(3);
    assert!(run.stderr.contains("base.qcow2"), "{}", run.stderr);
    one_clear_line(&place.run(&["map", "top.qcow2"]).must_end_with(6), "base.qcow2");
}

#[test]
fn map_agrees_with_qemu() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 16 * MIB);
    must(&place, "qemu-img", &["convert", "-O", "qcow2", "disk.raw", "base.qcow2"]);
    let made = ["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"];
    must(&place, "qemu-img", &made);
    must(&place, "qemu-io", &["-c", "write -P 7 3M 200k", "-c", "write -z 5M 1M", "top.qcow2"]);
    let run = place.run(&["map", "top.qcow2", "--json"]).must_end_with(0);
    let summary = run.summary();
    assert_eq!(summary["layers"].as_array().unwrap().len(), 2);
    let theirs: Value =
        serde_json::from_str(&must(&place, "qemu-img", &["map", "--output=json", "top.qcow2"]))
            .unwrap();
    // Every byte QEMU calls data of a depth and offset is the same here.
    let ours: Vec<Value> = run.events().into_iter().filter(|e| e["type"] == "extent").collect();
    let find = |at: u64| {
        let found = ours.iter().find(|extent| {
            let start = extent["start"].as_u64().unwrap();
            (start..start + extent["length"].as_u64().unwrap()).contains(&at)
        });
        found.unwrap_or_else(|| panic!("no extent at {at}"))
    };
    for extent in theirs.as_array().unwrap() {
        let start = extent["start"].as_u64().unwrap();
        let length = extent["length"].as_u64().unwrap();
        for at in [start, start + length / 2, start + length - 1] {
            let ours = find(at);
            assert_eq!(extent["data"].as_bool().unwrap(), ours["kind"] == "data", "{at}: {ours}");
            if extent["data"].as_bool().unwrap() {
                assert_eq!(extent["depth"], ours["depth"], "{at}");
                let place = |value: &Value| {
                    value["offset"].as_u64().unwrap() + at - value["start"].as_u64().unwrap()
                };
                assert_eq!(place(extent), place(ours), "{at}");
            }
        }
    }
    let total: u64 = ours.iter().map(|extent| extent["length"].as_u64().unwrap()).sum();
    assert_eq!(total, 16 << 20);
    let text = place.run(&["map", "top.qcow2"]).must_end_with(0).stdout;
    assert!(text.contains("unallocated") && text.contains("base.qcow2"), "{text}");
}

#[test]
fn compare_says_where_disks_differ() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 8 * MIB);
    must(&place, "qemu-img", &["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    let run = place.run(&["compare", "disk.raw", "disk.qcow2"]).must_end_with(0);
    assert!(run.stdout.contains("identical"), "{}", run.stdout);
    must(&place, "qemu-io", &["-c", "write -P 99 5000000 1", "disk.qcow2"]);
    let run = place.run(&["compare", "disk.raw", "disk.qcow2", "--json"]).must_end_with(1);
    let found = run.summary();
    assert_eq!(
        (&found["identical"], &found["first_difference"]),
        (&false.into(), &5_000_000.into())
    );
    // A larger disk holds the same where its rest is zero.
    std::fs::copy(place.path("disk.raw"), place.path("long.raw")).unwrap();
    must(&place, "truncate", &["-s", "+1000", "long.raw"]);
    place.run(&["compare", "disk.raw", "long.raw"]).must_end_with(0);
    place.run(&["compare", "long.raw", "disk.raw", "--strict"]).must_end_with(1);
    place.run(&["compare", "disk.raw", "disk.raw", "--strict"]).must_end_with(0);
    one_clear_line(&place.run(&["compare", "disk.raw", "none.raw"]).must_end_with(6), "none.raw");
}

#[test]
fn create_makes_images_and_children() {
    let place = Place::new();
    let made = place.run(&["create", "disk.qcow2", "10.5MiB", "--json"]).must_end_with(0).summary();
    assert_eq!((&made["format"], &made["size_bytes"]), (&"qcow2".into(), &11_010_048.into()));
    must(&place, "qemu-img", &["check", "-q", "disk.qcow2"]);
    must(&place, "qemu-io", &["-c", "write -P 5 1M 1M", "disk.qcow2"]);
    std::fs::create_dir(place.path("children")).unwrap();
    let run = place.run(&["create", "children/a.qcow2", "--parent", "disk.qcow2"]).must_end_with(0);
    assert!(run.stdout.contains("child of ../disk.qcow2"), "{}", run.stdout);
    must_equal(&place, ("children/a.qcow2", "qcow2"), ("disk.qcow2", "qcow2"));
    for (arguments, code, word) in [
        (&["create", "disk.qcow2", "1M"][..], 1, "--overwrite"),
        (&["create", "x.qcow2"], 2, "SIZE"),
        (&["create", "x.qcow2", "1X"], 2, "1X"),
        (&["create", "x.bin", "1M"], 2, "x.bin"),
        (&["create", "x.qcow2", "1M", "--subformat", "fixed"], 1, "subformat"),
        (&["create", "x.raw", "--parent", "disk.qcow2"], 2, "raw"),
        (&["create", "x.qcow2", "--parent", "none.qcow2"], 6, "none.qcow2"),
        (&["create", "none/x.qcow2", "1M"], 6, "none/x.qcow2"),
    ] {
        let run = place.run(arguments).must_end_with(code);
        assert!(run.stderr.contains(word), "{arguments:?}: {}", run.stderr);
    }
    place.run(&["create", "disk.qcow2", "1M", "--overwrite"]).must_end_with(0);
    place.run(&["create", "disk.raw", "1000"]).must_end_with(0);
    assert_eq!(std::fs::metadata(place.path("disk.raw")).unwrap().len(), 1000);
    assert_eq!(names(&place), ["children", "disk.qcow2", "disk.raw"]);
}

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
    // What is only named like an image is a raw disk.
    std::fs::write(place.path("text.qcow2"), "just text").unwrap();
    let before = names(&place);
    for (arguments, codes, word) in [
        (&["convert", "none.qcow2", "out.raw"][..], &[6][..], "none.qcow2"),
        (&["convert", "directory", "out.raw"], &[1], "directory"),
        (&["convert", "cut.qcow2", "out.raw"], &[5], "cut.qcow2"),
        (&["convert", "head.qcow2", "out.raw"], &[5], "head.qcow2"),
        (&["convert", "garbage.qcow2", "out.raw"], &[1, 5], "garbage.qcow2"),
        (&["info", "garbage.qcow2"], &[1, 5], "garbage.qcow2"),
        (&["map", "garbage.qcow2"], &[1, 5], "garbage.qcow2"),
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
        (&["convert", "disk.raw", "out.raw", "--from", "qcow2"], &[1, 5], "disk.raw"),
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
    place.run(&["info", "text.qcow2"]).must_end_with(0);
}

#[test]
fn existing_targets_are_replaced_or_changed_only_when_told() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 4 * MIB);
    std::fs::write(place.path("out.qcow2"), "precious").unwrap();
    place.run(&["convert", "disk.raw", "out.qcow2"]).must_end_with(1);
    assert_eq!(std::fs::read(place.path("out.qcow2")).unwrap(), b"precious");
    place.run(&["convert", "disk.raw", "out.qcow2", "--overwrite"]).must_end_with(0);
    must_equal(&place, ("disk.raw", "raw"), ("out.qcow2", "qcow2"));
    must(&place, "qemu-io", &["-f", "raw", "-c", "write -P 3 1M 64k", "disk.raw"]);
    let arguments = ["convert", "disk.raw", "out.qcow2", "--in-place", "--json"];
    let run = place.run(&arguments).must_end_with(0).summary();
    let written = run["written_bytes"].as_u64().unwrap();
    assert!((65536..=3 * 65536).contains(&written), "{run}");
    must_equal(&place, ("disk.raw", "raw"), ("out.qcow2", "qcow2"));
    must(&place, "qemu-img", &["check", "-q", "out.qcow2"]);
    place.run(&["convert", "disk.raw", "out.qcow2", "--in-place", "--overwrite"]).must_end_with(2);
}

#[test]
fn odd_and_empty_disks_are_rounded_up_to_whole_sectors() {
    let place = Place::new();
    std::fs::write(place.path("odd.raw"), vec![7; 1000]).unwrap();
    std::fs::write(place.path("empty.raw"), []).unwrap();
    let run = place.run(&["convert", "odd.raw", "odd.qcow2", "--json"]).must_end_with(0).summary();
    assert_eq!((&run["source_size_bytes"], &run["size_bytes"]), (&1000.into(), &1024.into()));
    must_equal(&place, ("odd.raw", "raw"), ("odd.qcow2", "qcow2"));
    place.run(&["convert", "odd.raw", "same.raw"]).must_end_with(0);
    assert_eq!(std::fs::read(place.path("same.raw")).unwrap(), vec![7; 1000]);
    place.run(&["convert", "empty.raw", "empty.qcow2"]).must_end_with(0);
    place.run(&["convert", "empty.qcow2", "again.raw"]).must_end_with(0);
    assert_eq!(std::fs::metadata(place.path("again.raw")).unwrap().len(), 0);
    place.run(&["map", "empty.raw"]).must_end_with(0);
}

#[test]
fn internal_snapshots_are_read() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 4 * MIB);
    must(&place, "qemu-img", &["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    must(&place, "qemu-img", &["snapshot", "-c", "monday", "disk.qcow2"]);
    must(&place, "qemu-io", &["-c", "write -P 8 0 2M", "disk.qcow2"]);
    place.run(&["convert", "disk.qcow2", "then.raw", "--snapshot", "monday"]).must_end_with(0);
    must_equal(&place, ("disk.raw", "raw"), ("then.raw", "raw"));
    let run =
        place.run(&["convert", "disk.qcow2", "x.raw", "--snapshot", "friday"]).must_end_with(1);
    one_clear_line(&run, "friday");
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
fn backup_and_restore_take_images_with_parents() {
    let place = Place::with_repository();
    sparse_disk(&place, "disk.raw", 4 * MIB);
    std::fs::create_dir(place.path("base")).unwrap();
    must(&place, "qemu-img", &["convert", "-O", "qcow2", "disk.raw", "base.qcow2"]);
    place.run(&["create", "top.qcow2", "--parent", "base.qcow2"]).must_end_with(0);
    place.run(&["backup", "top.qcow2"]).must_end_with(0);
    place.run(&["restore", "top", "--to", "back.qcow2"]).must_end_with(0);
    must_equal(&place, ("disk.raw", "raw"), ("back.qcow2", "qcow2"));
    let run =
        finish(&mut place.command(&["restore", "top", "--to", "x.qcow2", "--subformat", "thick"]));
    one_clear_line(&run.must_end_with(1), "thick");
    assert!(!place.path("x.qcow2").exists());
}

/// A kind of image: extension, qemu-img's format, options of qemu-img and of vmtide.
type Kind = (&'static str, &'static str, &'static [&'static str], &'static [&'static str]);

/// Every kind that is written.
const KINDS: &[Kind] = &[
    ("raw", "raw", &[], &[]),
    ("qcow2", "qcow2", &[], &[]),
    ("qcow2", "qcow2", &["-c"], &["--compress"]),
    ("qcow2", "qcow2", &["-o", "cluster_size=4k"], &["--block-size", "4K"]),
    ("vhdx", "vhdx", &[], &[]),
    ("vhdx", "vhdx", &["-o", "subformat=fixed"], &["--subformat", "fixed"]),
    ("vhdx", "vhdx", &["-o", "block_size=1M"], &["--block-size", "1M"]),
    ("vhd", "vpc", &["-o", "force_size=on"], &[]),
    ("vhd", "vpc", &["-o", "subformat=fixed,force_size=on"], &["--subformat", "fixed"]),
    ("vmdk", "vmdk", &[], &[]),
    ("vmdk", "vmdk", &["-o", "subformat=monolithicFlat"], &["--subformat", "monolithicFlat"]),
    (
        "vmdk",
        "vmdk",
        &["-o", "subformat=twoGbMaxExtentSparse"],
        &["--subformat", "twoGbMaxExtentSparse"],
    ),
    (
        "vmdk",
        "vmdk",
        &["-o", "subformat=twoGbMaxExtentFlat"],
        &["--subformat", "twoGbMaxExtentFlat"],
    ),
    ("vmdk", "vmdk", &["-o", "subformat=streamOptimized"], &["--subformat", "streamOptimized"]),
];

/// The name of the image of one kind as the source of a pair.
fn source_name(index: usize, kind: &Kind) -> String {
    format!("in{index}.{}", kind.0)
}

#[test]
fn every_kind_becomes_every_other_and_qemu_finds_the_same() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 5 * MIB + 512);
    for (index, kind) in KINDS.iter().enumerate() {
        let name = source_name(index, kind);
        let options = [&["convert", "-f", "raw", "-O", kind.1][..], kind.2, &["disk.raw", &name]];
        must(&place, "qemu-img", &options.concat());
    }
    let before = names(&place);
    for (from, source) in KINDS.iter().enumerate() {
        for target in KINDS {
            let (input, output) = (source_name(from, source), format!("out.{}", target.0));
            let arguments = [&["convert", "-q", &input, &output][..], target.3].concat();
            place.run(&arguments).must_end_with(0);
            must_equal(&place, ("disk.raw", "raw"), (&output, target.1));
            place.run(&["compare", "disk.raw", &output]).must_end_with(0);
            for name in names(&place).into_iter().filter(|name| !before.contains(name)) {
                assert!(name.starts_with("out"), "{name}");
                std::fs::remove_file(place.path(&name)).unwrap();
            }
        }
    }
}

#[test]
fn every_kind_goes_through_exports_and_restores() {
    let place = Place::with_repository();
    sparse_disk(&place, "disk.raw", 3 * MIB);
    place.run(&["backup", "disk.raw", "--name", "disk"]).must_end_with(0);
    let (_server, url) = qemu_nbd_with(&place, "disk.raw", "raw", &["-r"]);
    for (index, kind) in KINDS.iter().enumerate() {
        let name = format!("from-export{index}.{}", kind.0);
        place.run(&[&["convert", &url, &name][..], kind.3].concat()).must_end_with(0);
        must_equal(&place, ("disk.raw", "raw"), (&name, kind.1));
        // And into an export.
        let blank = format!("blank{index}.raw");
        std::fs::write(place.path(&blank), vec![0; 4 * MIB]).unwrap();
        let (target, target_url) = qemu_nbd(&place, &blank, "raw");
        place.run(&["convert", &name, &target_url]).must_end_with(0);
        drop(target);
        must_equal(&place, ("disk.raw", "raw"), (&blank, "raw"));
        if kind.3.first().is_some_and(|option| *option != "--subformat") {
            continue;
        }
        let restored = format!("restored{index}.{}", kind.0);
        let arguments = [&["restore", "disk", "--to", &restored][..], kind.3].concat();
        place.run(&arguments).must_end_with(0);
        must_equal(&place, ("disk.raw", "raw"), (&restored, kind.1));
        place.run(&["backup", &restored, "--name", "again"]).must_end_with(0);
        let back = format!("back{index}.raw");
        place.run(&["restore", "again", "--to", &back]).must_end_with(0);
        place.run(&["compare", "disk.raw", &back]).must_end_with(0);
    }
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

#[test]
fn check_finds_damage_and_repairs_it() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 5 * MIB);
    place.run(&["convert", "disk.raw", "disk.vhd"]).must_end_with(0);
    let run = place.run(&["check", "disk.vhd"]).must_end_with(0);
    assert!(run.stdout.contains("no errors"), "{}", run.stdout);
    // Without its footer the image has only the copy in front.
    let path = place.path("disk.vhd");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len() - 512;
    bytes[end..].fill(0);
    std::fs::write(&path, bytes).unwrap();
    let run = place.run(&["check", "disk.vhd", "--json"]).must_end_with(5);
    let found = run.summary();
    assert!(found["errors"].as_u64().unwrap() > 0, "{found}");
    assert!(found["problems"][0]["detail"].as_str().unwrap().contains("footer"), "{found}");
    let run = place.run(&["check", "disk.vhd", "--repair", "--json"]).must_end_with(0).summary();
    assert_eq!(run["errors"], 0);
    assert!(run["repair"]["repaired"].as_u64().unwrap() > 0, "{run}");
    place.run(&["check", "disk.vhd"]).must_end_with(0);
    must_equal(&place, ("disk.raw", "raw"), ("disk.vhd", "vpc"));
    place.run(&["check", "disk.raw"]).must_end_with(0);
    place.run(&["check", "disk.vhd", "--repair=some"]).must_end_with(2);
    one_clear_line(&place.run(&["check", "none.vhd"]).must_end_with(6), "none.vhd");
}

#[test]
fn chains_are_listed_rebased_and_merged() {
    for format in ["qcow2", "vhdx", "vhd", "vmdk"] {
        let place = Place::new();
        sparse_disk(&place, "disk.raw", 6 * MIB);
        let (base, top) = (format!("base.{format}"), format!("top.{format}"));
        place.run(&["convert", "disk.raw", &base]).must_end_with(0);
        place.run(&["create", &top, "--parent", &base]).must_end_with(0);
        let list = place.run(&["chain", "list", &top, "--json"]).must_end_with(0).summary();
        assert_eq!(list["layers"].as_array().unwrap().len(), 2, "{list}");
        assert_eq!(list["complete"], true, "{list}");
        // What the child shall hold: written in place, through vmtide.
        must(&place, "qemu-io", &["-f", "raw", "-c", "write -P 66 2M 1M", "disk.raw"]);
        let in_place = ["convert", "disk.raw", &top, "--in-place", "--json"];
        let written = place.run(&in_place).must_end_with(0).summary()["written_bytes"].clone();
        assert!((MIB as u64..2 * MIB as u64).contains(&written.as_u64().unwrap()), "{written}");
        place.run(&["compare", "disk.raw", &top]).must_end_with(0);
        place.run(&["compare", "disk.raw", &base]).must_end_with(1);
        // A parent that moved is found again, or named anew.
        std::fs::create_dir(place.path("moved")).unwrap();
        std::fs::rename(place.path(&base), place.path("moved").join(&base)).unwrap();
        place.run(&["chain", "list", &top]).must_end_with(3);
        let moved = format!("moved/{base}");
        let relink = ["chain", "rebase", &top, "--parent", &moved, "--relink-only"];
        place.run(&relink).must_end_with(0);
        place
            .run(&["compare", "disk.raw", &top, "--search", "moved", "--backing", "allow"])
            .must_end_with(0);
        let merge = [
            "snapshot-chain",
            "commit",
            &top,
            "--search",
            "moved",
            "--backing",
            "allow",
            "--delete",
        ];
        let run = place.run(&merge).must_end_with(0);
        assert!(run.stdout.contains("merged into"), "{}", run.stdout);
        assert!(!place.path(&top).exists());
        place.run(&["compare", "disk.raw", &moved]).must_end_with(0);
    }
}

#[test]
fn an_image_is_made_independent_of_its_parents() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 4 * MIB);
    place.run(&["convert", "disk.raw", "base.qcow2"]).must_end_with(0);
    place.run(&["create", "top.qcow2", "--parent", "base.qcow2"]).must_end_with(0);
    place.run(&["chain", "rebase", "top.qcow2"]).must_end_with(2);
    place.run(&["chain", "rebase", "top.qcow2", "--no-parent"]).must_end_with(0);
    std::fs::remove_file(place.path("base.qcow2")).unwrap();
    must_equal(&place, ("disk.raw", "raw"), ("top.qcow2", "qcow2"));
    let run = place.run(&["chain", "commit", "top.qcow2"]).must_end_with(1);
    one_clear_line(&run, "no parent");
}

#[test]
fn an_image_that_others_read_through_is_not_changed_unasked() {
    let place = Place::new();
    std::fs::write(place.path("disk.raw"), vec![3; MIB]).unwrap();
    must(&place, "qemu-img", &["create", "-q", "-f", "qcow2", "base.qcow2", "1M"]);
    for (parent, child) in [("base.qcow2", "mid.qcow2"), ("mid.qcow2", "top.qcow2")] {
        must(
            &place,
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-b", parent, "-F", "qcow2", child],
        );
    }
    let before = std::fs::read(place.path("base.qcow2")).unwrap();
    let in_place = ["convert", "disk.raw", "base.qcow2", "--in-place"];
    one_clear_line(&place.run(&in_place).must_end_with(1), "mid.qcow2");
    let serve = ["serve", "base.qcow2", "--writable", "--nbd", "unix:served.sock"];
    one_clear_line(&place.run(&serve).must_end_with(1), "mid.qcow2");
    // Merging it away would leave the one above without its parent.
    let merge = ["chain", "commit", "mid.qcow2", "--delete"];
    one_clear_line(&place.run(&merge).must_end_with(1), "top.qcow2");
    assert!(place.path("mid.qcow2").exists());
    assert!(std::fs::read(place.path("base.qcow2")).unwrap() == before);
    // The last of the chain is nobody's parent, and who insists may.
    place.run(&["convert", "disk.raw", "top.qcow2", "--in-place"]).must_end_with(0);
    place.run(&["convert", "disk.raw", "base.qcow2", "--in-place", "--force"]).must_end_with(0);
    must_equal(&place, ("disk.raw", "raw"), ("base.qcow2", "qcow2"));
}
