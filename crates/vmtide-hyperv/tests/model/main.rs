//! The calls on a host one by one, with answers typed as COM has them and as the texts of WS-Management.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "what helpers of tests do not expect is a failed test"
)]

mod changes;
mod configuration;
mod doctor;
mod finding;
mod jobs;
mod snapshots;
mod support;
