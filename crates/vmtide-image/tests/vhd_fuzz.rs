//! The fuzz targets of VHD over their seeds, and over every seed cut short and with bytes changed.
//!
//! The seeds are kept for the fuzzer too, in `fuzz/seeds`; with `VMTIDE_WRITE_SEEDS=1` set, this
//! test writes them there.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::Path;
use std::sync::Arc;
use vmtide_block::{MemoryDevice, WritableBlockDevice};
use vmtide_image::ImageWriter;
use vmtide_image::fuzzing::{pack, vhd_read, vhd_write};
use vmtide_image::vhd::{VhdCreateOptions, VhdKind, VhdParent, VhdWriter};

/// The number of places in each seed where bytes are changed.
const MUTATIONS: usize = 150;

/// An image that we made, without what is random in it: ids and times.
fn image(kind: VhdKind, size: u64, data: &[u8]) -> Vec<u8> {
    let options = VhdCreateOptions { kind, block_size_bytes: 4096, ..VhdCreateOptions::new(size) };
    let memory = Arc::new(MemoryDevice::new(0));
    let writer = VhdWriter::create_device(memory.clone(), &options).unwrap();
    writer.write_at(data, 3000).unwrap();
    writer.finish().unwrap();
    let mut bytes = memory.to_bytes();
    let end = bytes.len() - 512;
    for footer in [0, end] {
        if bytes[footer..].starts_with(b"conectix") {
            bytes[footer + 24..footer + 28].fill(1);
            bytes[footer + 68..footer + 84].fill(2);
            bytes[footer + 64..footer + 68].fill(0);
            let sum: u32 = bytes[footer..footer + 512].iter().map(|byte| u32::from(*byte)).sum();
            bytes[footer + 64..footer + 68].copy_from_slice(&(!sum).to_be_bytes());
        }
    }
    bytes
}

fn differencing() -> VhdKind {
    VhdKind::Differencing(VhdParent {
        name: "parent.vhd".into(),
        absolute_path: Some("C:\\parent.vhd".into()),
        identity: "5fa21a55-f394-aa4d-9958-1951a67d5540".into(),
        device: Arc::new(MemoryDevice::from_bytes(vec![0xaa; 300_000])),
    })
}

fn images() -> Vec<(&'static str, Vec<u8>)> {
    let plain = |mode: u8, bytes: Vec<u8>| [vec![mode], bytes].concat();
    let sparse = |mode: u8, bytes: Vec<u8>| {
        [vec![mode], pack(&MemoryDevice::from_bytes(bytes)).unwrap()].concat()
    };
    vec![
        ("fixed", plain(5, image(VhdKind::Fixed, 8192, &[1; 700]))),
        ("dynamic", plain(5, image(VhdKind::Dynamic, 40_960, &[2; 3000]))),
        ("dynamic-sealed", plain(4, image(VhdKind::Dynamic, 40_960, &[2; 900]))),
        ("child", sparse(3, image(differencing(), 300_032, &[3; 3000]))),
        ("no-trailer", sparse(1, image(VhdKind::Dynamic, 900_096, &[4; 9000]))),
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
        keep("image_vhd_read", name, &seed);
        mutate(vhd_read, &seed);
    }
}

#[test]
fn seeds_of_the_writer_and_their_mutations() {
    for (name, seed) in images() {
        keep("image_vhd_write", name, &seed);
        mutate(vhd_write, &seed);
    }
    for kind in 0..3u8 {
        for mode in [8, 10] {
            let mut seed = vec![mode, kind, 0, kind, 0, 0x77, kind, 3, 0];
            for step in 0..24u8 {
                seed.extend([step, step + 1, step.wrapping_mul(37), step * 2, 9, step * 3]);
            }
            keep("image_vhd_write", &format!("new-{kind}-{mode}"), &seed);
            mutate(vhd_write, &seed);
        }
    }
}
