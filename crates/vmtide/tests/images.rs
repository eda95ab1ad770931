//! The commands that look at images and make them, with qemu-img as an independent judge.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "helpers of tests: a failed unwrap is a failed test"
)]

use crate::common;

use common::disks::{MIB, must, must_equal, names, one_clear_line, sparse_disk};
use common::{Place, finish};
use serde_json::Value;

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

#[test]
fn a_parent_whose_format_the_child_does_not_say_is_backed_up_where_the_user_says_it() {
    let place = Place::with_repository();
    sparse_disk(&place, "disk.raw", 2 * MIB);
    must(&place, "qemu-img", &["convert", "-O", "qcow2", "disk.raw", "base.qcow2"]);
    place.run(&["create", "top.qcow2", "--parent", "base.qcow2"]).must_end_with(0);
    let mut bytes = std::fs::read(place.path("top.qcow2")).unwrap();
    // The extension that says the format becomes one that nobody knows.
    let at = bytes.windows(4).position(|word| word == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    bytes[at..at + 4].copy_from_slice(&[0x11, 0x22, 0x33, 0x44]);
    std::fs::write(place.path("top.qcow2"), bytes).unwrap();
    std::fs::create_dir(place.path("moved")).unwrap();
    std::fs::rename(place.path("base.qcow2"), place.path("moved/base.qcow2")).unwrap();
    let run = place.run(&["backup", "top.qcow2"]).must_end_with(6);
    one_clear_line(&run, "--search DIR");
    let run = place.run(&["backup", "top.qcow2", "--search", "moved"]).must_end_with(1);
    one_clear_line(&run, "give the format");
    let options = ["backup", "top.qcow2", "--search", "moved", "--backing-format", "qcow2"];
    place.run(&options).must_end_with(0);
    place.run(&["restore", "top", "--to", "back.raw"]).must_end_with(0);
    must_equal(&place, ("disk.raw", "raw"), ("back.raw", "raw"));
}

#[test]
fn disks_get_another_size_and_keep_what_they_hold() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 3 * MIB);
    std::fs::copy(place.path("disk.raw"), place.path("grown.raw")).unwrap();
    let grown = std::fs::File::options().write(true).open(place.path("grown.raw")).unwrap();
    grown.set_len(7 << 20).unwrap();
    for (name, qemu) in
        [("a.qcow2", "qcow2"), ("a.vhdx", "vhdx"), ("a.vhd", "vpc"), ("a.img", "raw")]
    {
        place.run(&["convert", "disk.raw", name]).must_end_with(0);
        let run = place.run(&["resize", name, "7MiB", "--json"]).must_end_with(0).summary();
        assert_eq!(
            (&run["old_size_bytes"], &run["size_bytes"]),
            (&(3 * MIB).into(), &(7 * MIB).into())
        );
        must_equal(&place, (name, qemu), ("grown.raw", "raw"));
        place.run(&["check", name]).must_end_with(0);
        let run = place.run(&["resize", name, "3M"]).must_end_with(1);
        one_clear_line(&run, "--shrink");
        must_equal(&place, (name, qemu), ("grown.raw", "raw"));
    }
    for (name, qemu) in [("a.vhdx", "vhdx"), ("a.img", "raw")] {
        place.run(&["resize", name, "3M", "--shrink"]).must_end_with(0);
        must_equal(&place, (name, qemu), ("disk.raw", "raw"));
    }
    for name in ["a.qcow2", "a.vhd"] {
        one_clear_line(&place.run(&["resize", name, "3M", "--shrink"]).must_end_with(1), name);
    }
    place.run(&["convert", "disk.raw", "a.vmdk"]).must_end_with(0);
    one_clear_line(&place.run(&["resize", "a.vmdk", "7M"]).must_end_with(1), "a.vmdk");
    place.run(&["create", "child.qcow2", "--parent", "a.qcow2"]).must_end_with(0);
    one_clear_line(&place.run(&["resize", "a.qcow2", "9M"]).must_end_with(1), "child.qcow2");
    one_clear_line(&place.run(&["resize", "none.qcow2", "9M"]).must_end_with(6), "none.qcow2");
    place.run(&["resize", "a.qcow2", "9X"]).must_end_with(2);
}
