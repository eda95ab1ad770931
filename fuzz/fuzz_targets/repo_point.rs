//! See `vmtide_repo::fuzzing::restore_point`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_repo::fuzzing::restore_point(input));
