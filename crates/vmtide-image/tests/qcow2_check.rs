//! The check against qemu-img's on whole and damaged images, and repairs that qemu-img finds clean.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::path::{Path, PathBuf};
use support::{check_clean, path, pattern, qemu_img, qemu_io, raw_file, text, try_run};
use vmtide_image::{CheckReport, OpenOptions, Repair, check_image, open_read_only};

type Damage = (&'static str, fn(&mut Vec<u8>), Verdict);

/// What a repair of everything leaves.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Verdict {
    Clean,
    /// An entry leads nowhere: its data is lost, and no repair brings it back.
    Lost,
}

/// Images of all kinds that QEMU made: name and options.
const SHAPES: [(&str, &str); 5] = [
    ("plain", "compat=1.1"),
    ("small", "compat=0.10,cluster_size=512"),
    ("extended", "extended_l2=on,cluster_size=32k"),
    ("narrow", "refcount_bits=2,cluster_size=4k"),
    ("wide", "refcount_bits=16,cluster_size=64k,compression_type=zstd"),
];

fn sample(directory: &Path, name: &str, options: &str) -> PathBuf {
    let image = directory.join(format!("{name}.qcow2"));
    let raw = raw_file(directory, "disk.raw", &pattern(6, 3 << 20));
    let convert = ["convert", "-f", "raw", "-O", "qcow2"];
    let compressed = if name == "wide" { vec!["-c"] } else { vec![] };
    qemu_img(&[&convert[..], &compressed, &["-o", options, path(&raw), path(&image)]].concat());
    qemu_img(&["snapshot", "-c", "first", path(&image)]);
    qemu_io(&image, &["-f", "qcow2"], &["write -P 3 100k 300k", "write -z 1M 128k"]);
    if !options.contains("0.10") {
        qemu_img(&["bitmap", "--add", path(&image), "changes"]);
    }
    image
}

fn check(image: &Path, repair: Repair) -> CheckReport {
    check_image(image, &OpenOptions::default(), repair).unwrap()
}

/// Exit codes of qemu-img check: 0 clean, 2 errors, 3 only leaks (qemu-img(1)).
fn qemu_verdict(image: &Path) -> Option<i32> {
    let out = try_run("qemu-img", &["check", "-f", "qcow2", path(image)]);
    let code = out.status.code();
    // 1: could not be checked at all.
    assert!(matches!(code, Some(0..=3)), "{}", text(&out));
    code
}

fn our_verdict(report: &CheckReport) -> Option<i32> {
    match (report.errors, report.leaks) {
        (0, 0) => Some(0),
        (0, _) => Some(3),
        _ => Some(2),
    }
}

