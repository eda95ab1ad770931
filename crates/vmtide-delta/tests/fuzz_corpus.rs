//! The fuzz target's function over its seeds, and mutations of them. `VMTIDE_WRITE_SEEDS=1` makes the
//! seeds anew; `VMTIDE_FUZZ_ROUNDS` says how many mutations of each (400).

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test, in helpers of tests, too"
)]

use std::path::PathBuf;
use vmtide_block::{CancelToken, MemoryDevice, Progress, RangeSet};
use vmtide_delta::{CreateOptions, DeltaHeader, DeltaSource, create_delta, fuzzing};

fn seed_directory() -> PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/delta").into()
}

fn seed(level: Option<i32>, base_digests: bool, sizes: (usize, usize), mode: u8) -> Vec<u8> {
    let disk = |size: usize, step: usize| {
        let bytes = (0..size)
            .map(|at| if at / 4096 % 3 == 1 { 0 } else { u8::try_from(at / step % 251).unwrap() });
        MemoryDevice::from_bytes(bytes.collect())
    };
    let (base, device) = (disk(sizes.0, 4096), disk(sizes.1, 700));
    let changed = RangeSet::full(sizes.1 as u64);
    let source = DeltaSource { device: &device, base: Some(&base), changed: &changed };
    let header =
        DeltaHeader { max_frame_bytes: 8192, ..DeltaHeader::new(sizes.0 as u64, sizes.1 as u64) };
    let options = CreateOptions { level, workers: 1, differing_only: true, base_digests };
    let mut out = vec![mode];
    create_delta(&source, &header, &options, &mut out, &Progress::new(), &CancelToken::new())
        .unwrap();
    out
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("same_size", seed(Some(1), true, (20_000, 20_000), 1)),
        ("grown", seed(Some(1), false, (5_000, 30_000), 1)),
        ("shrunk_plain", seed(None, true, (30_000, 9_000), 1)),
        ("as_it_is", seed(Some(3), true, (16_384, 16_384), 0)),
        ("empty", seed(Some(1), true, (0, 0), 1)),
    ]
}

#[test]
fn the_seeds_and_what_mutations_make_of_them() {
    let write = std::env::var_os("VMTIDE_WRITE_SEEDS").is_some();
    let rounds: u32 = std::env::var("VMTIDE_FUZZ_ROUNDS").map_or(400, |text| text.parse().unwrap());
    // Another number of mutations are other mutations.
    let mut state = 7 + u64::from(rounds);
    let mut random = |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % below.max(1)
    };
    for (name, seed) in seeds() {
        let path = seed_directory().join(name);
        if write {
            std::fs::create_dir_all(seed_directory()).unwrap();
            std::fs::write(&path, &seed).unwrap();
        }
        let stored =
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        fuzzing::delta(&stored);
        fuzzing::delta(&seed);
        for _ in 0..rounds {
            let mut mutated = stored.clone();
            for _ in 0..1 + random(4) {
                let at = random(mutated.len());
                match random(4) {
                    0 => mutated[at] ^= 1 << random(8),
                    1 => mutated[at] = [0, 0xff, 0x7f, 1][random(4)],
                    2 => mutated.truncate(at.max(1)),
                    _ => {
                        let byte = mutated[random(mutated.len())];
                        mutated.insert(at, byte);
                    }
                }
            }
            fuzzing::delta(&mutated);
        }
    }
}
