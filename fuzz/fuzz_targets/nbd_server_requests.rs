//! See `vmtide_nbd::fuzzing::server_requests`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_nbd::fuzzing::server_requests(input));