fn u64_at(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: u64, value: &[u8]) {
    let at = usize::try_from(at).unwrap();
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn put_u64(bytes: &mut [u8], at: u64, value: u64) {
    put(bytes, at, &value.to_be_bytes());
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn l1(bytes: &[u8]) -> u64 {
    u64_at(bytes, 40)
}

fn cluster(bytes: &[u8]) -> u64 {
    1 << bytes[23]
}

/// Where the disk's first standard L2 entry with a cluster of its own is.
fn owned_entry(bytes: &[u8]) -> u64 {
    let l1_entries = u64::from(u32::from_be_bytes(bytes[36..40].try_into().unwrap()));
    let step = if bytes[4..8] == [0, 0, 0, 3] && bytes[79] & 16 != 0 { 16 } else { 8 };
    (0..l1_entries)
        .map(|index| u64_at(bytes, l1(bytes) + index * 8) & OFFSET)
        .filter(|table| *table != 0)
        .flat_map(|table| (table..table + cluster(bytes)).step_by(step))
        .find(|at| u64_at(bytes, *at) >> 62 == 2)
        .unwrap()
}

fn refcount_block(bytes: &[u8]) -> u64 {
    u64_at(bytes, u64_at(bytes, 48))
}

/// Sets the count of the data cluster of [`owned_entry`] in its block; 16 bits only.
fn set_count(bytes: &mut [u8], count: u16) {
    let host = (u64_at(bytes, owned_entry(bytes)) & OFFSET) / cluster(bytes);
    let per_block = cluster(bytes) / 2;
    let block = u64_at(bytes, u64_at(bytes, 48) + host / per_block * 8);
    put(bytes, block + host % per_block * 2, &count.to_be_bytes());
}

fn flip(bytes: &mut [u8], place: fn(&[u8]) -> u64, bits: u64) {
    let at = place(bytes);
    put_u64(bytes, at, u64_at(bytes, at) ^ bits);
}

fn set(bytes: &mut [u8], place: fn(&[u8]) -> u64, value: u64) {
    let at = place(bytes);
    put_u64(bytes, at, value);
}

fn refcount_table(bytes: &[u8]) -> u64 {
    u64_at(bytes, 48)
}

/// Damages for images with counts of any width.
fn damages() -> Vec<Damage> {
    vec![
        ("nothing", |_| {}, Verdict::Clean),
        (
            "a block of counts is zero",
            |b| {
                let (at, size) = (refcount_block(b), cluster(b));
                put(b, at, &vec![0; usize::try_from(size).unwrap()]);
            },
            Verdict::Clean,
        ),
        (
            "a block of counts is all ones",
            |b| {
                let (at, size) = (refcount_block(b), cluster(b));
                put(b, at, &vec![0x55; usize::try_from(size).unwrap()]);
            },
            Verdict::Clean,
        ),
        ("no block of counts", |b| set(b, refcount_table, 0), Verdict::Clean),
        ("a block of counts past the end", |b| set(b, refcount_table, 1 << 40), Verdict::Clean),
        ("a block of counts unaligned", |b| flip(b, refcount_table, 1 << 8), Verdict::Clean),
        ("L1 flag missing", |b| flip(b, l1, 1 << 63), Verdict::Clean),
        ("L2 flag missing", |b| flip(b, owned_entry, 1 << 63), Verdict::Clean),
        ("reserved bits in L2", |b| flip(b, owned_entry, 1 << 58), Verdict::Clean),
        ("reserved bits in L1", |b| flip(b, l1, 1 << 60), Verdict::Clean),
        (
            "two entries with one cluster",
            |b| {
                let at = owned_entry(b);
                let step = if b[79] & 16 != 0 { 16 } else { 8 };
                let entry = u64_at(b, at);
                put_u64(b, at + step, entry);
            },
            Verdict::Clean,
        ),
        ("an L2 entry past the end", |b| set(b, owned_entry, 1 << 63 | 1 << 40), Verdict::Lost),
        ("an L1 entry past the end", |b| set(b, l1, 1 << 63 | 1 << 40), Verdict::Lost),
        (
            "clusters at the end that nothing refers to",
            |b| {
                let size = b.len().next_multiple_of(usize::try_from(cluster(b)).unwrap());
                b.resize(size, 0);
            },
            Verdict::Clean,
        ),
    ]
}

fn wide_damages() -> Vec<Damage> {
    vec![
        ("a count too high", |b| set_count(b, 2), Verdict::Clean),
        ("a count too low", |b| set_count(b, 0), Verdict::Clean),
    ]
}

fn run(directory: &Path, name: &str, good: &[u8], damages: &[Damage]) {
    for (what, damage, verdict) in damages {
        let mut bytes = good.to_vec();
        damage(&mut bytes);
        let image = raw_file(directory, "damaged.qcow2", &bytes);
        let report = check(&image, Repair::Nothing);
        assert_eq!(std::fs::read(&image).unwrap(), bytes, "{name}, {what}: a check only reads");
        let moment = format!("{name}, {what}: {report:?}");
        assert_eq!(our_verdict(&report), qemu_verdict(&image), "{moment}");
        // Counts that were too high are right afterwards, and with them flags that were.
        let leaks = check(&image, Repair::Leaks);
        assert!(leaks.errors <= report.errors, "{moment}, leaks repaired: {leaks:?}");
        assert_eq!(our_verdict(&check(&image, Repair::Nothing)), qemu_verdict(&image), "{moment}");
        let after = check(&image, Repair::All);
        match verdict {
            Verdict::Clean => {
                assert_eq!((after.errors, after.leaks), (0, 0), "{moment}: {after:?}");
                check_clean(&image);
                let again = check(&image, Repair::Nothing);
                assert!(again.problems.is_empty(), "{moment}: {again:?}");
                open_read_only(&image, &OpenOptions::default()).unwrap();
            }
            Verdict::Lost => {
                assert!(after.errors > 0, "{moment}: {after:?}");
                let listed = after.problems.iter().any(|p| p.detail.contains("0x8000010000000000"));
                assert!(listed, "{moment}: {after:?}");
            }
        }
    }
}

#[test]
fn verdicts_are_qemu_s_and_what_was_repaired_is_clean() {
    let directory = tempfile::tempdir().unwrap();
    for (name, options) in SHAPES {
        let image = sample(directory.path(), name, options);
        let good = std::fs::read(&image).unwrap();
        run(directory.path(), name, &good, &damages());
        if name != "narrow" {
            run(directory.path(), name, &good, &wide_damages());
        }
    }
}

#[test]
fn a_dirty_image_is_repaired_to_a_writable_one() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("lazy.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path(&image), "16M"]);
    // Killed by itself after the writes: counts stay behind, the image stays dirty.
    let commands = ["write -P 5 1M 2M", "flush", "abort"];
    let mut arguments = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(path(&image));
    assert!(!try_run("qemu-io", &arguments).status.success());
    let report = check(&image, Repair::Nothing);
    assert!(report.errors > 0, "{report:?}");
    assert!(report.problems.iter().any(|p| p.detail.contains("marked dirty")), "{report:?}");
    let report = check(&image, Repair::All);
    assert_eq!((report.errors, report.leaks), (0, 0), "{report:?}");
    assert!(report.repaired > 0);
    check_clean(&image);
    vmtide_image::open_writable(&image, &OpenOptions::default()).unwrap();
    assert_eq!(report.allocated_bytes, 2 << 20);
}

#[test]
fn tables_that_name_each_other_without_end_are_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("loop.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path(&image), "1T"]);
    qemu_io(&image, &["-f", "qcow2"], &["write 0 1M"]);
    let mut bytes = std::fs::read(&image).unwrap();
    // The largest L1 table, every entry of which is the one L2 table.
    let table = u64_at(&bytes, l1(&bytes));
    let start = bytes.len().next_multiple_of(2 << 20);
    bytes.resize(start, 0);
    bytes.extend(table.to_be_bytes().repeat(4 << 20));
    put(&mut bytes, 36, &(4u32 << 20).to_be_bytes());
    put_u64(&mut bytes, 40, start as u64);
    let image = raw_file(directory.path(), "loop.qcow2", &bytes);
    // Looked at entry by entry, it would not end while anybody waits.
    let error = check_image(&image, &OpenOptions::default(), Repair::Nothing).unwrap_err();
    assert!(error.to_string().contains("named by more entries"), "{error}");
}

#[test]
fn an_image_that_is_marked_corrupt_is_an_error_until_it_is_repaired() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path(&image), "1M"]);
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[79] |= 2;
    std::fs::write(&image, bytes).unwrap();
    let report = check(&image, Repair::Nothing);
    assert_eq!((report.errors, report.problems.len()), (1, 1), "{report:?}");
    assert!(report.problems[0].detail.contains("marked corrupt"), "{report:?}");
    assert_eq!(check(&image, Repair::Leaks).errors, 1);
    let repaired = check(&image, Repair::All);
    assert_eq!((repaired.errors, repaired.repaired), (0, 1), "{repaired:?}");
    assert!(check(&image, Repair::Nothing).problems.is_empty());
}
