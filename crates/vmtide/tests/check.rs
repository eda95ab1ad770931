//! `vmtide check` of every format: what is right, what is damaged, and what can be repaired, with
//! qemu-img as an independent judge of the result.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "helpers of tests: a failed unwrap is a failed test"
)]

use crate::common;

use common::Place;
use common::disks::{MIB, must, must_equal, one_clear_line, sparse_disk};
use serde_json::Value;

/// Format and subformat of vmtide, format of qemu-img.
const KINDS: [(&str, &str, &str); 9] = [
    ("qcow2", "", "qcow2"),
    ("vhdx", "dynamic", "vhdx"),
    ("vhdx", "fixed", "vhdx"),
    ("vhd", "dynamic", "vpc"),
    ("vhd", "fixed", "vpc"),
    ("vmdk", "monolithicSparse", "vmdk"),
    ("vmdk", "monolithicFlat", "vmdk"),
    ("vmdk", "twoGbMaxExtentSparse", "vmdk"),
    ("vmdk", "streamOptimized", "vmdk"),
];

fn made(place: &Place, format: &str, subformat: &str) -> String {
    let image = format!("{subformat}disk.{format}");
    let mut arguments = vec!["convert", "disk.raw", &image];
    if !subformat.is_empty() {
        arguments.extend(["--subformat", subformat]);
    }
    place.run(&arguments).must_end_with(0);
    image
}

fn change(place: &Place, image: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(place.path(image)).unwrap();
    change(&mut bytes);
    std::fs::write(place.path(image), bytes).unwrap();
}

fn be(bytes: &[u8], at: usize) -> usize {
    bytes[at..at + 8].iter().fold(0, |value, byte| value << 8 | usize::from(*byte))
}

fn le(bytes: &[u8], at: usize, length: usize) -> usize {
    bytes[at..at + length].iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte))
}

/// What a check says, which must end with this code.
fn check(place: &Place, image: &str, options: &[&str], code: i32) -> Value {
    let arguments = [&["check", image, "--json"][..], options].concat();
    place.run(&arguments).must_end_with(code).summary()
}

/// Damage is found, repaired, and gone; the disk is what it was.
fn must_be_repaired(place: &Place, image: &str, format: &str, word: &str, code: i32) {
    let found = check(place, image, &[], code);
    let problems = found["problems"].to_string();
    assert!(problems.contains(word), "{image}: {word}: {problems}");
    let repaired = check(place, image, &["--repair"], 0);
    assert!(repaired["repair"]["repaired"].as_u64().unwrap() > 0, "{image}: {repaired}");
    let again = check(place, image, &[], 0);
    assert_eq!(again["problems"], serde_json::json!([]), "{again}");
    must_equal(place, ("disk.raw", "raw"), (image, format));
}

#[test]
fn what_is_right_is_found_right_and_repairing_changes_nothing() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 3 * MIB);
    for (format, subformat, qemu) in KINDS {
        let image = made(&place, format, subformat);
        let before = std::fs::read(place.path(&image)).unwrap();
        let found = check(&place, &image, &[], 0);
        assert_eq!((&found["errors"], &found["leaks"]), (&0.into(), &0.into()), "{found}");
        assert_eq!(found["size_bytes"], 3 * MIB, "{found}");
        let text = place.run(&["check", &image]).must_end_with(0).stdout;
        assert!(text.contains("no errors"), "{text}");
        check(&place, &image, &["--repair"], 0);
        assert!(std::fs::read(place.path(&image)).unwrap() == before, "{image} was changed");
        must_equal(&place, ("disk.raw", "raw"), (&image, qemu));
    }
}

