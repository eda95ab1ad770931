//! A client of the agent: disks on another host as block devices, with their change tracking.
//!
//! [`AgentUrl`] is what a user writes, [`AgentOptions`] how to get there, and [`AgentClient`] does the talking: to
//! vmtide's own agent, or to rct-service, which has the same interface without `/v1`. [`AgentSource`] makes it a
//! platform that a backup can freeze; [`AgentDisk`] and [`WritableAgentDisk`] are what is read and written.
//!
//! Whole VMs of a host with Hyper-V are named by a [`HypervUrl`]: [`AgentHypervisor`] freezes them, [`AgentCim`] and
//! [`AgentFiles`] are the host's management objects and files, which restores and examinations need.
//!
//! What it stands up to: connections that break are made again and content goes on from where it broke off; every
//! byte that `/v1` sends is held against its checksum; an answer about changes counts only where nothing speaks
//! against it; the agent is the one with the expected certificate, or nothing is sent; and the key is in a header and
//! nowhere else. Calls block, and may be made from many threads.

mod agent_cim;
mod changes;
mod client;
mod connect;
mod contract;
mod device;
mod error;
pub mod frames;
mod frozen;
#[doc(hidden)]
pub mod fuzzing;
mod host_files;
mod hyperv_url;
mod keeper;
mod options;
mod resend;
mod source;
mod transport;
mod tries;
mod url;
mod v1;
mod vm_calls;
mod vms;
mod writer;

pub use agent_cim::AgentCim;
pub use changes::{Changes, Doubt, MAX_RANGES};
pub use client::AgentClient;
pub use contract::{DiskInfo, TrackingState};
pub use device::AgentDisk;
pub use error::{AgentError, Result};
pub use frozen::FrozenDisks;
pub use host_files::AgentFiles;
pub use hyperv_url::HypervUrl;
pub use options::{AgentKey, AgentOptions, Fingerprint};
pub use source::AgentSource;
pub use url::{AgentUrl, DEFAULT_PORT};
pub use v1::{DiskDetails, FreezeDisk};
pub use vms::AgentHypervisor;
pub use writer::WritableAgentDisk;
