//! See `vmtide_repo::fuzzing::forward`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_repo::fuzzing::forward(input));
