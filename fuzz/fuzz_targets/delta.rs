//! See `vmtide_delta::fuzzing::delta`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_delta::fuzzing::delta(input));
