//! See `vmtide_agent_client::fuzzing::answers`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_agent_client::fuzzing::answers(input));
