//! `vmtide delta`, from making to applying.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test, in helpers of tests, too"
)]

use crate::common;

use common::{Place, finish};
use std::path::Path;

const DISK_BYTES: usize = 6 << 20;

/// Three states of a disk: `old.raw`, `new.raw`, `newest.raw`.
fn disks(place: &Place) {
    let old = std::fs::read(place.image("old.raw", DISK_BYTES)).unwrap();
    let mut new = old.clone();
    new[70_000..90_000].fill(9);
    new[1 << 20..2 << 20].fill(0);
    new[(5 << 20) + 17] = 1;
    let mut newest = new.clone();
    newest[80_000..500_000].fill(3);
    newest[(5 << 20) + 17] = 0;
    newest[(1 << 20) + 5000] = 77;
    for (name, bytes) in [("new.raw", new), ("newest.raw", newest)] {
        std::fs::write(place.path(name), bytes).unwrap();
    }
}

fn make(place: &Place, from: &str, to: &str, delta: &str) {
    let ids = ["--base-id", from, "--new-id", to];
    let arguments = ["delta", "create", to, "--base", from, "-o", delta, "--json"];
    let summary = place.run(&[&arguments[..], &ids].concat()).must_end_with(0).summary();
    assert_eq!(summary["base_id"], from);
    assert_eq!(summary["path"], delta);
}

fn note(place: &Place, image: &str) -> Option<String> {
    std::fs::read_to_string(place.path(&format!("{image}.vmtide-delta"))).ok()
}

#[test]
fn a_chain_of_deltas_goes_onto_images_of_every_format() {
    let place = Place::new();
    disks(&place);
    make(&place, "old.raw", "new.raw", "a.delta");
    make(&place, "new.raw", "newest.raw", "b.delta");
    place.run(&["delta", "info", "a.delta", "--verify"]).must_end_with(0);
    place.run(&["delta", "merge", "b.delta", "a.delta", "-o", "x.delta"]).must_end_with(1);
    place.run(&["delta", "merge", "a.delta", "b.delta", "-o", "ab.delta"]).must_end_with(0);
    assert!(!place.path("x.delta").exists());
    for name in ["disk.raw", "disk.vhdx", "disk.vhd", "disk.vmdk", "disk.qcow2"] {
        place.run(&["convert", "old.raw", name]).must_end_with(0);
        // The second one does not fit yet.
        let early = place.run(&["delta", "apply", "b.delta", name]).must_end_with(1);
        assert!(early.stderr.contains("something else than the delta's base"), "{}", early.stderr);
        place.run(&["compare", name, "old.raw"]).must_end_with(0);
        for (delta, state) in [("a.delta", "new.raw"), ("b.delta", "newest.raw")] {
            place.run(&["delta", "apply", delta, name]).must_end_with(0);
            place.run(&["compare", name, state]).must_end_with(0);
            place.run(&["check", name]).must_end_with(0);
            assert!(note(&place, name).unwrap().contains(state));
        }
        // It is known to be at another moment than where these begin.
        let late = place.run(&["delta", "apply", "ab.delta", name]).must_end_with(1);
        assert!(late.stderr.contains("newest.raw"), "{}", late.stderr);
        place.run(&["convert", "old.raw", name, "--overwrite"]).must_end_with(0);
        place.run(&["delta", "apply", "ab.delta", name]).must_end_with(0);
        place.run(&["compare", name, "newest.raw"]).must_end_with(0);
    }
}

