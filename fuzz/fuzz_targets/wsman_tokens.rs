//! See `vmtide_wsman::fuzzing::tokens`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_wsman::fuzzing::tokens(input));
