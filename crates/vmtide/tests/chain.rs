//! `vmtide check` and `vmtide chain`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "helpers of tests: a failed unwrap is a failed test"
)]

use crate::common;

use common::Place;
use common::disks::{MIB, must, must_equal, one_clear_line, sparse_disk};

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
    let replace = ["convert", "disk.raw", "base.qcow2", "--overwrite"];
    one_clear_line(&place.run(&replace).must_end_with(1), "mid.qcow2");
    let create = ["create", "base.qcow2", "1M", "--overwrite"];
    one_clear_line(&place.run(&create).must_end_with(1), "mid.qcow2");
    assert!(std::fs::read(place.path("base.qcow2")).unwrap() == before);
    // The last of the chain is nobody's parent, and who insists may.
    place.run(&["convert", "disk.raw", "top.qcow2", "--in-place"]).must_end_with(0);
    place.run(&["convert", "disk.raw", "base.qcow2", "--in-place", "--force"]).must_end_with(0);
    must_equal(&place, ("disk.raw", "raw"), ("base.qcow2", "qcow2"));
    place.run(&["convert", "disk.raw", "base.qcow2", "--overwrite", "--force"]).must_end_with(0);
    place.run(&["create", "base.qcow2", "1M", "--overwrite", "--force"]).must_end_with(0);
}
