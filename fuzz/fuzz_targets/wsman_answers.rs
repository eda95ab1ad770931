//! See `vmtide_wsman::fuzzing::answers`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_wsman::fuzzing::answers(input));
