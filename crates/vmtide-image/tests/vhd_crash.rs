//! Every moment at which the VHD writer can be cut off leaves a valid image with all flushed data.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::path::Path;
use std::sync::Arc;
use support::crash::{Files, Recording, Sampling, Subject, ValidFrom};
use support::{path, pattern, qemu_img, qemu_io};
use vmtide_block::{BlockDevice, MemoryDevice, Result};
use vmtide_image::vhd::{VhdCreateOptions, VhdImage, VhdKind, VhdParent, VhdWriter};
use vmtide_image::{ImageWriter, OpenOptions, Repair, check_image};

fn below(parent: Option<&Vec<u8>>) -> Option<Arc<dyn BlockDevice>> {
    parent.map(|bytes| Arc::new(MemoryDevice::from_bytes(bytes.clone())) as Arc<dyn BlockDevice>)
}

fn read(files: &Files, parent: Option<&Vec<u8>>) -> Result<Arc<dyn BlockDevice>> {
    Ok(Arc::new(VhdImage::open_device(files.main(), below(parent))?))
}

fn write(files: &Files, parent: Option<&Vec<u8>>) -> Result<Arc<dyn ImageWriter>> {
    Ok(Arc::new(VhdWriter::open_device(files.main(), below(parent))?))
}

/// Nothing but lost space and footers, which are repaired; then nothing at all.
fn check(image: &Path) {
    let options = OpenOptions::default();
    let found = check_image(image, &options, Repair::Nothing).unwrap();
    let is_known =
        |detail: &str| ["footer", "tail", "gap"].iter().any(|known| detail.starts_with(known));
    assert!(found.problems.iter().all(|problem| is_known(&problem.detail)), "{found:?}");
    let repaired = check_image(image, &options, Repair::All).unwrap();
    assert_eq!(repaired.errors, 0, "{repaired:?}");
    let left = check_image(image, &options, Repair::Nothing).unwrap();
    // Space between blocks stays lost.
    assert!(left.problems.iter().all(|problem| problem.detail.starts_with("gap")), "{left:?}");
}

/// As [`check`]; QEMU opens a dynamic image by the footer at its start. Other readers go by the sector bitmaps of
/// dynamic images as well, in which every sector of a block is present.
fn check_with_qemu(image: &Path) {
    qemu_img(&["info", "-f", "vpc", path(image)]);
    assert!(support::vhd_bitmaps_are_whole(&std::fs::read(image).unwrap()));
    check(image);
}

fn created(options: &VhdCreateOptions) -> Vec<u8> {
    let memory = Arc::new(MemoryDevice::new(0));
    VhdWriter::create_device(memory.clone(), options).unwrap().finish().unwrap();
    memory.to_bytes()
}

fn subject<'a>(name: &str, start: Vec<u8>, content: Vec<u8>) -> Subject<'a> {
    Subject {
        name: name.into(),
        start: vec![("image.vhd".into(), start)],
        content,
        valid_from: ValidFrom::Start,
        write: &|files| write(files, None),
        read: &|files| read(files, None),
        rewrite: Some(&|files| write(files, None)),
        beside: Vec::new(),
        check: Some(&check_with_qemu),
    }
}

fn small(size: u64, bits: u32) -> VhdCreateOptions {
    VhdCreateOptions { block_size_bytes: 1 << bits, ..VhdCreateOptions::new(size) }
}

#[test]
fn a_new_image_survives_every_cut() {
    for bits in [12, 14, 16] {
        let start = created(&small(120_320, bits));
        let subject = subject(&format!("blocks of 2^{bits}"), start, vec![0; 120_320]);
        let mut recording = Recording::begin(&subject);
        recording.random_steps(u64::from(bits), 20, 20_000);
        recording.finish();
        recording.random_steps(u64::from(bits) + 1, 8, 20_000);
        recording.finish();
        recording.enumerate(&Sampling::default());
    }
}

#[test]
fn a_fixed_image_survives_every_cut() {
    let options = VhdCreateOptions { kind: VhdKind::Fixed, ..VhdCreateOptions::new(120_320) };
    let subject = subject("fixed", created(&options), vec![0; 120_320]);
    let mut recording = Recording::begin(&subject);
    recording.random_steps(3, 16, 20_000);
    recording.finish();
    recording.enumerate(&Sampling::default());
}

