//! All tests of the crate through its public interface, in one program: each program of its own would be linked with all of the
//! crate once more.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test, in helpers of tests, too"
)]

mod support;

mod contract;
mod files_provider;
mod fuzz_corpus;
mod hostile;
mod hyperv;
mod million;
mod v1;
mod v1_content;
mod vm_client;
mod vms;
