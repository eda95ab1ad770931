//! The fuzz targets of the VHDX reader and writer over their seeds, and over every seed cut short
//! and with bytes changed.
//!
//! The seeds are kept for the fuzzer too, in `fuzz/seeds`; with `VMTIDE_WRITE_SEEDS=1` set, this
//! test writes them there.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use crate::support::vhdx;

use std::path::Path;
use vhdx::{BAT_AT, Entry, FULL, Image, MIB, PARTIAL, UNMAPPED, ZERO, guid, put};
use vmtide_block::WritableBlockDevice;
use vmtide_image::fuzzing::{SparseFile, pack, vhdx_read, vhdx_write};

/// The number of changed inputs that are tried of each seed.
const MUTATIONS: usize = 400;

fn seed(image: &Image, mode: u8) -> Vec<u8> {
    let file = SparseFile::new();
    image.write(&file);
    // The input's size is in whole MiB.
    let size_bytes = vmtide_block::BlockDevice::size_bytes(&file);
    file.resize(size_bytes.next_multiple_of(MIB)).unwrap();
    [vec![mode], pack(&file).unwrap()].concat()
}

fn dynamic() -> Image {
    let mut image = Image::new(9 * MIB, 2 * MIB);
    let at = image.payload_at();
    image.block(0, FULL, at);
    image.block(1, ZERO, at);
    image.block(2, UNMAPPED, 0);
    image.block(4, FULL, at + 2 * MIB);
    image.data = vec![(at + 4096, vec![1; 600]), (at + 2 * MIB + 512, vec![2; 9])];
    image.file_bytes = at + 4 * MIB;
    image
}

fn child() -> Image {
    let mut image = Image::child(5 * MIB, MIB);
    let at = image.payload_at();
    image.bitmap(0, FULL, at);
    image.block(0, PARTIAL, at + MIB);
    image.block(1, FULL, at + 2 * MIB);
    image.block(3, PARTIAL, at + 3 * MIB);
    image.block(4, ZERO, 0);
    let mut bitmap = vec![0x0f; 40];
    bitmap.extend([0xff; 100]);
    image.data = vec![(at, bitmap), (at + MIB, vec![3; 700]), (at + 3 * MIB, vec![4; 99])];
    image.file_bytes = at + 4 * MIB;
    image
}

fn dirty() -> Image {
    let mut image = dynamic();
    image.log_guid = guid("0A0B0C0D-1111-2222-3333-444455556666");
    let mut page = [0; 4096];
    put(&mut page, 8, &((image.payload_at() + 2 * MIB) | FULL).to_le_bytes());
    let entry = |sequence, tail, pages: &[_], zeros: &[_]| {
        Entry { guid: image.log_guid, sequence, tail, flushed: 0, last: 9 * MIB, pages, zeros }
            .bytes()
    };
    let (pages, zeros) = ([(BAT_AT, page)], [(image.payload_at(), 8192)]);
    let first = entry(8, 0, &pages, &[]);
    let second = entry(9, 0, &[], &zeros);
    image.log = vec![(0, first), (8192, second)];
    image
}

fn mutate(target: fn(&[u8]), seed: &[u8], mutations: usize) {
    target(seed);
    let stride = (seed.len() * 4 / mutations).max(1);
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

/// Holds the seed against the one that is kept, then runs the target on it and on changes of it.
fn run(target: fn(&[u8]), target_name: &str, name: &str, seed: &[u8], mutations: usize) {
    assert!(seed.len() < 16 << 10, "{name} has {} bytes", seed.len());
    let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target_name);
    if std::env::var_os("VMTIDE_WRITE_SEEDS").is_some() {
        std::fs::create_dir_all(&home).unwrap();
        std::fs::write(home.join(name), seed).unwrap();
    }
    let kept = std::fs::read(home.join(name)).unwrap_or_default();
    assert!(kept == seed, "{name}: another seed is kept; see the top of this file");
    mutate(target, seed, mutations);
}

#[test]
fn seeds_and_their_mutations() {
    for (name, seed) in [
        ("dynamic", seed(&dynamic(), 1)),
        ("child", seed(&child(), 3)),
        ("child-alone", seed(&child(), 1)),
        ("dirty-log", seed(&dirty(), 1)),
    ] {
        run(vhdx_read, "image_vhdx_read", name, &seed, MUTATIONS);
    }
}

/// Operations of the writer's target: kind, value, place, fine place, length.
const OPERATIONS: [(u8, u8, u16, u16, u16); 14] = [
    (0, 9, 0, 300, 5000),
    (1, 8, 0x4000, 0, 60_000),
    (6, 0, 0, 0, 0),
    // Whole blocks of zeros, then a part of one.
    (3, 1, 0x2000, 0, 1000),
    (4, 0, 0x4000, 512, 4096),
    (2, 7, 0x2000, 4096, 512),
    // A disk of 2048 sectors more or less, then a large one.
    (5, 0, 0, 2000, 0),
    (7, 0, 0, 0, 0),
    (5, 0, 0, 30_000, 0),
    (0, 6, 0xffff, 0, 9000),
    (6, 0, 0, 0, 0),
    (3, 1, 0, 0, 60_000),
    (0, 5, 0x8000, 1, 30_000),
    (5, 8, 0, 60_000, 0),
];

fn operations(mode: u8, rest: &[u8]) -> Vec<u8> {
    let mut seed = vec![mode, u8::try_from(OPERATIONS.len()).unwrap()];
    for (kind, value, place, fine, length) in OPERATIONS {
        seed.extend([kind, value]);
        for number in [place, fine, length] {
            seed.extend(number.to_le_bytes());
        }
    }
    seed.extend(rest);
    seed
}

#[test]
fn the_writer_on_seeds_and_their_mutations() {
    // What a new image is like: the block size in powers of two over 1 MiB, 4096 byte sectors
    // (16), fixed (32); then the number of sectors.
    for (name, seed) in [
        ("new-dynamic", operations(4, &[1, 0, 64, 0, 0])),
        ("new-fixed", operations(4, &[32, 0, 32, 0, 0])),
        ("new-child", operations(6, &[16, 0, 8, 0, 0])),
        ("dynamic", operations(1, &seed(&dynamic(), 0)[1..])),
        ("child", operations(3, &seed(&child(), 0)[1..])),
        ("dirty-log", operations(1, &seed(&dirty(), 0)[1..])),
    ] {
        run(vhdx_write, "image_vhdx_write", name, &seed, MUTATIONS / 4);
    }
}
