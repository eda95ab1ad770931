//! The fuzz targets over their seeds, and over every seed cut short and with bytes changed.
//!
//! The seeds are kept for the fuzzer too, in `fuzz/seeds`; with `VMTIDE_WRITE_SEEDS=1` set, these tests write them there.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::path::Path;
use vmtide_track::fuzzing;

fn run(target: &str, fuzz: fn(&[u8]), seed: &[u8]) {
    let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target);
    if std::env::var_os("VMTIDE_WRITE_SEEDS").is_some() {
        std::fs::create_dir_all(&home).unwrap();
        std::fs::write(home.join("sound"), seed).unwrap();
    }
    let kept = std::fs::read(home.join("sound")).unwrap_or_default();
    assert!(kept == seed, "{target}: another seed is kept; see the top of this file");
    fuzz(seed);
    for length in 0..seed.len() {
        fuzz(&seed[..length]);
        for value in [0, 0xff, seed[length].wrapping_add(1)] {
            let mut changed = seed.to_vec();
            changed[length] = value;
            fuzz(&changed);
        }
    }
}

#[test]
fn files_and_ids() {
    run("track_rct", fuzzing::rct, &fuzzing::rct_seed());
    run("track_mrt", fuzzing::mrt, &fuzzing::mrt_seed());
    run("track_id", fuzzing::id, b"rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:00000001");
}
