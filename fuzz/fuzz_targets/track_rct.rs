//! See `vmtide_track::fuzzing::rct`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_track::fuzzing::rct(input));
