//! See `vmtide_image::fuzzing::vhdx_write`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_image::fuzzing::vhdx_write(input));