#[test]
fn changed_ranges_and_pipes() {
    let place = Place::new();
    disks(&place);
    std::fs::write(
        place.path("changes.json"),
        r#"[{"offset":1048576,"length":1048576},{"offset":70000,"length":20000},{"offset":5242880,"length":512}]"#,
    )
    .unwrap();
    let create = ["delta", "create", "new.raw", "--changes", "changes.json"];
    let piped = place.command(&[&create[..], &["-o", "-"]].concat()).output().unwrap();
    assert!(piped.status.success());
    place.run(&["convert", "old.raw", "disk.vhdx"]).must_end_with(0);
    let applied = finish(
        place
            .command(&["delta", "apply", "-", "disk.vhdx", "--json"])
            .write_stdin(&piped.stdout[..]),
    )
    .must_end_with(0)
    .summary();
    assert_eq!(applied["target"], "disk.vhdx");
    place.run(&["compare", "disk.vhdx", "new.raw"]).must_end_with(0);
    assert_eq!(note(&place, "disk.vhdx"), None, "a moment without a name leaves no note");

    // One that is torn leaves the target and nothing else.
    place.run(&["convert", "old.raw", "torn.vhdx"]).must_end_with(0);
    let before = std::fs::read(place.path("torn.vhdx")).unwrap();
    let torn = &piped.stdout[..piped.stdout.len() - 1];
    let files = || std::fs::read_dir(place.directory.path()).unwrap().count();
    let count = files();
    finish(place.command(&["delta", "apply", "-", "torn.vhdx"]).write_stdin(torn)).must_end_with(5);
    assert!(std::fs::read(place.path("torn.vhdx")).unwrap() == before);
    let child = ["delta", "apply", "-", "torn.vhdx", "--child", "child.vhdx"];
    finish(place.command(&child).write_stdin(torn)).must_end_with(5);
    assert_eq!(files(), count, "nothing is left behind");

    let usage = place.run(&["delta", "create", "new.raw", "-o", "x"]).must_end_with(2);
    assert!(usage.stderr.contains("--changes"), "{}", usage.stderr);
    place
        .run(&["delta", "create", "new.raw", "--base", "old.raw", "-o", "-", "--json"])
        .must_end_with(2);
}

#[test]
fn a_child_gets_the_changes_and_its_parent_stays() {
    let place = Place::new();
    disks(&place);
    make(&place, "old.raw", "new.raw", "a.delta");
    for format in ["vhdx", "qcow2", "vhd", "vmdk"] {
        let (parent, child) = (format!("parent.{format}"), format!("child.{format}"));
        place.run(&["convert", "old.raw", &parent]).must_end_with(0);
        place.run(&["delta", "apply", "a.delta", &parent, "--child", &child]).must_end_with(0);
        place.run(&["compare", &parent, "old.raw"]).must_end_with(0);
        place.run(&["compare", &child, "new.raw"]).must_end_with(0);
        assert!(note(&place, &child).is_some() && note(&place, &parent).is_none());
        // A delta onto the parent would break the child.
        let refused = place.run(&["delta", "apply", "a.delta", &parent]).must_end_with(1);
        assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    }
}

#[test]
fn an_interrupted_application_says_so_and_is_made_right_by_the_same_delta() {
    let place = Place::with_repository();
    disks(&place);
    make(&place, "old.raw", "new.raw", "a.delta");
    make(&place, "old.raw", "newest.raw", "other.delta");
    let digest = |delta: &str| {
        let summary = place.run(&["delta", "info", delta, "--json"]).must_end_with(0).summary();
        summary["digest"].as_str().unwrap().to_owned()
    };
    // As a process that was killed leaves it: the note, and half of the changes.
    place.run(&["convert", "old.raw", "disk.vhdx"]).must_end_with(0);
    let half = serde_json::json!({
        "state": "incomplete", "delta": digest("a.delta"), "size_bytes": DISK_BYTES,
    });
    std::fs::write(place.path("disk.vhdx.vmtide-delta"), half.to_string()).unwrap();
    let refused = place.run(&["compare", "disk.vhdx", "old.raw"]).must_end_with(1);
    assert!(refused.stderr.contains("incomplete"), "{}", refused.stderr);
    place.run(&["convert", "disk.vhdx", "copy.raw"]).must_end_with(1);
    for command in
        [&["backup", "disk.vhdx"][..], &["serve", "disk.vhdx", "--nbd", "unix:s", "--writable"]]
    {
        let refused = place.run(command).must_end_with(1);
        assert!(refused.stderr.contains("incomplete"), "{}", refused.stderr);
    }
    let other = place.run(&["delta", "apply", "other.delta", "disk.vhdx"]).must_end_with(1);
    assert!(other.stderr.contains("another delta"), "{}", other.stderr);
    let arguments = ["delta", "apply", "a.delta", "disk.vhdx", "--json"];
    let done = place.run(&arguments).must_end_with(0).summary();
    assert_eq!(done["resumed"], true);
    place.run(&["compare", "disk.vhdx", "new.raw"]).must_end_with(0);
    // One that is written anew as a whole is complete, whatever was before.
    for option in ["--overwrite", "--in-place"] {
        std::fs::write(place.path("disk.vhdx.vmtide-delta"), half.to_string()).unwrap();
        place.run(&["convert", "old.raw", "disk.vhdx", option]).must_end_with(0);
        place.run(&["compare", "disk.vhdx", "old.raw"]).must_end_with(0);
    }
}

