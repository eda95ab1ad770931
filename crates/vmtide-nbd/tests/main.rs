//! All tests of the crate through its public interface, in one program: each program of its own would be linked with all of the
//! crate once more.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test, in helpers of tests, too"
)]

mod support;

mod client_hostile;
mod client_nbdkit;
mod client_qemu;
mod client_server;
mod client_storage_daemon;
mod fuzz_corpus;
mod server_interop;
mod tls;
