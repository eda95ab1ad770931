//! The fuzz targets' functions over their seeds and many mutations of these, so that neither can rot.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use proptest::prelude::*;
use std::path::Path;

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target);
    let entries = std::fs::read_dir(directory).unwrap();
    let seeds: Vec<_> =
        entries.map(|entry| std::fs::read(entry.unwrap().path()).unwrap()).collect();
    assert!(!seeds.is_empty());
    seeds
}

/// A seed with some bytes replaced, taken away or put in.
fn mutated(target: &'static str) -> impl Strategy<Value = Vec<u8>> {
    let edits = prop::collection::vec(
        (
            any::<prop::sample::Index>(),
            0..3u8,
            prop::sample::select(b"/\\.:%~?=,0aC \0\x80\xc0".to_vec()),
        ),
        0..8,
    );
    (prop::sample::select(seeds(target)), edits).prop_map(|(mut seed, edits)| {
        for (at, kind, byte) in edits {
            let at = at.index(seed.len().max(1));
            match kind {
                0 if at < seed.len() => seed[at] = byte,
                1 if at < seed.len() => drop(seed.remove(at)),
                _ => seed.insert(at.min(seed.len()), byte),
            }
        }
        seed
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn requests(input in mutated("agent_request")) {
        vmtide_agent::fuzzing::agent_request(&input);
    }

    #[test]
    fn frames(input in mutated("agent_frames")) {
        vmtide_agent::fuzzing::agent_frames(&input);
    }

    #[test]
    fn ranges(input in mutated("agent_ranges")) {
        vmtide_agent::fuzzing::agent_ranges(&input);
    }

    #[test]
    fn vm_calls(input in mutated("agent_vm_calls")) {
        vmtide_agent::fuzzing::agent_vm_calls(&input);
    }

    #[test]
    fn keys(input in mutated("agent_keys")) {
        vmtide_agent::fuzzing::agent_keys(&input);
    }
}
