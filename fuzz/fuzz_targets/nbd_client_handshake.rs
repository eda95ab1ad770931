//! See `vmtide_nbd::fuzzing::client_handshake`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_nbd::fuzzing::client_handshake(input));
