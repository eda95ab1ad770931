//! See `vmtide_agent_client::fuzzing::frames`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_agent_client::fuzzing::frames(input));
