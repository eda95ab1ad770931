//! All tests of the crate through its public interface, in one program: each program of its own would be linked with all of the
//! crate once more.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test, in helpers of tests, too"
)]

mod common;
#[path = "../../vmtide-s3/tests/support/servers.rs"]
mod servers;

mod agent;
mod agent_source;
mod bench;
mod chain;
mod check;
mod convert;
mod convert_failures;
mod copy;
mod damage;
mod delta;
mod documents;
mod exit_codes;
mod hyperv_vm;
mod images;
mod jobs;
mod keys;
mod nbd;
mod qemu;
mod retention;
mod s3;
mod s3_access;
mod serve;
mod track;
