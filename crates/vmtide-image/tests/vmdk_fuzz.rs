//! The fuzz targets of VMDK over their seeds, and over every seed cut short and with bytes changed.
//!
//! The seeds are kept for the fuzzer too, in `fuzz/seeds`; with `VMTIDE_WRITE_SEEDS=1` set, this
//! test writes them there.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::support;

use std::path::Path;
use std::sync::Arc;
use support::vmdk::{Hole, MemoryFiles, StreamEnd, cowd, descriptor, sesparse, stream};
use vmtide_block::{MemoryDevice, WritableBlockDevice};
use vmtide_image::ImageWriter;
use vmtide_image::fuzzing::{pack, vmdk_read, vmdk_write};
use vmtide_image::vmdk::{VmdkCreateOptions, VmdkWriter};

/// The number of places in each seed where bytes are changed.
const MUTATIONS: usize = 150;

fn content() -> Vec<u8> {
    let mut content = vec![0; 200_192];
    content[600..900].fill(1);
    content[70_000..70_100].fill(2);
    content[200_000..].fill(3);
    content
}

fn packed(mode: u8, bytes: &[u8]) -> Vec<u8> {
    [vec![mode], pack(&MemoryDevice::from_bytes(bytes.to_vec())).unwrap()].concat()
}

fn with_text(text: &str, extent: &[u8]) -> Vec<u8> {
    let length = u16::try_from(text.len()).unwrap().to_le_bytes();
    let extent = pack(&MemoryDevice::from_bytes(extent.to_vec())).unwrap();
    [&[4][..], &length, text.as_bytes(), &extent].concat()
}

/// A sparse image that we made, without what is random in it.
fn hosted() -> Vec<u8> {
    let options = VmdkCreateOptions { grain_size_bytes: 4096, ..VmdkCreateOptions::new(200_192) };
    let files = MemoryFiles::default();
    let writer = VmdkWriter::create_files("disk.vmdk", &options, &mut |name| {
        let device = Arc::new(MemoryDevice::new(0));
        files.put(name, device.clone());
        Ok(device)
    })
    .unwrap();
    writer.write_at(&content()[..80_000], 0).unwrap();
    writer.finish().unwrap();
    let mut bytes = files.get("disk.vmdk").to_bytes();
    let text = descriptor("monolithicSparse", None, "RW 391 SPARSE \"disk.vmdk\"");
    bytes[512..512 + 10_240].fill(0);
    bytes[512..512 + text.len()].copy_from_slice(text.as_bytes());
    bytes
}

fn images() -> Vec<(&'static str, Vec<u8>)> {
    let content = content();
    let text = descriptor("streamOptimized", None, "RW 391 SPARSE \"x\"");
    let plain = |mode: u8, bytes: Vec<u8>| [vec![mode], bytes].concat();
    let child = descriptor("vmfsSparse", Some(("1", "p")), "RW 391 VMFSSPARSE \"x\"");
    let mixed = descriptor("custom", None, "RW 9 FLAT \"x\" 1\nRW 7 ZERO\nRDONLY 391 SPARSE \"x\"");
    // The sectors between the descriptor and the first grain are not worth their bytes.
    let short = |mut bytes: Vec<u8>| {
        bytes[64..72].copy_from_slice(&22u64.to_le_bytes());
        bytes
    };
    vec![
        ("hosted", packed(0, &hosted())),
        ("stream", packed(0, &short(stream(&content, &text, StreamEnd::FrontDirectory)))),
        ("stream-scanned", packed(0, &stream(&content, &text, StreamEnd::BadFooter))),
        ("stream-footer", plain(1, stream(&content[..4096], &text, StreamEnd::Footer))),
        ("cowd-child", [&[6][..], &with_text(&child, &cowd(&content, 1))[1..]].concat()),
        ("sesparse", packed(0, &sesparse(&content, Hole::Zero))),
        ("mixed", with_text(&mixed, &hosted())),
    ]
}

fn mutate(target: fn(&[u8]), seed: &[u8]) {
    target(seed);
    let stride = (seed.len() / MUTATIONS).max(1);
    for (round, at) in (0..seed.len()).step_by(stride).enumerate() {
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

fn keep(target: &str, name: &str, seed: &[u8]) {
    let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target);
    if std::env::var_os("VMTIDE_WRITE_SEEDS").is_some() {
        std::fs::create_dir_all(&home).unwrap();
        std::fs::write(home.join(name), seed).unwrap();
    }
    let kept = std::fs::read(home.join(name)).unwrap_or_default();
    assert!(kept == seed, "{name}: another seed is kept; see the top of this file");
}

#[test]
fn seeds_of_the_reader_and_their_mutations() {
    for (name, seed) in images() {
        keep("image_vmdk_read", name, &seed);
        mutate(vmdk_read, &seed);
    }
}

#[test]
fn seeds_of_the_writer_and_their_mutations() {
    for (name, seed) in images() {
        if name == "hosted" || name == "mixed" {
            keep("image_vmdk_write", name, &seed);
            mutate(vmdk_write, &seed);
        }
    }
    for kind in 0..6u8 {
        for mode in [8, 10] {
            let mut seed = vec![mode, kind, 0, kind, 0, 0x77, kind, 3, 0];
            for step in 0..20u8 {
                seed.extend([step, step + 1, step.wrapping_mul(37), step * 2, 9, step * 3]);
            }
            keep("image_vmdk_write", &format!("new-{kind}-{mode}"), &seed);
            mutate(vmdk_write, &seed);
        }
    }
}
