//! See `vmtide_repo::fuzzing::config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_repo::fuzzing::config(input));
