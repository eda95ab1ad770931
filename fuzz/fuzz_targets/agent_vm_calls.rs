//! See `vmtide_agent::fuzzing::agent_vm_calls`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_agent::fuzzing::agent_vm_calls(input));
