//! See `vmtide_guestfs::fuzzing::file_system`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmtide_guestfs::fuzzing::file_system(input);
});
