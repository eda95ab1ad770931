//! See `vmtide_image::fuzzing::vmdk_read`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_image::fuzzing::vmdk_read(input));
