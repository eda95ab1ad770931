//! What can go wrong with a disk, as the agent's answers tell it apart.

use thiserror::Error;

/// An error of a provider: one line, naming the disk, what is wrong and what to do.
#[derive(Debug, Error)]
pub enum ProviderError {
    /// There is no such file.
    #[error("{path}: no such disk")]
    NotFound {
        /// The path asked for.
        path: String,
    },
    /// There is a file, and it is no virtual disk, or a damaged one.
    #[error("{path}: not a virtual disk that can be read: {reason}")]
    NotADisk {
        /// The path asked for.
        path: String,
        /// What was found.
        reason: String,
    },
    /// The path of a new disk is taken.
    #[error("{path}: exists already; nothing was overwritten")]
    Exists {
        /// The path asked for.
        path: String,
    },
    /// Somebody else holds it.
    #[error("{path}: in use: {reason}")]
    InUse {
        /// The path asked for.
        path: String,
        /// By whom, as far as the platform tells.
        reason: String,
    },
    /// The agent's own account may not.
    #[error("{path}: access denied for the agent: {reason}")]
    Denied {
        /// The path asked for.
        path: String,
        /// What the platform said.
        reason: String,
    },
    /// This id names no moment of this disk.
    #[error("{path}: tracking id {id} is not known: read the disk in full")]
    UnknownTrackingId {
        /// The path asked for.
        path: String,
        /// The id asked for.
        id: String,
    },
    /// Writes of this disk are not tracked.
    #[error("{path}: change tracking is off: read the disk in full")]
    TrackingDisabled {
        /// The path asked for.
        path: String,
    },
    /// There was tracking, and it cannot be relied on any more.
    #[error("{path}: change tracking was lost: {reason}; read the disk in full")]
    TrackingLost {
        /// The path asked for.
        path: String,
        /// How it was noticed.
        reason: String,
    },
    /// The platform or the format does not have this.
    #[error("{path}: {reason}")]
    Unsupported {
        /// The path asked for.
        path: String,
        /// What it does not have, and what to do instead.
        reason: String,
    },
    /// There is no such disk as was asked for.
    #[error("{path}: {reason}")]
    Invalid {
        /// The path asked for.
        path: String,
        /// What cannot be, and what could.
        reason: String,
    },
    /// The volume is full.
    #[error("{path}: no space is left: {reason}")]
    NoSpace {
        /// The path asked for.
        path: String,
        /// What the platform said.
        reason: String,
    },
    /// Nobody waits for it any more.
    #[error("{path}: given up before it was done; nothing is left of it")]
    Cancelled {
        /// The path asked for.
        path: String,
    },
    /// The platform failed.
    #[error("{path}: {reason}")]
    Failed {
        /// The path asked for.
        path: String,
        /// What failed, with the platform's code.
        reason: String,
    },
}
