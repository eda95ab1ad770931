//! What the tests of the agent share: an agent with disks in memory, and a client that sees every byte.

#![allow(dead_code, reason = "no test uses all of it")]

pub mod agent;
pub mod client;
pub mod content;
pub mod hypervisor;
pub mod openapi;
#[cfg(target_os = "linux")]
pub mod process;
pub mod provider;
