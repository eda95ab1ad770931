//! What a check of a VMDK finds, and what a repair leaves.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::path::{Path, PathBuf};
use support::vmdk::{Hole, StreamEnd, cowd, descriptor, sesparse, stream};
use support::{path, pattern, qemu_img, raw_file, read_all, run};
use vmtide_image::{
    BackingPolicy, CheckReport, CreateOptions, Format, OpenOptions, Repair, check_image,
    create_image, open_read_only,
};

fn allowed() -> OpenOptions {
    OpenOptions { backing: BackingPolicy::SameDirectory, ..OpenOptions::default() }
}

fn check(image: &Path, repair: Repair) -> CheckReport {
    check_image(image, &allowed(), repair).unwrap()
}

fn made(directory: &Path, kind: &str, content: &[u8]) -> PathBuf {
    let image = directory.join("image.vmdk");
    let options = CreateOptions {
        subformat: Some(kind.into()),
        ..CreateOptions::new(Format::Vmdk, content.len() as u64)
    };
    let writer = create_image(&image, &options).unwrap();
    writer.write_at(content, 0).unwrap();
    writer.finish().unwrap();
    image
}

fn sector_at(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap() * 512
}

fn entry(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())).unwrap() * 512
}

#[test]
fn what_is_right_has_no_problems() {
    let directory = tempfile::tempdir().unwrap();
    let content = pattern(5, 40_000_000 / 512 * 512);
    let size = content.len() as u64;
    for kind in [
        "monolithicSparse",
        "monolithicFlat",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
        "streamOptimized",
        "vmfs",
    ] {
        let own = tempfile::tempdir().unwrap();
        let report = check(&made(own.path(), kind, &content), Repair::Nothing);
        assert_eq!(report.problems, [], "{kind}");
        assert_eq!(report.size_bytes, size);
        let raw = raw_file(directory.path(), "disk.raw", &content);
        let image = directory.path().join(format!("{kind}.vmdk"));
        if kind != "vmfs" {
            let option = format!("subformat={kind}");
            qemu_img(&["convert", "-O", "vmdk", "-o", &option, path(&raw), path(&image)]);
            let report = check(&image, Repair::Nothing);
            assert_eq!((report.errors, report.leaks), (0, 0), "{kind}: {:?}", report.problems);
            assert!(report.allocated_bytes > 0 && report.allocated_bytes <= size);
        }
    }
    let text = descriptor("streamOptimized", None, "RW 78125 SPARSE \"x\"");
    for bytes in [
        cowd(&content, 1),
        sesparse(&content, Hole::Zero),
        stream(&content, &text, StreamEnd::Footer),
        stream(&content, &text, StreamEnd::FrontDirectory),
    ] {
        let image = raw_file(directory.path(), "alone.vmdk", &bytes);
        let report = check(&image, Repair::Nothing);
        assert_eq!(report.problems, []);
    }
}

#[test]
fn the_second_tables_are_mended_by_the_first_and_the_first_directory_by_the_second() {
    let directory = tempfile::tempdir().unwrap();
    let content = pattern(6, 3 << 20);
    let image = made(directory.path(), "monolithicSparse", &content);
    let whole = std::fs::read(&image).unwrap();
    let (spare, first) = (sector_at(&whole, 48), sector_at(&whole, 56));
    let mut bytes = whole.clone();
    let spare_table = entry(&bytes, spare);
    bytes[spare_table + 8] ^= 0xff;
    bytes[72] = 1;
    std::fs::write(&image, &bytes).unwrap();
    let report = check(&image, Repair::Nothing);
    assert_eq!((report.errors, report.leaks, report.problems.len()), (0, 0, 2));
    assert!(report.problems[0].detail.contains("1 entries differ"), "{report:?}");
    assert_eq!(check(&image, Repair::Leaks).repaired, 0);
    assert_eq!(check(&image, Repair::All).repaired, 2);
    assert_eq!(check(&image, Repair::Nothing).problems, []);
    assert!(std::fs::read(&image).unwrap() == whole);

    let mut bytes = whole.clone();
    bytes[first..first + 4].copy_from_slice(&[0xff; 4]);
    std::fs::write(&image, &bytes).unwrap();
    let report = check(&image, Repair::Nothing);
    assert_eq!(report.errors, 1, "{report:?}");
    assert!(report.problems[0].detail.contains("grain directory entry 0: 0xffffffff"));
    check(&image, Repair::All);
    assert_eq!(check(&image, Repair::Nothing).errors, 0);
    assert!(read_all(&*open_read_only(&image, &allowed()).unwrap()) == content);
    run("qemu-img", &["check", "-f", "vmdk", path(&image)]);
}