#[test]
fn creating_leaves_a_whole_image_or_none() {
    let options = small(120_320, 14);
    let create = |files: &Files| -> Result<Arc<dyn ImageWriter>> {
        Ok(Arc::new(VhdWriter::create_device(files.main(), &options)?))
    };
    let subject = Subject {
        valid_from: ValidFrom::Opened,
        write: &create,
        ..subject("creating", Vec::new(), vec![0; 120_320])
    };
    let mut recording = Recording::begin(&subject);
    recording.random_steps(5, 8, 20_000);
    recording.finish();
    recording.enumerate(&Sampling::default());
}

#[test]
fn a_differencing_image_survives_every_cut() {
    let parent = pattern(2, 90_112);
    for bits in [12, 14] {
        let options = VhdCreateOptions {
            kind: VhdKind::Differencing(VhdParent {
                name: "parent.vhd".into(),
                absolute_path: None,
                identity: "5fa21a55-f394-aa4d-9958-1951a67d5540".into(),
                device: below(Some(&parent)).unwrap(),
            }),
            ..small(120_320, bits)
        };
        let mut content = parent.clone();
        content.resize(120_320, 0);
        let subject = Subject {
            write: &|files| write(files, Some(&parent)),
            read: &|files| read(files, Some(&parent)),
            rewrite: Some(&|files| write(files, Some(&parent))),
            check: Some(&check),
            ..subject(&format!("differencing, 2^{bits}"), created(&options), content)
        };
        let mut recording = Recording::begin(&subject);
        // Less than a sector, too: the rest of the sector comes from the parent.
        recording.random_steps(u64::from(bits), 14, 700);
        recording.random_steps(u64::from(bits) + 5, 14, 20_000);
        recording.finish();
        recording.enumerate(&Sampling::default());
    }
}

#[test]
fn growing_survives_every_cut() {
    let subject = subject("growing", created(&small(20_480, 12)), vec![0; 20_480]);
    let mut recording = Recording::begin(&subject);
    recording.random_steps(3, 6, 9000);
    // The table has no room; then it has, up to the end of its sector.
    for size in [90_112, 700_416, 701_440] {
        recording.resize(size);
        recording.flush();
        recording.random_steps(size, 4, 9000);
    }
    recording.finish();
    recording.enumerate(&Sampling::default());
}

#[test]
fn images_of_qemu_survive_every_cut() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.vhd");
    let options = "subformat=dynamic,force_size=on";
    qemu_img(&["create", "-q", "-f", "vpc", "-o", options, path(&image), "3M"]);
    qemu_io(&image, &["-f", "vpc"], &["write -P 7 100k 50k"]);
    let mut content = vec![0; 3 << 20];
    content[100 << 10..150 << 10].fill(7);
    let subject = subject("of QEMU", std::fs::read(&image).unwrap(), content);
    let mut recording = Recording::begin(&subject);
    recording.random_steps(11, 8, 50_000);
    recording.finish();
    let sampling = Sampling { variants: 1, near_flush: Some(4), ..Sampling::default() };
    recording.enumerate(&sampling);
}

#[test]
fn footers_that_are_damaged_are_made_again_from_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.vhd");
    let content = pattern(9, 300_032);
    let memory = Arc::new(MemoryDevice::new(0));
    let writer = VhdWriter::create_device(memory.clone(), &small(300_032, 14)).unwrap();
    vmtide_block::WritableBlockDevice::write_at(&writer, &content, 0).unwrap();
    writer.finish().unwrap();
    let good = memory.to_bytes();
    let end = good.len() - 512;
    let cut = good[..end].to_vec();
    let torn = good[..end + 300].to_vec();
    let mut no_copy = good.clone();
    no_copy[40] ^= 1;
    let mut no_trailer = good.clone();
    no_trailer[end + 40] ^= 1;
    for (name, bytes) in [("cut", cut), ("torn", torn), ("copy", no_copy), ("end", no_trailer)] {
        std::fs::write(&image, bytes).unwrap();
        let found = check_image(&image, &OpenOptions::default(), Repair::Nothing).unwrap();
        assert_eq!((found.errors, found.repaired), (1, 0), "{name}: {found:?}");
        let leaks_only = check_image(&image, &OpenOptions::default(), Repair::Leaks).unwrap();
        assert_eq!(leaks_only.errors, 1, "{name}");
        let disk = vmtide_image::open_read_only(&image, &OpenOptions::default()).unwrap();
        assert!(support::read_all(&*disk) == content, "{name}");
        let done = check_image(&image, &OpenOptions::default(), Repair::All).unwrap();
        assert_eq!((done.errors, done.repaired), (0, 1), "{name}: {done:?}");
        assert!(std::fs::read(&image).unwrap() == good, "{name}");
    }
}
