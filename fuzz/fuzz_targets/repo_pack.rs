//! See `vmtide_repo::fuzzing::pack`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_repo::fuzzing::pack(input));
