//! See `vmtide_image::fuzzing::qcow2_write`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_image::fuzzing::qcow2_write(input));
