//! Every moment at which a VMDK writer can be cut off leaves a valid image with all flushed data.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::path::Path;
use std::sync::Arc;
use support::crash::{Files, Recording, Sampling, Subject, ValidFrom};
use support::{path, pattern, text, try_run};
use vmtide_block::{BlockDevice, MemoryDevice, Result, WritableBlockDevice};
use vmtide_image::ImageWriter;
use vmtide_image::vmdk::{VmdkCreateOptions, VmdkImage, VmdkKind, VmdkParent, VmdkWriter};

const SIZE: usize = 200_192;

type Parent = Option<Arc<dyn BlockDevice>>;

fn create(files: &Files, options: &VmdkCreateOptions) -> Result<Arc<dyn ImageWriter>> {
    let writer = VmdkWriter::create_files("disk.vmdk", options, &mut |name| Ok(files.get(name)))?;
    Ok(Arc::new(writer))
}

fn write(files: &Files, parent: Parent) -> Result<Arc<dyn ImageWriter>> {
    Ok(Arc::new(VmdkWriter::open_device(files.main(), files, parent)?))
}

fn read(files: &Files, parent: Parent) -> Result<Arc<dyn BlockDevice>> {
    Ok(Arc::new(VmdkImage::open_device(files.main(), files, parent)?))
}

/// Succeeds where QEMU finds no damage; for images of one file.
fn qemu_finds_no_damage(image: &Path) {
    let out = try_run("qemu-img", &["check", "-f", "vmdk", path(image)]);
    assert!(matches!(out.status.code(), Some(0 | 3)), "qemu-img check: {}", text(&out));
}

/// The files of an image with this content.
fn made(options: &VmdkCreateOptions, content: Option<&[u8]>) -> Vec<(String, Vec<u8>)> {
    let files = support::vmdk::MemoryFiles::default();
    let mut names = Vec::new();
    let writer = VmdkWriter::create_files("disk.vmdk", options, &mut |name| {
        let device = Arc::new(MemoryDevice::new(0));
        files.put(name, device.clone());
        names.push(name.to_owned());
        Ok(device)
    })
    .unwrap();
    if let Some(content) = content {
        writer.write_at(content, 0).unwrap();
    }
    writer.finish().unwrap();
    // The file that names the others comes first.
    names.reverse();
    names.into_iter().map(|name| (name.clone(), files.get(&name).to_bytes())).collect()
}

fn options(kind: VmdkKind) -> VmdkCreateOptions {
    VmdkCreateOptions { kind, grain_size_bytes: 4096, ..VmdkCreateOptions::new(SIZE as u64) }
}

#[test]
fn writing_survives_every_cut() {
    for (kind, content) in [
        (VmdkKind::MonolithicSparse, None),
        (VmdkKind::MonolithicSparse, Some(pattern(6, SIZE))),
        (VmdkKind::TwoGbMaxExtentSparse, None),
        (VmdkKind::MonolithicFlat, Some(pattern(5, SIZE))),
    ] {
        let check: Option<&dyn Fn(&Path)> =
            if kind.is_embedded() { Some(&qemu_finds_no_damage) } else { None };
        let start = made(&options(kind), content.as_deref());
        let subject = Subject {
            name: format!("{} with content {}", kind.name(), content.is_some()),
            start,
            content: content.unwrap_or_else(|| vec![0; SIZE]),
            valid_from: ValidFrom::Start,
            write: &|files| write(files, None),
            read: &|files| read(files, None),
            rewrite: Some(&|files| write(files, None)),
            beside: Vec::new(),
            check,
        };
        let mut recording = Recording::begin(&subject);
        recording.random_steps(7, 24, 20_000);
        recording.finish();
        recording.random_steps(8, 6, 20_000);
        recording.finish();
        recording.enumerate(&Sampling::default());
    }
}

#[test]
fn writing_a_child_survives_every_cut() {
    let below = pattern(2, SIZE);
    let parent: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::from_bytes(below.clone()));
    let options = VmdkCreateOptions {
        parent: Some(VmdkParent {
            hint: "base.vmdk".into(),
            content_id: "0000beef".into(),
            device: parent.clone(),
        }),
        ..options(VmdkKind::MonolithicSparse)
    };
    for zero_grains in [false, true] {
        let mut start = made(&options, None);
        if zero_grains {
            start[0].1[4] = 2;
            start[0].1[8] = 7;
        }
        let subject = Subject {
            name: format!("child, zero grains {zero_grains}"),
            start,
            content: below.clone(),
            valid_from: ValidFrom::Start,
            write: &|files| write(files, Some(parent.clone())),
            read: &|files| read(files, Some(parent.clone())),
            rewrite: Some(&|files| write(files, Some(parent.clone()))),
            beside: Vec::new(),
            check: None,
        };
        let mut recording = Recording::begin(&subject);
        recording.random_steps(17, 24, 20_000);
        recording.finish();
        recording.enumerate(&Sampling::default());
    }
}

#[test]
fn making_survives_every_cut() {
    for kind in [VmdkKind::MonolithicSparse, VmdkKind::Vmfs, VmdkKind::TwoGbMaxExtentSparse] {
        let subject = Subject {
            name: format!("new {}", kind.name()),
            start: vec![("disk.vmdk".into(), Vec::new())],
            content: vec![0; SIZE],
            valid_from: ValidFrom::Opened,
            write: &|files| create(files, &options(kind)),
            read: &|files| read(files, None),
            rewrite: Some(&|files| write(files, None)),
            beside: Vec::new(),
            check: None,
        };
        let mut recording = Recording::begin(&subject);
        recording.random_steps(3, 10, 20_000);
        recording.finish();
        recording.enumerate(&Sampling::default());
    }
}

#[test]
fn a_stream_is_complete_or_refused_at_every_cut() {
    let content = pattern(31, SIZE);
    let subject = Subject {
        name: "stream".into(),
        start: vec![("disk.vmdk".into(), Vec::new())],
        content: vec![0; SIZE],
        valid_from: ValidFrom::Finished,
        write: &|files| create(files, &options(VmdkKind::StreamOptimized)),
        read: &|files| read(files, None),
        rewrite: None,
        beside: Vec::new(),
        check: None,
    };
    let mut recording = Recording::begin(&subject);
    for (number, piece) in content.chunks(4096).enumerate() {
        recording.write(number as u64 * 4096, piece);
    }
    recording.finish();
    recording.enumerate(&Sampling::default());
}
