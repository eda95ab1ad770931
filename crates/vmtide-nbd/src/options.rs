//! How a client connects.

use crate::transport::TlsClientOptions;
use std::time::Duration;

/// How a client connects and how long it waits. The default suits a backup from a server on this
/// host or in this network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdOptions {
    /// The most connections to the export. More than one are made only where the server says
    /// that all see one cache (`NBD_FLAG_CAN_MULTI_CONN`).
    pub connections: usize,
    /// How long one address may take to accept a connection, in milliseconds.
    pub connect_timeout_ms: u64,
    /// How long the handshake of one connection may take in all, in milliseconds.
    pub handshake_timeout_ms: u64,
    /// How long a request may go without any part of its reply, in milliseconds; the connection
    /// is given up then. Requests whose time grows with their range (flush, trim, zeroes) get
    /// ten times as long. Too short, and a busy storage system ends a backup.
    pub request_timeout_ms: u64,
    /// Certificates for `nbds` URLs.
    pub tls: TlsClientOptions,
    /// The metadata contexts to ask for beside `base:allocation`, e.g. `qemu:dirty-bitmap:b0`.
    /// One the server does not have is no error here; see
    /// [`NbdDevice::has_context`](crate::NbdDevice::has_context).
    pub meta_contexts: Vec<String>,
    /// Refuses writes in this process, whatever the server allows.
    pub read_only: bool,
    /// The most bytes one read or write request carries, within the server's limits. Smaller
    /// pieces overlap the work of both sides within one call and stay in the processor's cache;
    /// below 64 KiB the round trips show.
    pub request_bytes: u32,
    /// Whether to use 64-bit headers where the server offers them.
    pub extended_headers: bool,
    /// Whether to use structured replies where the server offers them. Without them there is no
    /// block status, and holes are sent as zeros.
    pub structured_replies: bool,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            connections: 4,
            connect_timeout_ms: 10_000,
            handshake_timeout_ms: 30_000,
            request_timeout_ms: 60_000,
            tls: TlsClientOptions::default(),
            meta_contexts: Vec::new(),
            read_only: false,
            request_bytes: 512 << 10,
            extended_headers: true,
            structured_replies: true,
        }
    }
}

impl NbdOptions {
    /// These options with the dirty bitmap `name` of QEMU among the contexts.
    #[must_use]
    pub fn with_dirty_bitmap(mut self, name: &str) -> Self {
        self.meta_contexts.push(crate::dirty_bitmap_context(name));
        self
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms.max(1))
    }

    pub(crate) fn handshake_timeout(&self) -> Duration {
        Duration::from_millis(self.handshake_timeout_ms.max(1))
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.request_timeout_ms.max(1))
    }
}
