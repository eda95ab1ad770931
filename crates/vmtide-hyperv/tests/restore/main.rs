//! Restores to a Hyper-V host, against a stand-in that is strict and breaks where it is told to.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

mod fake;
mod faults;
mod in_place;
mod portable;
mod routes;
mod support;
