//! Every moment at which the qcow2 writer can be cut off leaves a valid image with all flushed
//! data; qemu-img finds leaked clusters at worst.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::sync::Arc;
use support::crash::{Files, Recording, Sampling, Subject, ValidFrom};
use support::{check_no_damage, path, pattern, qemu_img, qemu_io, raw_file};
use vmtide_block::{BlockDevice, MemoryDevice, Result, WritableBlockDevice};
use vmtide_image::qcow2::{
    Companions, CreateBacking, Qcow2CreateOptions, Qcow2Image, Qcow2Version, Qcow2Writer,
};
use vmtide_image::{Compression, Format, ImageWriter};

fn read(files: &Files, backing: Option<Arc<dyn BlockDevice>>) -> Result<Arc<dyn BlockDevice>> {
    let companions = Companions { backing, data_file: None };
    Ok(Arc::new(Qcow2Image::open_device(files.main(), companions)?))
}

fn write(files: &Files, backing: Option<Arc<dyn BlockDevice>>) -> Result<Arc<dyn ImageWriter>> {
    Ok(Arc::new(Qcow2Writer::open_device(files.main(), backing, None)?))
}

/// An image without a backing file that is there before the workload.
fn subject(name: String, start: Vec<u8>, content: Vec<u8>) -> Subject<'static> {
    Subject {
        name,
        start: vec![("image.qcow2".into(), start)],
        content,
        valid_from: ValidFrom::Start,
        write: &|files| write(files, None),
        read: &|files| read(files, None),
        rewrite: Some(&|files| write(files, None)),
        beside: Vec::new(),
        check: Some(&check_no_damage),
    }
}

fn created(options: &Qcow2CreateOptions) -> Vec<u8> {
    let memory = Arc::new(MemoryDevice::new(0));
    drop(Qcow2Writer::create_device(memory.clone(), options).unwrap());
    memory.to_bytes()
}

/// 512-byte clusters: refcount blocks and the refcount table grow during the work.
fn shapes(size: u64) -> Vec<Qcow2CreateOptions> {
    [(9, Qcow2Version::V2, false), (12, Qcow2Version::V3, false), (14, Qcow2Version::V3, true)]
        .into_iter()
        .map(|(bits, version, extended_l2)| Qcow2CreateOptions {
            cluster_size_bytes: 1 << bits,
            version,
            extended_l2,
            ..Qcow2CreateOptions::new(size)
        })
        .collect()
}

#[test]
fn a_new_image_survives_every_cut() {
    for options in shapes(120_000) {
        let name = format!("clusters of {}", options.cluster_size_bytes);
        let subject = subject(name, created(&options), vec![0; 120_000]);
        let mut recording = Recording::begin(&subject);
        recording.random_steps(u64::from(options.cluster_size_bytes), 16, 20_000);
        recording.finish();
        recording.enumerate(&Sampling::default());
    }
}

#[test]
fn compressed_clusters_that_share_a_cluster_of_the_file_survive_every_cut() {
    let content = pattern(4, 250_000);
    for (bits, compression) in [(12, Compression::Zlib), (16, Compression::Zstd)] {
        let options = Qcow2CreateOptions {
            cluster_size_bytes: 1 << bits,
            compression,
            compress: true,
            ..Qcow2CreateOptions::new(content.len() as u64)
        };
        let create = |files: &Files| -> Result<Arc<dyn ImageWriter>> {
            Ok(Arc::new(Qcow2Writer::create_device(files.main(), &options)?))
        };
        let subject = Subject {
            valid_from: ValidFrom::Opened,
            write: &create,
            ..subject(format!("compressed, {bits} bits"), Vec::new(), vec![0; content.len()])
        };
        let mut recording = Recording::begin(&subject);
        for (index, data) in content.chunks(1 << bits).enumerate() {
            let at = (index << bits) as u64;
            if data.iter().any(|byte| *byte != 0) {
                recording.write_by(at, data, |writer| {
                    let compressed = writer.compressed().unwrap();
                    compressed.append(at, compressed.compress(data)?)
                });
            }
            match index % 13 {
                // Overwritten, so that places between compressed clusters become free.
                7 => recording.write(at / 2, &[6; 3000]),
                3 | 11 => recording.flush(),
                _ => {}
            }
        }
        recording.finish();
        recording.enumerate(&Sampling::default());
    }
}

