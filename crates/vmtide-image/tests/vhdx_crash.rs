//! Every moment at which the VHDX writer can be cut off leaves a valid image with all flushed data;
//! QEMU replays the log and reads the same disk.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::path::Path;
use std::sync::Arc;
use support::crash::{Files, Recording, Sampling, Subject, ValidFrom};
use support::{path, pattern, qemu_img, read_all, text, try_run};
use vmtide_block::{
    BlockDevice, ByteRange, Extent, MemoryDevice, OpenMode, RawDevice, Result, WritableBlockDevice,
};
use vmtide_image::ImageWriter;
use vmtide_image::vhdx::{VhdxCreateOptions, VhdxImage, VhdxKind, VhdxParent, VhdxWriter};

const MIB: u64 = 1 << 20;

fn read(files: &Files, parent: Option<Arc<dyn BlockDevice>>) -> Result<Arc<dyn BlockDevice>> {
    Ok(Arc::new(VhdxImage::open_device(files.main(), parent)?))
}

fn write(files: &Files, parent: Option<Arc<dyn BlockDevice>>) -> Result<Arc<dyn ImageWriter>> {
    Ok(Arc::new(VhdxWriter::open_device(files.main(), parent)?))
}

/// QEMU replays the log of a copy and then reads what vmtide reads from the image itself.
fn check_with_qemu(image: &Path) {
    let copy = image.with_extension("copy.vhdx");
    let raw = image.with_extension("raw");
    std::fs::copy(image, &copy).unwrap();
    let out = try_run("qemu-img", &["check", "-f", "vhdx", "-r", "all", path(&copy)]);
    assert!(out.status.success(), "qemu-img check: {}", text(&out));
    qemu_img(&["convert", "-f", "vhdx", "-O", "raw", path(&copy), path(&raw)]);
    let file = Arc::new(RawDevice::open(image, OpenMode::ReadOnly).unwrap());
    let disk = read_all(&VhdxImage::open_device(file, None).unwrap());
    assert!(std::fs::read(&raw).unwrap() == disk, "QEMU reads another disk");
}

/// An image without a parent that is there before the workload.
fn subject(name: &str, start: Vec<u8>, content: Vec<u8>) -> Subject<'static> {
    Subject {
        name: name.into(),
        start: vec![("image.vhdx".into(), start)],
        content,
        valid_from: ValidFrom::Start,
        write: &|files| write(files, None),
        read: &|files| read(files, None),
        rewrite: Some(&|files| write(files, None)),
        beside: Vec::new(),
        check: Some(&check_with_qemu),
    }
}

fn options(size_bytes: u64) -> VhdxCreateOptions {
    VhdxCreateOptions { block_size_bytes: Some(1 << 20), ..VhdxCreateOptions::new(size_bytes) }
}

fn created(options: &VhdxCreateOptions) -> Vec<u8> {
    let memory = Arc::new(MemoryDevice::new(0));
    drop(VhdxWriter::create_device(memory.clone(), options).unwrap());
    memory.to_bytes()
}

