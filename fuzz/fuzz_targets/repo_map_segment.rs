//! See `vmtide_repo::fuzzing::map_segment`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_repo::fuzzing::map_segment(input));
