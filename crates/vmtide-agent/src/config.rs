//! How an agent is set up. The command line and the settings file fill this in.

use crate::limits::Limits;
use std::path::PathBuf;
use std::time::Duration;

/// Where an agent listens when nothing is said: every address, the port of rct-service, whose clients
/// know no other.
pub const DEFAULT_LISTEN: &str = "0.0.0.0:6677";

/// How one agent is set up.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// `HOST:PORT`; port 0 takes a free one.
    pub listen: String,
    /// The directories whose disks are served, with all that is below them; at least one.
    pub roots: Vec<PathBuf>,
    /// The file with the keys of the clients; read again when it changes.
    pub auth_key_file: PathBuf,
    /// The certificate and its key; made and kept in the state directory where none are given.
    pub certificate: Option<CertificateFiles>,
    /// Where the agent keeps its certificate and its audit log.
    pub state_directory: PathBuf,
    /// Whether nothing else backs up the VMs of this host: `HypervOptions::only_backup_program`.
    pub only_backup_program: bool,
    /// Whether clients may speak TLS 1.2, too.
    pub tls12: bool,
    /// Where the audit log goes; `audit.log` in the state directory where nothing is said.
    pub audit_log: Option<PathBuf>,
    /// What connections may cost.
    pub connections: ConnectionLimits,
    /// What clients with a key may use.
    pub limits: Limits,
}

/// A certificate chain and its private key, each a PEM file; read again when they change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The chain, the agent's own certificate first.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// What connections may cost, before anybody has shown a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// The most connections at once. Each that does nothing costs some 60 KiB of memory and one handle: this is
    /// what bounds them.
    pub total: usize,
    /// The most connections of one address at once, so that one broken client cannot lock out the others.
    pub per_peer: usize,
    /// How long a TLS handshake may take. Longer than any real one over a bad line; every stalled one holds a
    /// connection for as long.
    pub handshake_timeout: Duration,
    /// How long the head of a request may take, and how long a connection may wait for its next one.
    pub header_timeout: Duration,
    /// How long a client may leave what was sent to it lying before its connection, and the disk that it reads,
    /// are given up.
    pub stall_timeout: Duration,
    /// How long the end waits for running requests.
    pub drain_timeout: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            total: 2048,
            per_peer: 1024,
            handshake_timeout: Duration::from_secs(10),
            header_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(120),
            drain_timeout: Duration::from_secs(20),
        }
    }
}
