//! See `vmtide_cim::fuzzing::xml`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_cim::fuzzing::xml(input));
