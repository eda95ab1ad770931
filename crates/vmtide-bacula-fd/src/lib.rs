//! The plugin for Bacula's file daemon: the daemon's interface on one side, a pipe on the other.
//!
//! All work is done by `vmtide bacula-backend`, a process of its own (`docs/bacula-protocol.md`). What is
//! here turns the daemon's calls into lines on the pipe and back ([`job`]), takes a disk's bytes from memory
//! that the backend fills ([`memory`]), never waits without an end ([`backend`]), and makes sure that whatever
//! happens the daemon goes on and the job tells the truth: a failure is a fatal message, because the daemon
//! takes an error of reading for a warning; and everything is ended at the end of the job and once more when
//! the context goes, because a failed job has no other events.
//!
//! Threads: the daemon calls for one job from one thread, except for the wish to cancel, which comes on
//! another one while the first is at work. That call touches one atomic flag.

#![cfg_attr(not(unix), allow(unused, reason = "the interface is declared for Linux alone so far"))]

pub mod abi;
#[cfg(unix)]
pub mod backend;
#[cfg(unix)]
mod backup;
#[cfg(unix)]
pub mod core;
#[cfg(unix)]
mod entry;
#[cfg(unix)]
pub mod frame;
#[cfg(unix)]
mod job;
#[cfg(unix)]
pub mod memory;
#[cfg(unix)]
mod restore;

#[cfg(unix)]
pub use entry::{loadPlugin, unloadPlugin};