#[test]
fn creating_leaves_a_whole_image_or_none() {
    for options in shapes(120_000) {
        let name = format!("creating with clusters of {}", options.cluster_size_bytes);
        let create = |files: &Files| -> Result<Arc<dyn ImageWriter>> {
            Ok(Arc::new(Qcow2Writer::create_device(files.main(), &options)?))
        };
        let subject = Subject {
            valid_from: ValidFrom::Opened,
            write: &create,
            ..subject(name, Vec::new(), vec![0; 120_000])
        };
        let mut recording = Recording::begin(&subject);
        recording.random_steps(3, 3, 20_000);
        recording.flush();
        recording.enumerate(&Sampling { check_every: 7, ..Sampling::default() });
    }
}

#[test]
fn growing_the_disk_leaves_the_old_size_or_the_new() {
    for options in shapes(60_000) {
        let name = format!("growing with clusters of {}", options.cluster_size_bytes);
        let subject = subject(name, created(&options), vec![0; 60_000]);
        let mut recording = Recording::begin(&subject);
        recording.write(50_000, &[8; 10_000]);
        recording.resize(1_300_000);
        recording.write(55_000, &[9; 10_000]);
        recording.flush();
        recording.enumerate(&Sampling::default());
    }
}

#[test]
fn the_refcount_table_moves_safely() {
    let options =
        Qcow2CreateOptions { cluster_size_bytes: 512, ..Qcow2CreateOptions::new(9 << 20) };
    let memory = Arc::new(MemoryDevice::new(0));
    let writer = Qcow2Writer::create_device(memory.clone(), &options).unwrap();
    let mut content = vec![5u8; 8_100_000];
    writer.write_at(&content, 0).unwrap();
    writer.flush().unwrap();
    drop(writer);
    content.resize(9 << 20, 0);
    // The next writes pass 8 MiB of file, which is what a table of one cluster counts.
    let subject = subject("table move".into(), memory.to_bytes(), content);
    let mut recording = Recording::begin(&subject);
    for step in 0..4 {
        recording.write(8_200_000 + step * 200_000, &[9; 150_000]);
        recording.flush();
    }
    let table_of = |bytes: Vec<u8>| bytes[48..56].to_vec();
    assert_ne!(table_of(recording.files().main().to_bytes()), table_of(memory.to_bytes()));
    // Most operations are data; the interesting ones are near flushes.
    recording.enumerate(&Sampling {
        near_flush: Some(3),
        exhaustive_changes: 2,
        variants: 1,
        check_every: 4,
        rewrite_every: 10,
    });
}

#[test]
fn an_overlay_survives_every_cut() {
    let below = pattern(2, 90_000);
    let device = Arc::new(MemoryDevice::from_bytes(below.clone())) as Arc<dyn BlockDevice>;
    let options = Qcow2CreateOptions {
        cluster_size_bytes: 4096,
        backing: Some(CreateBacking {
            name: "base.raw".into(),
            format: Format::Raw,
            device: device.clone(),
        }),
        ..Qcow2CreateOptions::new(120_000)
    };
    let mut content = below.clone();
    content.resize(120_000, 0);
    let subject = Subject {
        write: &|files| write(files, Some(device.clone())),
        read: &|files| read(files, Some(device.clone())),
        rewrite: Some(&|files| write(files, Some(device.clone()))),
        beside: vec![("base.raw".into(), below)],
        ..subject("overlay".into(), created(&options), content)
    };
    let mut recording = Recording::begin(&subject);
    recording.random_steps(5, 16, 20_000);
    recording.finish();
    recording.enumerate(&Sampling::default());
}

#[test]
fn an_image_with_a_snapshot_and_compression_survives_every_cut() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    let mut content = pattern(8, 122_880);
    let raw = raw_file(directory.path(), "disk.raw", &content);
    qemu_img(&[
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-o",
        "cluster_size=4096",
        path(&raw),
        path(&image),
    ]);
    qemu_img(&["snapshot", "-c", "kept", path(&image)]);
    qemu_io(&image, &["-f", "qcow2"], &["write -P 3 30k 20k"]);
    content[30 << 10..50 << 10].fill(3);
    let subject = subject("snapshot".into(), std::fs::read(&image).unwrap(), content);
    let mut recording = Recording::begin(&subject);
    recording.random_steps(6, 16, 20_000);
    recording.finish();
    recording.enumerate(&Sampling::default());
}
