//! The commands, one file each: its options with their help, and what it does with them.

pub mod backup;
pub mod completions;
pub mod diff;
pub mod doctor;
pub mod forget;
pub mod guardian;
pub mod init;
pub mod key;
pub mod man;
pub mod points;
pub mod prune;
pub mod restore;
pub mod show;
pub mod stats;
pub mod verify;
pub mod vm;
