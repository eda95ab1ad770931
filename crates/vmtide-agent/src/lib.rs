//! The agent: a service on the host that tells which blocks of a disk changed, and streams them over HTTPS.
//!
//! A request goes through these rooms, in this order: [`server`] accepts the connection and bounds what it may
//! cost; [`tls`](crate::TlsIdentity) makes it private; [`auth`] finds out whose key it brings; [`audit`] notes who
//! did what; the interface of rct-service (`contract`) or our own under `/v1` (`v1`) reads it, both with the
//! engine of [`stream`]; [`roots`] decides
//! whether the path may be touched; [`provider`] knows the disks of the platform. Nothing of a request reaches a
//! provider before its key and its path have been found good.
//!
//! Connections are asynchronous (tokio); everything that touches a disk blocks and runs on threads made for that.
//! There is no global state: two agents can run in one process.

pub mod audit;
pub mod auth;
pub mod config;
mod contract;
pub mod count;
mod drain;
mod error;
pub mod freezes;
mod held_body;
#[cfg(windows)]
mod hyperv;
pub mod limits;
pub mod metrics;
pub mod openapi;
mod parents;
pub mod places;
pub mod provider;
pub mod roots;
mod run;
pub mod server;
mod stall;
mod stall_body;
pub mod state;
pub mod stream;
mod systemd;
mod tls;
pub mod transfers;
mod v1;
pub mod vms;
pub mod work;

pub use config::{AgentOptions, CertificateFiles, ConnectionLimits};
pub use error::{AgentError, Result};
#[cfg(windows)]
pub use hyperv::platform_of_this_host;
#[cfg(not(windows))]
pub use run::platform_of_this_host;
pub use run::{Platform, Started, run};
pub use state::{AppState, Shared};
pub use tls::{Fingerprint, TlsIdentity};

#[doc(hidden)]
pub mod fuzzing;
