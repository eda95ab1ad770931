//! See `vmtide_smb::fuzzing::answers`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmtide_smb::fuzzing::answers(input));