#[test]
fn lost_mixed_and_wasted_grains_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let content: Vec<u8> = vec![7; 3 << 20];
    let image = made(directory.path(), "monolithicSparse", &content);
    let whole = std::fs::read(&image).unwrap();
    let table = entry(&whole, sector_at(&whole, 56));
    let errors = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        std::fs::write(&image, &bytes).unwrap();
        let report = check(&image, Repair::All);
        assert!(report.errors > 0, "{report:?}");
        report.problems.iter().map(|problem| problem.detail.clone()).collect::<Vec<_>>().join("\n")
    };
    let twice = errors(&|bytes| bytes.copy_within(table..table + 4, table + 4));
    assert!(twice.contains("share their bytes"), "{twice}");
    let inside = errors(&|bytes| bytes[table..table + 4].copy_from_slice(&[3, 0, 0, 0]));
    assert!(inside.contains("inside the tables"), "{inside}");
    let past = errors(&|bytes| bytes[table + 2] = 9);
    assert!(past.contains("past the end of the file"), "{past}");
    let cut = errors(&|bytes| bytes.truncate(bytes.len() - 512));
    assert!(cut.contains("past the end of the file"), "{cut}");

    let mut longer = whole.clone();
    longer.resize(whole.len() + 200_000, 1);
    std::fs::write(&image, &longer).unwrap();
    let report = check(&image, Repair::Nothing);
    assert_eq!((report.errors, report.leaks), (0, 1), "{report:?}");
    assert_eq!(check(&image, Repair::Leaks).repaired, 1);
    assert!(std::fs::read(&image).unwrap() == whole);

    std::fs::remove_file(&image).unwrap();
    let image = made(directory.path(), "twoGbMaxExtentFlat", &content);
    std::fs::write(directory.path().join("image-f001.vmdk"), [1; 1000]).unwrap();
    assert_eq!(check(&image, Repair::Nothing).errors, 1);
    std::fs::remove_file(directory.path().join("image-f001.vmdk")).unwrap();
    let report = check(&image, Repair::Nothing);
    assert!(report.problems[0].detail.contains("image-f001.vmdk"), "{report:?}");
}

#[test]
fn a_descriptor_behind_the_grains_is_neither_damage_nor_waste() {
    let directory = tempfile::tempdir().unwrap();
    let content = pattern(11, 1 << 20);
    let image = made(directory.path(), "monolithicSparse", &content);
    let mut bytes = std::fs::read(&image).unwrap();
    let end = bytes.len();
    bytes.extend_from_within(512..512 + 20 * 512);
    bytes[512..512 + 20 * 512].fill(0);
    bytes[28..36].copy_from_slice(&(end as u64 / 512).to_le_bytes());
    std::fs::write(&image, &bytes).unwrap();
    assert_eq!(check(&image, Repair::All).problems, []);
    assert!(std::fs::read(&image).unwrap() == bytes);
    assert!(read_all(&*open_read_only(&image, &allowed()).unwrap()) == content);
}

#[test]
fn a_stream_that_was_cut_off_or_mixed_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let content = pattern(9, 2 << 20);
    let image = made(directory.path(), "streamOptimized", &content);
    let whole = std::fs::read(&image).unwrap();
    std::fs::write(&image, &whole[..whole.len() - 2048]).unwrap();
    let report = check(&image, Repair::All);
    assert!(report.problems[0].detail.contains("cut off"), "{report:?}");
    let mut moved = whole;
    moved[128 * 512] ^= 0x80;
    std::fs::write(&image, &moved).unwrap();
    let report = check(&image, Repair::All);
    assert!(report.problems[0].detail.contains("is that of sector"), "{report:?}");
}

#[test]
fn what_harms_no_reader_is_a_note() {
    let directory = tempfile::tempdir().unwrap();
    let content = pattern(9, 1 << 20);
    let image = made(directory.path(), "monolithicSparse", &content);
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[73..77].fill(0);
    let cid = bytes.windows(5).position(|window| window == b"\nCID=").unwrap() + 5;
    bytes[cid..cid + 8].copy_from_slice(b"notanid!");
    std::fs::write(&image, &bytes).unwrap();
    let report = check(&image, Repair::Nothing);
    assert_eq!((report.errors, report.leaks, report.problems.len()), (0, 0, 2), "{report:?}");
    assert!(report.problems[0].detail.contains("notanid!"), "{report:?}");
    assert!(report.problems[1].detail.contains("0x49"), "{report:?}");
    assert!(read_all(&*open_read_only(&image, &allowed()).unwrap()) == content);
}
