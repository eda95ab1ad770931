#![no_main]
//! CIM-XML, as a host answers settings and errors.

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmtide_cim::fuzzing::xml(data));
