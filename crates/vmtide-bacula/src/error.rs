//! Why the backend gives up.

use vmtide_block::BlockError;
use vmtide_engine::EngineError;
use vmtide_hypervisor::HypervisorError;

/// The result of the backend's work.
pub type Result<T, E = BackendError> = std::result::Result<T, E>;

/// Why the backend gives up; one line for the job's report.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The plugin line is wrong.
    #[error("plugin line: {0}")]
    Usage(String),
    /// The plugin does not keep to the protocol.
    #[error("the plugin sent {0}: plugin and vmtide must be of one version")]
    Protocol(String),
    /// The plugin has gone: the daemon was stopped, or it has given the job up.
    #[error("the job was given up by the file daemon")]
    Gone,
    /// What comes from the volumes is not what was backed up.
    #[error("{file}: {detail}")]
    Damaged {
        /// The file.
        file: String,
        /// What is wrong with it.
        detail: String,
    },
    /// Something cannot be done so.
    #[error("{0}")]
    Refused(String),
    /// A local file failed.
    #[error("{context}: {source}")]
    Io {
        /// What was done to which file.
        context: String,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A disk failed, or the job was cancelled.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The platform failed.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// A source or target cannot be opened.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl BackendError {
    /// An [`Io`](Self::Io) error with its context.
    pub fn io(context: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Io { context: context.into(), source: source.into() }
    }

    /// A [`Protocol`](Self::Protocol) error.
    pub fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol(what.into())
    }
}