#[test]
fn two_restore_points_give_a_delta() {
    let place = Place::with_repository();
    disks(&place);
    let backup = |disk: &str| {
        let arguments = ["backup", disk, "--name", "web", "--json"];
        place.run(&arguments).must_end_with(0).summary()["point"].as_str().unwrap().to_owned()
    };
    let (old, new) = (backup("old.raw"), backup("new.raw"));
    let points = format!("{old}..{new}");
    let create = ["delta", "create", &points, "-o", "a.delta", "--base-digest", "whole", "--json"];
    let made = place.run(&create).must_end_with(0).summary();
    assert_eq!(made["vm"], "web");
    assert!(made["base_id"].as_str().unwrap().starts_with(&old), "{made}");
    assert!(made["base_fingerprint"].is_string(), "{made}");
    let changed = ["data_bytes", "zero_bytes", "unallocated_bytes"];
    let changed: u64 = changed.iter().map(|key| made[key].as_u64().unwrap()).sum();
    assert!(changed < 1_100_000, "{made}");
    place.run(&["convert", "old.raw", "disk.qcow2"]).must_end_with(0);
    // A byte outside of the changed ranges: only the fingerprint can tell.
    let mut altered = std::fs::read(place.path("old.raw")).unwrap();
    altered[3 << 19] ^= 1;
    std::fs::write(place.path("altered.raw"), altered).unwrap();
    let refused = place.run(&["delta", "apply", "a.delta", "altered.raw"]).must_end_with(1);
    assert!(
        refused.stderr.contains("cannot") || refused.stderr.contains("not that of"),
        "{}",
        refused.stderr
    );
    place.run(&["delta", "apply", "a.delta", "disk.qcow2"]).must_end_with(0);
    place.run(&["compare", "disk.qcow2", "new.raw"]).must_end_with(0);
}

#[test]
fn a_disk_that_grew_and_one_that_shrank() {
    let place = Place::new();
    disks(&place);
    let mut grown = std::fs::read(place.path("new.raw")).unwrap();
    grown.resize(DISK_BYTES + (3 << 20), 0);
    grown[DISK_BYTES + (1 << 20)..DISK_BYTES + (2 << 20)].fill(4);
    std::fs::write(place.path("grown.raw"), grown).unwrap();
    make(&place, "old.raw", "grown.raw", "grow.delta");
    make(&place, "grown.raw", "new.raw", "shrink.delta");
    for (name, shrinks) in [("disk.raw", true), ("disk.vhdx", true), ("disk.qcow2", false)] {
        place.run(&["convert", "old.raw", name]).must_end_with(0);
        place.run(&["delta", "apply", "grow.delta", name]).must_end_with(0);
        place.run(&["compare", "--strict", name, "grown.raw"]).must_end_with(0);
        if shrinks {
            place.run(&["delta", "apply", "shrink.delta", name]).must_end_with(0);
            place.run(&["compare", "--strict", name, "new.raw"]).must_end_with(0);
        }
    }
    let damaged = place.path("grow.delta");
    let mut bytes = std::fs::read(&damaged).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    place.run(&["delta", "info", "grow.delta", "--verify"]).must_end_with(5);
    assert!(Path::new(&damaged).exists());
}
