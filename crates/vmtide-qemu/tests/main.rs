//! All tests of the crate through its public interface, in one program: each program of its own would be linked with all of the
//! crate once more.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test, in helpers of tests, too"
)]

mod support;

mod agent;
mod killed;
mod leftovers;
mod offline;
mod qmp;
mod running;
mod scratch;
