//! How other processes of a host ask about a disk that one of them has open: a Unix socket beside the image.
//!
//! One request a line, one answer a line, in JSON, each limited in length; a read's bytes follow its line. A
//! connection is one caller. What a connection froze ends with it, in whatever way it ends, so nothing is left
//! behind by a killed agent. The socket is its owner's alone (mode 600), like the image should be.
//!
//! | request | answer |
//! |---|---|
//! | `"state"` | `{"state":{"enabled":…,"newer_changes":…,"most_recent_id":…}}` |
//! | `"checkpoint"` | `{"id":"rctX:…"}` |
//! | `{"changes":{"id":…,"offset":…,"length":…,"max_ranges":…}}` | `{"changes":{"ranges":[[offset,length],…],"processed_bytes":…}}` |
//! | `{"set-enabled":true}` | `"done"` |
//! | `{"freeze":{"hold":false}}` | `{"view":{"token":…,"size_bytes":…,"block_size_bytes":…,"id":…}}`; with `hold` first `"done"` when writes are held, for at most 10 s, and the view after `"resume"` |
//! | `"open"` | as `freeze`, but of the disk as it changes |
//! | `{"attach":{"token":…}}` | as `freeze`: another connection to the same view |
//! | `{"read":{"offset":…,"length":…}}` | `{"data":{"length":…}}` and as many bytes |
//! | `{"extents":{"offset":…,"length":…}}` | `{"extents":{"extents":[[offset,length,kind],…]}}` |
//!
//! An error is `{"error":{"kind":…,"text":…}}`.

mod client;
mod protocol;
mod remote;
mod server;
mod socket;

pub use client::RemoteHost;
pub(crate) use remote::HeldFreeze;
pub use remote::RemoteDisk;
pub(crate) use server::ControlServer;
pub use socket::socket_path;