#[test]
fn qcow2_reference_counts_are_repaired() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 3 * MIB);
    let image = made(&place, "qcow2", "");
    // The first block of reference counts: the header's is wrong, and one cluster of data has none.
    change(&place, &image, |bytes| {
        let table = be(bytes, 48);
        let block = be(bytes, table);
        let used = (0..32768).rev().find(|at| bytes[block + at * 2 + 1] == 1).unwrap();
        bytes[block + used * 2 + 1] = 0;
    });
    must_be_repaired(&place, &image, "qcow2", "reference count", 5);
    // Space that nothing uses is waste, and no damage.
    change(&place, &image, |bytes| {
        let table = be(bytes, 48);
        let block = be(bytes, table);
        let free = (0..32768).find(|at| bytes[block + at * 2 + 1] == 0).unwrap();
        bytes[block + free * 2 + 1] = 1;
        bytes.resize(bytes.len().max((free + 1) << 16), 0);
    });
    let found = check(&place, &image, &[], 3);
    assert_eq!((&found["errors"], &found["leaks"]), (&0.into(), &1.into()), "{found}");
    check(&place, &image, &["--repair=leaks"], 0);
    must(&place, "qemu-img", &["check", "-q", &image]);
    must_equal(&place, ("disk.raw", "raw"), (&image, "qcow2"));
}

#[test]
fn vhdx_headers_and_tables_are_repaired() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 3 * MIB);
    let image = made(&place, "vhdx", "dynamic");
    for (at, word) in [
        (0x10008, "header"),
        (0x20008, "header"),
        (0x30010, "region table"),
        (0x40010, "region table"),
    ] {
        change(&place, &image, |bytes| bytes[at] ^= 0x55);
        // The other copy is used: nothing is lost yet.
        must_be_repaired(&place, &image, "vhdx", word, 0);
    }
    // A block outside the file is lost: nothing can be guessed.
    change(&place, &image, |bytes| {
        let regions = 0x30010;
        let bat = (0..2)
            .map(|entry| regions + entry * 32)
            .find(|at| bytes[*at..*at + 4] == [0x66, 0x77, 0xc2, 0x2d]);
        let table = le(bytes, bat.unwrap() + 16, 8);
        bytes[table + 7] = 0x7f;
    });
    let found = check(&place, &image, &[], 5);
    assert!(found["problems"].to_string().contains("BAT entry 0"), "{found}");
    check(&place, &image, &["--repair"], 5);
    let run = place.run(&["convert", &image, "x.raw"]).must_end_with(5);
    one_clear_line(&run, "BAT entry 0");
}

#[test]
fn vhd_footers_are_repaired() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 3 * MIB);
    let image = made(&place, "vhd", "dynamic");
    change(&place, &image, |bytes| {
        let end = bytes.len() - 512;
        bytes[end..].fill(0);
    });
    must_be_repaired(&place, &image, "vpc", "footer", 5);
    change(&place, &image, |bytes| bytes[100] ^= 1);
    must_be_repaired(&place, &image, "vpc", "footer", 5);
    // The only footer of a fixed disk cannot be guessed.
    let image = made(&place, "vhd", "fixed");
    change(&place, &image, |bytes| {
        let at = bytes.len() - 500;
        bytes[at] ^= 1;
    });
    let run = place.run(&["check", &image, "--format", "vhd", "--repair"]).must_end_with(5);
    one_clear_line(&run, "footer");
}

#[test]
fn vmdk_tables_are_repaired_from_their_copies() {
    let place = Place::new();
    sparse_disk(&place, "disk.raw", 3 * MIB);
    for (subformat, file) in
        [("monolithicSparse", ""), ("twoGbMaxExtentSparse", "twoGbMaxExtentSparsedisk-s001.vmdk")]
    {
        let image = made(&place, "vmdk", subformat);
        let file = if file.is_empty() { image.as_str() } else { file };
        // The second copy of the first table.
        change(&place, file, |bytes| {
            let directory = le(bytes, 48, 8) * 512;
            let table = le(bytes, directory, 4) * 512;
            bytes[table..table + 64].fill(0xee);
        });
        must_be_repaired(&place, &image, "vmdk", "table", 0);
    }
    let image = made(&place, "vmdk", "streamOptimized");
    change(&place, &image, |bytes| bytes.truncate(bytes.len() * 2 / 3));
    let run = place.run(&["check", &image]);
    assert_eq!(run.code, 5, "{} {}", run.stdout, run.stderr);
}
