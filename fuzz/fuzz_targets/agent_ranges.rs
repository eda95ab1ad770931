//! See `vmtide_agent::fuzzing::agent_ranges`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_agent::fuzzing::agent_ranges(input));
