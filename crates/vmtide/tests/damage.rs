//! Damage from the command line: found, listed, survived, healed; and what changes in place.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

use crate::common;

use common::{Place, files_below, finish};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

/// Bytes that neither repeat nor compress.
fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..bytes.div_ceil(8)).flat_map(|_| next()).take(bytes).collect()
}

/// A disk with one partition, full of data.
fn partitioned(place: &Place, name: &str) -> Vec<u8> {
    let path = place.path(name);
    std::fs::File::create(&path).unwrap().set_len(8 * MIB as u64).unwrap();
    let mut child = Command::new("sfdisk")
        .arg("--quiet")
        .arg(&path)
        .stdin(Stdio::piped())
        .spawn()
        .expect("sfdisk is needed: install fdisk (scripts/test.sh does)");
    let script = b"label: gpt\nstart=1MiB, size=6MiB, type=L, name=root\n";
    child.stdin.take().unwrap().write_all(script).unwrap();
    assert!(child.wait().unwrap().success());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[MIB..7 * MIB].copy_from_slice(&noise(6 * MIB, 1));
    std::fs::write(&path, &bytes).unwrap();
    bytes
}

fn packs(place: &Place) -> Vec<PathBuf> {
    files_below(&place.repository().join("packs"))
}

/// Flips a bit in the middle of a file.
fn flip(path: &PathBuf) {
    let mut permissions = std::fs::metadata(path).unwrap().permissions();
    #[allow(clippy::permissions_set_readonly_false, reason = "a file of this test")]
    permissions.set_readonly(false);
    std::fs::set_permissions(path, permissions).unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

/// The partitions of `--json` cover the ranges of the damage, to the byte.
fn lies_in_the_partition(summary: &serde_json::Value) {
    let (mib, damage) = (MIB as u64, summary["damage"].as_array().unwrap());
    let mut inside = 0;
    for place in damage.iter().flat_map(|damage| damage["places"].as_array().unwrap()) {
        let (mut within, mut all) = (0, 0);
        for range in place["ranges"].as_array().unwrap() {
            let number = |name: &str| range[name].as_u64().unwrap();
            let (offset, end) = (number("offset"), number("offset") + number("length"));
            within += end.min(7 * mib).saturating_sub(offset.max(mib));
            all += end - offset;
        }
        let part = &place["partitions"][0];
        assert_eq!(
            (&part["number"], &part["name"], &part["kind"]),
            (&1.into(), &"root".into(), &"Linux".into()),
            "{place}"
        );
        assert_eq!(
            (&part["range"]["offset"], &part["range"]["length"]),
            (&mib.into(), &(6 * mib).into())
        );
        assert_eq!(part["bytes"], within, "{place}");
        assert_eq!(place["unpartitioned_bytes"], all - within, "{place}");
        inside += within;
    }
    assert!(inside > 0, "{summary}");
}

#[test]
fn damage_is_found_listed_salvaged_and_healed_by_the_next_backup() {
    let place = Place::with_repository();
    let disk = partitioned(&place, "web.raw");
    place.run(&["backup", "web.raw"]).must_end_with(0);
    place.run(&["verify", "--read-data"]).must_end_with(0);
    flip(&packs(&place)[0]);

    let without_key = finish(place.command(&["verify", "--no-key"]).env_remove("VMTIDE_PASSWORD"));
    assert!(without_key.must_end_with(5).stdout.contains("damaged: packs/"));
    place.run(&["verify"]).must_end_with(0);
    let found = place.run(&["verify", "--read-data"]).must_end_with(5).stdout;
    assert!(found.contains("disk disk0") || found.contains(" web disk "), "{found}");
    assert!(found.contains("partition 1 \"root\" (Linux)"), "{found}");
    assert!(found.contains("put on record"), "{found}");
    let told = place.run(&["verify", "--read-data", "--json"]).must_end_with(5).summary();
    lies_in_the_partition(&told);
    let listed = place.run(&["points", "--json"]).must_end_with(5).summary();
    let damaged = listed["points"][0]["damaged_bytes"].as_u64().unwrap();
    assert!(damaged > 0 && damaged < 8 * MIB as u64, "{listed}");
    place.run(&["show", "web@latest"]).must_end_with(5);

    place.run(&["restore", "web@latest", "--to", "back.raw"]).must_end_with(5);
    assert!(!place.path("back.raw").exists());
    let salvage = ["restore", "web@latest", "--to", "left.raw", "--salvage", "--json"];
    let salvaged = place.run(&salvage).must_end_with(5).summary();
    let left = std::fs::read(place.path("left.raw")).unwrap();
    let mut expected = disk.clone();
    let mut lost = 0;
    for range in salvaged["disks"][0]["lost"].as_array().unwrap() {
        let number = |name: &str| usize::try_from(range[name].as_u64().unwrap()).unwrap();
        expected[number("offset")..number("offset") + number("length")].fill(0);
        lost += number("length");
    }
    assert!(left == expected, "all but what is listed is there");
    assert_eq!(lost as u64, damaged);

    // Nothing changed on the disk, and the backup is told so.
    std::fs::write(place.path("changes.json"), "[]").unwrap();
    let backup = ["backup", "web.raw", "--changes", "changes.json", "--json"];
    let run = place.run(&backup);
    let summary = run.summary();
    assert!(summary["healed_bytes"].as_u64().unwrap() >= damaged / 2, "{summary}");
    place.run(&["verify", "--read-data"]).must_end_with(0);
    let points = place.run(&["points", "--json"]).must_end_with(0).summary();
    let first = points["points"][0]["id"].as_str().unwrap();
    place.run(&["restore", first, "--to", "back.raw"]).must_end_with(0);
    assert!(std::fs::read(place.path("back.raw")).unwrap() == disk);
}

/// Files by name, and a disk with one partition of ext4 that has them.
fn with_files(place: &Place, name: &str) -> (BTreeMap<String, Vec<u8>>, Vec<u8>) {
    let files: BTreeMap<_, _> = (0..12)
        .map(|number| (format!("/tables {number}.db"), noise(300_000, 50 + number)))
        .collect();
    for (path, bytes) in &files {
        std::fs::create_dir_all(place.path("tree")).unwrap();
        std::fs::write(place.path("tree").join(&path[1..]), bytes).unwrap();
    }
    partitioned(place, name);
    let file_system = place.path("file system");
    let mut make = Command::new("/sbin/mke2fs");
    make.args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-b", "1024", "-d"])
        .arg(place.path("tree"));
    assert!(make.arg(&file_system).arg("6M").status().unwrap().success());
    let mut disk = std::fs::read(place.path(name)).unwrap();
    disk[MIB..7 * MIB].copy_from_slice(&std::fs::read(&file_system).unwrap());
    std::fs::write(place.path(name), &disk).unwrap();
    (files, disk)
}

/// What `--json` says of files, for each restore point.
fn told_files(summary: &serde_json::Value) -> BTreeMap<String, Option<BTreeSet<String>>> {
    let mut found: BTreeMap<String, Option<BTreeSet<String>>> = BTreeMap::new();
    for damage in summary["damage"].as_array().unwrap() {
        for place in damage["places"].as_array().unwrap() {
            let files = &place["partitions"][0]["files"][0];
            let entry = found.entry(place["point"].as_str().unwrap().to_owned()).or_default();
            if files.is_null() {
                continue;
            }
            assert_eq!(
                (&files["file_system"], &files["is_complete"]),
                (&"ext4".into(), &true.into())
            );
            let paths = files["files"].as_array().unwrap().iter();
            let paths = paths.map(|file| file["path"].as_str().unwrap().to_owned());
            entry.get_or_insert_default().extend(paths);
        }
    }
    found
}

#[test]
fn the_files_that_damage_touches_are_named() {
    let place = Place::with_repository();
    let (files, disk) = with_files(&place, "web.raw");
    place.run(&["backup", "web.raw"]).must_end_with(0);
    place.run(&["backup", "web.raw"]).must_end_with(0);
    // Not what has the inodes, which are at the beginning: with them goes what is known of all files.
    for pack in packs(&place) {
        flip(&pack);
        let salvage = ["restore", "web@latest", "--to", "try.raw", "--salvage", "--force"];
        place.run(&salvage);
        let tried = std::fs::read(place.path("try.raw")).unwrap();
        if tried != disk && tried[..2 * MIB] == disk[..2 * MIB] {
            break;
        }
        flip(&pack);
    }
    let text = place.run(&["verify", "--read-data"]).must_end_with(5).stdout;
    let summary = place.run(&["verify", "--read-data", "--json"]).must_end_with(5).summary();
    let salvage = ["restore", "web@latest", "--to", "left.raw", "--salvage", "--json"];
    let salvaged = place.run(&salvage).must_end_with(5).summary();
    let left = std::fs::read(place.path("left.raw")).unwrap();

    // What differs, by its content.
    let differs = |offset: &usize| disk[*offset..*offset + 1024] != left[*offset..*offset + 1024];
    let lost: Vec<_> = (0..disk.len()).step_by(1024).filter(differs).collect();
    let mut expected = BTreeSet::new();
    for (path, bytes) in &files {
        let pieces: HashSet<&[u8]> = bytes.chunks_exact(1024).collect();
        if lost.iter().any(|offset| pieces.contains(&disk[*offset..*offset + 1024])) {
            expected.insert(path.clone());
        }
    }
    assert!(!expected.is_empty() && expected.len() < files.len(), "{expected:?}");
    for path in &expected {
        assert!(text.contains(path.as_str()), "{path}: {text}");
    }

    let told = told_files(&summary);
    let points = place.run(&["points", "--json"]).must_end_with(5).summary();
    let id = |index: usize| points["points"][index]["id"].as_str().unwrap().to_owned();
    let is_file = |path: &&String| files.contains_key(*path);
    let newest: BTreeSet<_> = told[&id(1)].iter().flatten().filter(is_file).cloned().collect();
    assert_eq!(newest, expected);
    let lost_in = &salvaged["disks"][0]["lost_in"]["partitions"][0];
    assert_eq!(
        (&lost_in["number"], &lost_in["files"][0]["file_system"]),
        (&1.into(), &"ext4".into())
    );
    let lost_files = lost_in["files"][0]["files"].as_array().unwrap().iter();
    let lost_files: BTreeSet<_> =
        lost_files.map(|file| file["path"].as_str().unwrap().to_owned()).collect();
    assert!(lost_files.is_superset(&expected), "{lost_files:?}");
    let text = place.run(&["restore", "web@latest", "--to", "more.raw", "--salvage"]).stdout;
    assert!(expected.iter().all(|path| text.contains(path.as_str())), "{text}");
    // Two points in one map are read once; the older is asked by itself.
    let alone = place.run(&["verify", &id(0), "--read-data", "--json"]).must_end_with(5).summary();
    let older: BTreeSet<_> =
        told_files(&alone)[&id(0)].iter().flatten().filter(is_file).cloned().collect();
    assert_eq!((told[&id(0)].as_ref(), older), (None, expected));
}

#[test]
fn a_second_repository_with_another_password_heals() {
    let place = Place::with_repository();
    let disk = partitioned(&place, "web.raw");
    place.run(&["backup", "web.raw"]).must_end_with(0);
    let second = place.text("second");
    let other = |arguments: &[&str]| {
        let mut command = place.command(arguments);
        finish(command.env("VMTIDE_PASSWORD", "another").env("VMTIDE_REPOSITORY", &second))
    };
    other(&["init", &second]).must_end_with(0);
    other(&["backup", "web.raw"]).must_end_with(0);
    std::fs::write(place.path("second.password"), "another\n").unwrap();
    for pack in packs(&place) {
        std::fs::remove_file(pack).unwrap();
    }
    std::fs::remove_file(place.path("web.raw")).unwrap();
    place.run(&["verify"]).must_end_with(5);
    place.run(&["repair"]).must_end_with(5);
    let repair = ["repair", "--from", &second, "--from-password-file", "second.password"];
    let done = place.run(&repair).must_end_with(0).stdout;
    assert!(done.contains("healed") && done.contains("no damage is left"), "{done}");
    place.run(&["verify", "--read-data"]).must_end_with(0);
    place.run(&["restore", "web", "--to", "back.raw"]).must_end_with(0);
    assert!(std::fs::read(place.path("back.raw")).unwrap() == disk);
}

#[test]
fn a_copy_heals_even_what_nobody_knows_the_names_of() {
    let place = Place::with_repository();
    let disk = partitioned(&place, "web.raw");
    place.run(&["backup", "web.raw"]).must_end_with(0);
    let second = place.text("second");
    place.run(&["init", &second]).must_end_with(0);
    let mut copy = place.command(&["copy", "--all", "--to", &second]);
    finish(copy.env("VMTIDE_TO_PASSWORD", common::PASSWORD)).must_end_with(0);
    for pack in packs(&place) {
        std::fs::remove_file(pack).unwrap();
    }
    std::fs::remove_dir_all(place.repository().join("index")).unwrap();
    place.run(&["repair"]).must_end_with(5);
    place.run(&["repair", "--from", &second]).must_end_with(0);
    place.run(&["verify", "--read-data"]).must_end_with(0);
    place.run(&["restore", "web", "--to", "back.raw"]).must_end_with(0);
    assert!(std::fs::read(place.path("back.raw")).unwrap() == disk);
}

#[test]
fn a_repository_without_its_index_is_repaired() {
    let place = Place::with_repository();
    partitioned(&place, "web.raw");
    place.run(&["backup", "web.raw"]).must_end_with(0);
    std::fs::remove_dir_all(place.repository().join("index")).unwrap();
    let would = place.run(&["repair", "--dry-run"]).must_end_with(0).stdout;
    assert!(would.contains("would be made anew"), "{would}");
    place.run(&["repair"]).must_end_with(0);
    let again = place.run(&["backup", "web.raw", "--level", "full", "--json"]).must_end_with(0);
    assert_eq!(again.summary()["disks"][0]["new_bytes"], 0);
}

#[test]
fn a_difference_is_told_by_partition_and_stats_by_vm() {
    let place = Place::with_repository();
    let mut disk = partitioned(&place, "web.raw");
    place.run(&["backup", "web.raw"]).must_end_with(0);
    disk[3 * MIB..3 * MIB + 100_000].copy_from_slice(&noise(100_000, 2));
    std::fs::write(place.path("web.raw"), &disk).unwrap();
    place.run(&["backup", "web.raw"]).must_end_with(0);
    std::fs::write(place.path("db.raw"), noise(2 * MIB, 3)).unwrap();
    place.run(&["backup", "db.raw"]).must_end_with(0);
    let points = place.run(&["points", "--vm", "web", "--json"]).must_end_with(0).summary();
    let id = |number: usize| points["points"][number]["id"].as_str().unwrap().to_owned();
    let diff = place.run(&["diff", &id(0), &id(1), "--json"]).must_end_with(0).summary();
    let parts = diff["disks"][0]["partitions"].as_array().unwrap();
    assert_eq!((parts.len(), &parts[0]["name"]), (1, &"root".into()), "{diff}");
    assert_eq!(parts[0]["bytes"], diff["disks"][0]["changed_bytes"]);
    let text = place.run(&["diff", &id(0), &id(1)]).must_end_with(0).stdout;
    assert!(text.contains("root"), "{text}");

    let stats = place.run(&["stats", "--json", "--price-per-gb-month", "1000"]);
    let stats = stats.must_end_with(0).summary();
    let vm = |number: usize| &stats["vms"][number];
    assert_eq!((&vm(0)["vm"], &vm(1)["vm"]), (&"db".into(), &"web".into()));
    assert_eq!(vm(0)["needed_bytes"], 2 * MIB as u64);
    assert_eq!(vm(0)["unique_bytes"], vm(0)["stored_bytes"], "nobody shares noise");
    let (logical, needed) = (vm(1)["logical_bytes"].as_u64(), vm(1)["needed_bytes"].as_u64());
    assert!(logical.unwrap() > 2 * needed.unwrap() - 1_500_000, "two points, one copy: {stats}");
    assert_eq!(stats["growth"][0]["points"], 3);
    let bytes = stats["pack_bytes"].as_u64().unwrap() + stats["metadata_bytes"].as_u64().unwrap();
    let cost = stats["cost_per_month"].as_f64().unwrap();
    #[allow(clippy::cast_precision_loss, reason = "a few MiB")]
    let expected = bytes as f64 / 1e6;
    assert!((cost - expected).abs() < 1e-6, "{cost}");
    place.run(&["stats", "--growth"]).must_end_with(0);
    costs_are_counted(&place, bytes);
}

/// What `stats` says three backups cost of which these bytes are stored, and a restore of all.
#[allow(clippy::cast_precision_loss, reason = "a few MiB")]
fn costs_are_counted(place: &Place, stored_bytes: u64) {
    let line = ["stats", "--prices", "example-flat", "--price-per-1000-puts", "1000"];
    let stats = place.run(&[&line[..], &["--json"]].concat()).must_end_with(0).summary();
    let cost = &stats["cost"];
    let is = |name: &str, expected: f64| {
        let found = cost[name].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-9, "{name}: {found}, not {expected}");
    };
    // Five objects each, and no pack is full.
    assert_eq!(cost["puts_per_month"], 15, "{cost}");
    is("puts_cost_per_month", 15.0);
    is("storage_per_month", stored_bytes as f64 / 1e9 * 0.006);
    is("per_month", 15.0 + stored_bytes as f64 / 1e9 * 0.006);
    is("locked_per_month", 0.0);
    assert_eq!(
        (&stats["locked_bytes"], &stats["locked_until"]),
        (&0.into(), &serde_json::Value::Null)
    );
    let count = |value: &serde_json::Value| value.as_u64().unwrap();
    let (db, web) = (&stats["vms"][0], &stats["vms"][1]);
    // Noise does not compress. The newest point of web needs most of what both need, and db all.
    assert!(count(&db["restore_bytes"]) >= 2 * MIB as u64, "{db}");
    assert!(count(&web["restore_bytes"]) >= 6 * MIB as u64, "{web}");
    let all = count(&db["restore_bytes"]) + count(&web["restore_bytes"]);
    assert!(all <= count(&stats["pack_bytes"]), "{stats}");
    assert_eq!(count(&cost["restore_bytes"]), all);
    let gets = count(&cost["restore_gets"]);
    assert!((6..=60).contains(&gets), "{gets}");
    is("restore_cost", all as f64 / 1e9 * 0.01 + gets as f64 / 1000.0 * 0.0004);
    let text = place.run(&line).must_end_with(0).stdout;
    assert!(text.contains("15 PUTs at 1000") && text.contains("cost of a restore"), "{text}");
    place.run(&["stats", "--prices", "free"]).must_end_with(2);
    place.run(&["stats", "--price-per-gb-read", "-1"]).must_end_with(2);
}

