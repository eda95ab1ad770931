//! See `vmtide_image::fuzzing::vhd_read`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_image::fuzzing::vhd_read(input));
