//! See `vmtide_hyperv::fuzzing::settings`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_hyperv::fuzzing::settings(input));
