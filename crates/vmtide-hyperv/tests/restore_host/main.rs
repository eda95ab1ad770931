//! Restores of backups, both on the stand-in host that is held to the documented schema: what its guests wrote is
//! backed up by the cycle and restored by both routes, compared byte by byte, and cut off at any call.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

mod backups;
mod in_place;
mod late;
mod seeded;
mod settings;
mod support;
