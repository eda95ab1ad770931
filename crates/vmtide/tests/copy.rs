//! Copying restore points between repositories through the command line.

use crate::common;

use common::{Place, Run, files_below, finish};

const MIB: usize = 1 << 20;

/// A repository with a restore point of `web`, and an empty one under `other` with another password.
fn two_repositories() -> Place {
    let place = Place::with_repository();
    place.image("web.raw", 2 * MIB);
    place.run(&["backup", "web.raw", "--tag", "class=gold"]).must_end_with(0);
    finish(place.command(&["init", "other"]).env("VMTIDE_PASSWORD", "another")).must_end_with(0);
    std::fs::write(place.path("other.password"), "another\n").unwrap_or_default();
    place
}

fn copy(place: &Place, arguments: &[&str]) -> Run {
    let options = ["copy", "--to", "other", "--to-password-file", "other.password", "--json"];
    place.run(&[&options[..], arguments].concat())
}

fn other(place: &Place, arguments: &[&str]) -> Run {
    let arguments = [arguments, &["-r", "other"]].concat();
    finish(place.command(&arguments).env("VMTIDE_PASSWORD", "another"))
}

fn counts(run: &Run) -> (usize, usize, usize) {
    let summary = run.summary();
    let count = |what: &str| summary[what].as_array().map_or(99, Vec::len);
    (count("copied"), count("present"), count("failed"))
}

#[test]
fn points_are_copied_with_both_passwords_and_restored_from_the_copy() {
    let place = two_repositories();
    let image = std::fs::read(place.path("web.raw")).unwrap_or_default();
    assert_eq!(counts(&copy(&place, &["--all", "--dry-run"]).must_end_with(0)), (1, 0, 0));
    assert_eq!(counts(&copy(&place, &["--all"]).must_end_with(0)), (1, 0, 0));
    let mut changed = image.clone();
    changed[MIB..MIB + 4096].fill(9);
    std::fs::write(place.path("web.raw"), &changed).unwrap_or_default();
    place.run(&["backup", "web.raw", "--tag", "class=tin"]).must_end_with(0);
    let run = copy(&place, &["--vm", "w*"]).must_end_with(0);
    assert_eq!(counts(&run), (1, 1, 0));
    let read = run.summary()["copied"][0]["disks"][0]["read_bytes"].as_u64();
    assert!(read.is_some_and(|read| read <= 512 << 10), "{:?}", run.summary());
    assert_eq!(counts(&copy(&place, &["--tag", "class=gold"]).must_end_with(0)), (0, 1, 0));
    assert_eq!(counts(&copy(&place, &["web@latest"]).must_end_with(0)), (0, 1, 0));

    other(&place, &["restore", "web@latest", "--to", "new.raw"]).must_end_with(0);
    assert!(std::fs::read(place.path("new.raw")).is_ok_and(|bytes| bytes == changed));
    let points = other(&place, &["points", "--json"]).must_end_with(0).summary();
    let here = place.run(&["points", "--json"]).must_end_with(0).summary();
    assert_eq!(points["points"][0]["time"], here["points"][0]["time"]);
    assert_eq!(points["points"][0]["tags"]["class"], "gold");
    assert_eq!(points["points"][0]["origin"]["point"], here["points"][0]["id"]);
    assert_ne!(points["points"][0]["id"], here["points"][0]["id"]);
    let shown = other(&place, &["points"]).must_end_with(0).stdout;
    assert!(shown.contains("web"), "{shown}");
    other(&place, &["verify", "--read-data"]).must_end_with(0);
    // A backup into the copy goes on from there.
    let run = other(&place, &["backup", "web.raw", "--json"]);
    assert!([0, 3].contains(&run.code), "{}", run.stderr);
    // Nothing changed: at most the chunk around the changed block is cut in another way.
    let new = run.summary()["disks"][0]["new_bytes"].as_u64();
    assert!(new.is_some_and(|new| new <= 256 << 10), "{:?}", run.summary());
}

#[test]
fn what_cannot_be_copied_is_refused_with_its_exit_code() {
    let place = two_repositories();
    copy(&place, &[]).must_end_with(2);
    copy(&place, &["web", "--all"]).must_end_with(2);
    copy(&place, &["db"]).must_end_with(6);
    copy(&place, &["--vm", "db"]).must_end_with(6);
    place.run(&["copy", "--all"]).must_end_with(2);
    place.run(&["copy", "--all", "--to", "nowhere"]).must_end_with(6);
    let run = place.run(&["copy", "--all", "--to", "other"]).must_end_with(2);
    assert!(run.stderr.contains("VMTIDE_TO_PASSWORD"), "{}", run.stderr);
    let mut wrong = place.command(&["copy", "--all", "--to", "other"]);
    finish(wrong.env("VMTIDE_TO_PASSWORD", "wrong")).must_end_with(4);
    let own = place.text("repository");
    let mut same = place.command(&["copy", "--all", "--to", &own]);
    let same = finish(same.env("VMTIDE_TO_PASSWORD", common::PASSWORD)).must_end_with(2);
    assert!(same.stderr.contains("same repository"), "{}", same.stderr);
    assert_eq!(
        other(&place, &["points", "--json"]).summary()["points"].as_array().map(Vec::len),
        Some(0)
    );
}

#[test]
fn a_damaged_point_is_5_and_nothing_of_it_is_there() {
    let place = two_repositories();
    let pack = files_below(&place.repository().join("packs")).remove(0);
    let mut bytes = std::fs::read(&pack).unwrap_or_default();
    bytes[1000] ^= 1;
    std::fs::remove_file(&pack).unwrap_or_default();
    std::fs::write(&pack, bytes).unwrap_or_default();
    let run = copy(&place, &["--all"]).must_end_with(5);
    assert_eq!(counts(&run), (0, 0, 1));
    assert!(run.summary()["failed"][0]["error"].to_string().contains("packs/"));
    let points = other(&place, &["points", "--json"]).must_end_with(0).summary();
    assert_eq!(points["points"].as_array().map(Vec::len), Some(0));
}
