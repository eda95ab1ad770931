//! How a server behaves and where its limits are.

use crate::transport::TlsServerOptions;
use std::time::Duration;

/// How a server behaves and where its limits are.
///
/// The memory of a server is bounded by `max_connections` × `connection_bytes`, plus what the
/// devices need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerOptions {
    /// Certificates. With them, every client must use TLS before it learns anything.
    pub tls: Option<TlsServerOptions>,
    /// The most clients at once; further ones are hung up on.
    pub max_connections: usize,
    /// The requests of one connection that are worked on at once.
    pub workers: usize,
    /// The data of requests and replies one connection may have in memory, in bytes. At least
    /// the largest payload; twice that keeps reading and sending going at once.
    pub connection_bytes: u64,
    /// The largest read or write, in bytes, up to 32 MiB: what every client may rely on.
    pub max_payload_bytes: u32,
    /// How long a handshake may take in all, in milliseconds.
    pub handshake_timeout_ms: u64,
    /// How long a client may stop in the middle of a message, in milliseconds. Between requests
    /// it may rest as long as it likes.
    pub stall_timeout_ms: u64,
    /// Whether structured replies are offered; without them neither block status is.
    pub structured_replies: bool,
    /// Whether 64-bit extended headers are offered.
    pub extended_headers: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            tls: None,
            max_connections: 64,
            workers: 4,
            connection_bytes: 64 << 20,
            max_payload_bytes: crate::proto::constants::DEFAULT_MAX_PAYLOAD_BYTES,
            handshake_timeout_ms: 30_000,
            stall_timeout_ms: 60_000,
            structured_replies: true,
            extended_headers: true,
        }
    }
}

impl ServerOptions {
    pub(super) fn handshake_timeout(&self) -> Duration {
        Duration::from_millis(self.handshake_timeout_ms.max(1))
    }

    pub(super) fn stall_timeout(&self) -> Duration {
        Duration::from_millis(self.stall_timeout_ms.max(1))
    }

    /// The limits made to fit one another.
    pub(super) fn normalised(mut self) -> Self {
        let most = crate::proto::constants::DEFAULT_MAX_PAYLOAD_BYTES;
        self.max_payload_bytes = self.max_payload_bytes.clamp(64 << 10, most);
        self.connection_bytes = self.connection_bytes.max(self.max_payload_bytes.into());
        self.workers = self.workers.clamp(1, 64);
        self
    }
}