#[test]
fn in_place_writes_only_what_differs_as_the_target_counts_it() {
    let place = Place::with_repository();
    let disk = partitioned(&place, "web.raw");
    place.run(&["backup", "web.raw"]).must_end_with(0);
    let mut there = disk.clone();
    there[2 * MIB + 5] ^= 1;
    there[5 * MIB..5 * MIB + 70_000].fill(3);
    // Data where zeros belong.
    there[7 * MIB + 100_000] = 9;
    std::fs::write(place.path("target.raw"), &there).unwrap();
    let (socket, counted) = (place.text("sock"), place.text("counted"));
    let mut server = Command::new("nbdkit")
        .args(["--foreground", "--unix", &socket, "--filter=stats", "file"])
        .arg(place.path("target.raw"))
        .arg(format!("statsfile={counted}"))
        .spawn()
        .expect("nbdkit is needed: install nbdkit (scripts/test.sh does)");
    let begun = Instant::now();
    while !place.path("sock").exists() {
        assert!(begun.elapsed() < Duration::from_secs(30), "nbdkit does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    let url = format!("nbd+unix:///?socket={socket}");
    let run = place.run(&["restore", "web", "--to", &url, "--in-place", "--json"]);
    let summary = run.must_end_with(0).summary();
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&server),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    server.wait().unwrap();
    assert!(std::fs::read(place.path("target.raw")).unwrap() == disk);
    // One grain of 64 KiB, two for the stretch, and one of zeros.
    let told = &summary["disks"][0];
    assert_eq!((&told["written_bytes"], &told["zeroed_bytes"]), (&(3 << 16).into(), &65536.into()));
    let counted = std::fs::read_to_string(counted).unwrap();
    let line = |kind: &str| {
        let found = counted.lines().find(|line| line.starts_with(kind));
        found.map(str::to_owned).unwrap_or_default()
    };
    assert!(line("write:").contains("192.00 KiB"), "{counted}");
    assert!(line("zero:").contains("64.00 KiB"), "{counted}");
}
