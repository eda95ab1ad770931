//! See `vmtide_virtdisk_ffi::fuzzing::answers`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_virtdisk_ffi::fuzzing::answers(input));
