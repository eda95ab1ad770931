//! See `vmtide_bacula::fuzzing::bacula`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_bacula::fuzzing::bacula(input));
