//! Disks of a Hyper-V host over SMB 3.1.1: nothing needs to be installed on the host.
//!
//! [`SmbFiles`] is [`HostFiles`](vmtide_hyperv::HostFiles) over a client of our own ([`SmbClient`]), which speaks
//! dialect 3.1.1 only, signs always and encrypts wherever the server can; why it is our own is in
//! `docs/decisions/0020-smb.md`. Frozen disks are opened with all their parents by vmtide's own readers of VHDX and
//! VHD, so that of a disk only those bytes cross the network that a backup reads.
//!
//! From the bottom: `wire` (numbers and texts), `header`, `crypto` (keys, signatures, encryption), `negotiate` and
//! `auth` (the login), `link` (a connection with many requests under way), `session`, `requests` (what is asked of
//! files), `file` (a file as a block device), `path` (where a host's file is), `files` (the host's files).
//!
//! The calls block; everything may be shared by threads. What a server sends is not trusted: lengths are checked before
//! they are followed, and a connection that breaks the protocol, or whose signatures are wrong, is ended.

mod auth;
mod client;
mod crypto;
mod dial;
mod disk;
mod error;
mod file;
mod files;
#[doc(hidden)]
pub mod fuzzing;
mod header;
mod link;
mod negotiate;
mod path;
mod patience;
mod requests;
mod session;
mod unflushed;
mod wire;

pub use auth::{Login, Method};
pub use client::SmbClient;
pub use error::{Result, SmbError};
pub use file::SmbFile;
pub use files::{AskChanges, SmbFiles};
pub use link::Traffic;
pub use path::{Mapping, PathMap, SharePath};
pub use session::{DEFAULT_PORT, Protection, SmbOptions};