fn size_of(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

const SAMPLING: Sampling = Sampling {
    exhaustive_changes: 4,
    variants: 2,
    check_every: 60,
    rewrite_every: 25,
    near_flush: None,
};

#[test]
fn an_image_survives_every_cut() {
    let size = 3 * MIB - 4096;
    for (name, kind) in [("dynamic", VhdxKind::Dynamic), ("fixed", VhdxKind::Fixed)] {
        let start = created(&VhdxCreateOptions { kind, ..options(size) });
        let subject = subject(name, start, vec![0; size_of(size)]);
        let mut recording = Recording::begin(&subject);
        recording.random_steps(11, 6, 20_000);
        recording.finish();
        // Blocks come, go, and come back in the places of others.
        recording.write(MIB, &vec![1; size_of(MIB)]);
        recording.flush();
        recording.zero(ByteRange::new(0, 2 * MIB));
        recording.write(2 * MIB + 5, &[2; 70_000]);
        recording.flush();
        recording.write(300, &[3; 5000]);
        recording.write(MIB - 300, &[4; 5000]);
        recording.random_steps(12, 6, 600_000);
        recording.flush();
        recording.enumerate(&SAMPLING);
    }
}

#[test]
fn creating_leaves_a_whole_image_or_none() {
    for kind in [VhdxKind::Dynamic, VhdxKind::Fixed] {
        let options = VhdxCreateOptions { kind, ..options(2 * MIB) };
        let create = |files: &Files| -> Result<Arc<dyn ImageWriter>> {
            Ok(Arc::new(VhdxWriter::create_device(files.main(), &options)?))
        };
        let subject = Subject {
            valid_from: ValidFrom::Opened,
            write: &create,
            ..subject("creating", Vec::new(), vec![0; size_of(2 * MIB)])
        };
        let mut recording = Recording::begin(&subject);
        recording.random_steps(3, 3, 20_000);
        recording.flush();
        recording.enumerate(&SAMPLING);
    }
}

#[test]
fn a_child_survives_every_cut() {
    let below = pattern(2, size_of(2 * MIB) - 3000);
    let device = || -> Option<Arc<dyn BlockDevice>> {
        Some(Arc::new(MemoryDevice::from_bytes(below.clone())))
    };
    let size = 3 * MIB;
    for logical_sector_bytes in [512, 4096] {
        let options = VhdxCreateOptions {
            logical_sector_bytes,
            parent: device().map(|device| VhdxParent {
                identity: "b04aefb7-d19e-4a81-b789-25b8e9445913".into(),
                disk_id: None,
                relative_path: Some("parent.vhdx".into()),
                absolute_path: None,
                volume_path: None,
                device,
            }),
            ..options(size)
        };
        let mut content = below.clone();
        content.resize(size_of(size), 0);
        let subject = Subject {
            write: &|files| write(files, device()),
            read: &|files| read(files, device()),
            rewrite: Some(&|files| write(files, device())),
            check: None,
            ..subject("child", created(&options), content)
        };
        let mut recording = Recording::begin(&subject);
        recording.random_steps(11, 12, 20_000);
        recording.flush();
        // Partially present, zero, and present again; a block filled bit by bit.
        recording.write(MIB + 100, &[9; 1000]);
        recording.flush();
        recording.zero(ByteRange::new(MIB, MIB));
        recording.write(MIB + 5000, &[8; 1000]);
        recording.flush();
        recording.write(2 * MIB, &vec![7; size_of(MIB) - 700]);
        recording.write(3 * MIB - 700, &[6; 700]);
        recording.random_steps(13, 6, 600_000);
        recording.finish();
        recording.enumerate(&SAMPLING);
    }
}

#[test]
fn changing_the_size_survives_every_cut() {
    for kind in [VhdxKind::Dynamic, VhdxKind::Fixed] {
        let start = created(&VhdxCreateOptions { kind, ..options(2 * MIB) });
        let subject = subject("resize", start, vec![0; size_of(2 * MIB)]);
        let mut recording = Recording::begin(&subject);
        recording.write(1000, &vec![1; size_of(MIB)]);
        recording.flush();
        // The harness takes a shrunk part for lost only when it is zero: so it is.
        recording.zero(ByteRange::from_bounds(MIB / 2, 2 * MIB));
        recording.flush();
        recording.resize(MIB / 2);
        recording.flush();
        recording.resize(3 * MIB);
        recording.flush();
        recording.random_steps(5, 6, 200_000);
        recording.finish();
        recording.enumerate(&SAMPLING);
    }
}

/// The first bytes of a disk that is too large to be read whole.
struct Beginning<T>(T);

const SHOWN: u64 = 2 * MIB;
const GIB: u64 = 1 << 30;

impl<T: BlockDevice> BlockDevice for Beginning<T> {
    fn name(&self) -> String {
        self.0.name()
    }
    fn size_bytes(&self) -> u64 {
        SHOWN
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buffer, offset)
    }
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.0.extents(range)
    }
}

impl<T: WritableBlockDevice> WritableBlockDevice for Beginning<T> {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(data, offset)
    }
    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.0.write_zeroes(range)
    }
    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.0.resize(size_bytes)
    }
}

impl<T: ImageWriter> ImageWriter for Beginning<T> {
    fn finish(&self) -> Result<()> {
        self.0.finish()
    }
}

#[test]
fn the_block_table_moves_safely() {
    let open = |files: &Files| -> Result<Arc<dyn ImageWriter>> {
        Ok(Arc::new(Beginning(VhdxWriter::open_device(files.main(), None)?)))
    };
    let read = |files: &Files| -> Result<Arc<dyn BlockDevice>> {
        let image = VhdxImage::open_device(files.main(), None)?;
        let size = image.size_bytes();
        assert!([100 * GIB, 200 * GIB].contains(&size), "{size} bytes of disk");
        Ok(Arc::new(Beginning(image)))
    };
    let subject = Subject {
        write: &open,
        read: &read,
        rewrite: Some(&open),
        check: None,
        ..subject("moving the table", created(&options(100 * GIB)), vec![0; size_of(SHOWN)])
    };
    let mut recording = Recording::begin(&subject);
    recording.write(5000, &[7; 3000]);
    recording.flush();
    recording.write(9000, &[8; 3000]);
    recording.write_by(0, &[], |writer| writer.resize(200 * GIB));
    recording.flush();
    // The place of the old table is used again.
    recording.write(MIB + 5000, &[9; 3000]);
    recording.finish();
    recording.enumerate(&Sampling { variants: 4, rewrite_every: 7, ..SAMPLING });
}
