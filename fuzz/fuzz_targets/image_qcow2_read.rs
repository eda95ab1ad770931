//! See `vmtide_image::fuzzing::qcow2_read`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_image::fuzzing::qcow2_read(input));
