//! See `vmtide_repo::fuzzing::index_segment`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_repo::fuzzing::index_segment(input));
