//! `vmtide convert`, with qemu-img as an independent judge.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "helpers of tests: a failed unwrap is a failed test"
)]

use crate::common;

use common::Place;
use common::disks::{
    MIB, must, must_equal, names, one_clear_line, qemu_nbd, qemu_nbd_with, sparse_disk,
};

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
fn only_what_replaces_something_is_waited_for_unless_told() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 3 * MIB);
    for (format, qemu) in [("raw", "raw"), ("qcow2", "qcow2"), ("vhdx", "vhdx"), ("vmdk", "vmdk")] {
        let target = format!("out.{format}");
        for (options, durable) in [
            (&[][..], false),
            (&["--overwrite"], true),
            (&["--overwrite", "--no-sync"], false),
            (&["--overwrite", "--sync"], true),
            (&["--in-place"], true),
        ] {
            let arguments = [&["convert", "disk.raw", &target, "--json"][..], options].concat();
            let found = place.run(&arguments).must_end_with(0).summary();
            assert_eq!(found["durable"], durable, "{arguments:?}");
            must_equal(&place, ("disk.raw", "raw"), (&target, qemu));
        }
    }
    let found = place.run(&["convert", "disk.raw", "new.raw", "--sync", "--json"]);
    assert_eq!(found.must_end_with(0).summary()["durable"], true);
    place.run(&["convert", "disk.raw", "x.raw", "--sync", "--no-sync"]).must_end_with(2);
}

#[test]
fn the_compression_is_chosen() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 3 * MIB);
    for name in ["zlib", "zstd"] {
        let target = format!("{name}.qcow2");
        place.run(&["convert", "disk.raw", &target, "--compression", name]).must_end_with(0);
        must_equal(&place, ("disk.raw", "raw"), (&target, "qcow2"));
        let found = must(&place, "qemu-img", &["info", "--output=json", &target]);
        let found: serde_json::Value = serde_json::from_str(&found).unwrap();
        assert_eq!(found["format-specific"]["data"]["compression-type"], name);
    }
    for (target, code) in [("x.vmdk", 1), ("x.raw", 1), ("x.vhdx", 1)] {
        let run = place.run(&["convert", "disk.raw", target, "--compression", "zstd"]);
        one_clear_line(&run.must_end_with(code), "zstd");
    }
    place.run(&["convert", "disk.raw", "x.qcow2", "--compression", "lzma"]).must_end_with(2);
}
