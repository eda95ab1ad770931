//! See `vmtide_repo::fuzzing::key_slot`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_repo::fuzzing::key_slot(input));
