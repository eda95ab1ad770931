//! The commands, one file each: its options with their help, and what it does with them.

pub mod agent;
pub mod agent_service;
pub mod backup;
mod backup_many;
pub mod bacula;
pub mod bench;
pub mod chain;
pub mod check;
pub mod compare;
pub mod completions;
pub mod convert;
pub mod copy;
pub mod create;
pub mod delta;
pub mod diff;
pub mod doctor;
pub mod forget;
#[cfg(unix)]
pub mod guardian;
pub mod hold;
pub mod image;
mod immutable;
pub mod info;
pub mod init;
pub mod key;
#[cfg(any(windows, test))]
mod log_limit;
pub mod man;
pub mod map;
pub mod points;
pub mod prune;
pub mod repair;
pub mod resize;
pub mod restore;
pub mod restore_vm;
pub mod serve;
pub mod show;
pub mod stats;
pub mod track;
pub mod verify;
pub mod vm;
