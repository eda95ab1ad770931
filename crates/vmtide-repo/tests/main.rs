//! All tests of the crate through its public interface, in one program: each program of its own would be linked with all of the
//! crate once more.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test, in helpers of tests, too"
)]

mod common;

mod crash;
mod damage;
mod distant;
mod heal;
mod holds;
mod immutable;
mod keys;
mod model;
mod old_versions;
mod packs;
mod part_reads;
mod repair;
mod store_faulty;
