//! The commands, one file each: its options with their help, and what it does with them.

pub mod backup;
pub mod chain;
pub mod check;
pub mod compare;
pub mod completions;
pub mod convert;
pub mod create;
pub mod diff;
pub mod doctor;
pub mod forget;
pub mod guardian;
pub mod hold;
pub mod image;
pub mod info;
pub mod init;
pub mod key;
pub mod man;
pub mod map;
pub mod points;
pub mod prune;
pub mod restore;
pub mod serve;
pub mod show;
pub mod stats;
pub mod verify;
pub mod vm;
