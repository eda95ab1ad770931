//! The fuzz targets of qcow2 over their seeds, and over every seed cut short and with bytes changed.
//!
//! The seeds are kept for the fuzzer too, in `fuzz/seeds`; with `VMTIDE_WRITE_SEEDS=1` set, this
//! test writes them there.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::path::Path;
use support::{path, qemu_img, qemu_io, raw_file};
use vmtide_block::MemoryDevice;
use vmtide_image::fuzzing::{pack, qcow2_read, qcow2_write};

/// The number of places in each seed where bytes are changed.
const MUTATIONS: usize = 60;

fn disk() -> Vec<u8> {
    let mut disk = vec![0; 150_000];
    disk[..900].fill(1);
    disk[70_000..70_600].fill(2);
    disk
}

/// An image that QEMU makes of [`disk`], with a snapshot and, in version 3, a bitmap.
fn image(options: &str, compressed: bool) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let raw = raw_file(directory.path(), "disk.raw", &disk());
    let image = directory.path().join("image.qcow2");
    let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
    arguments.extend(compressed.then_some("-c"));
    arguments.extend([path(&raw), path(&image)]);
    qemu_img(&arguments);
    qemu_img(&["snapshot", "-c", "kept", path(&image)]);
    if !options.contains("0.10") {
        qemu_img(&["bitmap", "--add", "-g", "64k", path(&image), "dirty"]);
    }
    qemu_io(&image, &["-f", "qcow2"], &["write -P 3 1k 1k", "write -z 64k 8k"]);
    let mut bytes = std::fs::read(&image).unwrap();
    // The moment of the snapshot, so that the seed is always the same.
    let table = usize::try_from(u64::from_be_bytes(bytes[64..72].try_into().unwrap())).unwrap();
    bytes[table + 16..table + 32].fill(0);
    bytes
}

fn packed(mode: u8, bytes: &[u8]) -> Vec<u8> {
    [vec![mode], pack(&MemoryDevice::from_bytes(bytes.to_vec())).unwrap()].concat()
}

fn images() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("v2", packed(0, &image("compat=0.10,cluster_size=512", false))),
        ("v3", packed(0, &image("cluster_size=4k", false))),
        ("deflate", packed(0, &image("cluster_size=4k", true))),
        ("zstd", packed(0, &image("cluster_size=8k,compression_type=zstd", true))),
        ("extended", packed(0, &image("cluster_size=16k,extended_l2=on", false))),
        ("backed", packed(2, &image("cluster_size=2k,refcount_bits=2", false))),
    ]
}

fn workload(shape: u16, mode: u8) -> Vec<u8> {
    let mut input = vec![8 | mode];
    input.extend(shape.to_le_bytes());
    input.extend(400_000u32.to_le_bytes());
    for step in 0..40u16 {
        input.extend([(step * 7).to_le_bytes()[0], 40 + step.to_le_bytes()[0]]);
        input.extend((step * 577).to_le_bytes());
        input.extend((step * 113 + 9).to_le_bytes());
    }
    input
}

fn mutate(target: fn(&[u8]), seed: &[u8]) {
    target(seed);
    let stride = (seed.len() / MUTATIONS).max(1);
    // The header is where most is decided.
    for (round, at) in
        (0..130.min(seed.len())).step_by(3).chain((130..seed.len()).step_by(stride)).enumerate()
    {
        if round % 8 == 0 {
            target(&seed[..at]);
        }
        for value in [0, 0xff, seed[at].wrapping_add(1)] {
            let mut changed = seed.to_vec();
            changed[at] = value;
            target(&changed);
        }
    }
}

fn run(target_name: &str, target: fn(&[u8]), seeds: &[(&str, Vec<u8>)]) {
    let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target_name);
    for (name, seed) in seeds {
        assert!(seed.len() < 24 << 10, "{name} has {} bytes", seed.len());
        if std::env::var_os("VMTIDE_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(&home).unwrap();
            std::fs::write(home.join(name), seed).unwrap();
        }
        // What QEMU makes may differ from version to version, so the kept ones are tried, too.
        let kept = std::fs::read(home.join(name)).unwrap();
        mutate(target, seed);
        if kept != *seed {
            mutate(target, &kept);
        }
    }
}

#[test]
fn reading_seeds_and_their_mutations() {
    run("image_qcow2_read", qcow2_read, &images());
}

#[test]
fn writing_seeds_and_their_mutations() {
    let mut seeds = images();
    seeds.retain(|(name, _)| matches!(*name, "v2" | "deflate" | "extended"));
    for (name, shape, mode) in
        [("new-512", 0, 0), ("new-v2", 0x103, 2), ("new-extended", 0x605, 2), ("new-64k", 0x407, 0)]
    {
        seeds.push((name, workload(shape, mode)));
    }
    run("image_qcow2_write", qcow2_write, &seeds);
}
