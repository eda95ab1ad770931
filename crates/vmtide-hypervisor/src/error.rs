//! Errors of platforms.

use vmtide_block::BlockError;

/// The result of a call to a platform.
pub type Result<T, E = HypervisorError> = std::result::Result<T, E>;

/// Why a platform could not do what was asked. One line for a person; the variant for the exit
/// code and for code that reacts.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// There is no such VM, disk, socket or export.
    #[error("{what} not found: {detail}")]
    NotFound {
        /// What was looked for.
        what: String,
        /// Where, and what to do.
        detail: String,
    },
    /// The platform cannot be reached or went away.
    #[error("cannot reach {peer}: {detail}")]
    Unreachable {
        /// The platform, by URL or path.
        peer: String,
        /// What was seen.
        detail: String,
    },
    /// The platform or the operating system denies it to this user.
    #[error("{what}: permission denied: {detail}")]
    Denied {
        /// What was tried.
        what: String,
        /// The answer, and which right is missing.
        detail: String,
    },
    /// The other side does not keep to its protocol.
    #[error("{peer} answered unexpectedly: {detail}")]
    Protocol {
        /// The peer.
        peer: String,
        /// What was expected and what came.
        detail: String,
    },
    /// The platform refused or failed a command.
    #[error("{action} failed: {detail}")]
    Failed {
        /// The command, in words.
        action: String,
        /// The platform's answer.
        detail: String,
    },
    /// Another job of ours works on this VM.
    #[error("{vm} is being worked on by another vmtide job ({detail}); wait for it to end")]
    Busy {
        /// The VM.
        vm: String,
        /// Who holds it.
        detail: String,
    },
    /// The consistency asked for was not reached and going lower was not allowed.
    #[error("{wanted} consistency not reached: {detail}; add --allow-downgrade to go on without")]
    ConsistencyNotReached {
        /// The consistency asked for.
        wanted: crate::Consistency,
        /// What stood in the way.
        detail: String,
    },
    /// This platform, version or disk cannot do it.
    #[error("{what} is not supported: {detail}")]
    Unsupported {
        /// What was asked.
        what: String,
        /// Why not, and what works instead.
        detail: String,
    },
    /// The platform did not answer in time.
    #[error("{action} did not finish within {timeout_ms} ms")]
    Timeout {
        /// What was waited for.
        action: String,
        /// How long, in milliseconds.
        timeout_ms: u64,
    },
    /// A local file (journal, lock, scratch) failed.
    #[error("{context}: {source}")]
    Io {
        /// What was done to which file.
        context: String,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A disk failed.
    #[error(transparent)]
    Block(#[from] BlockError),
}

impl HypervisorError {
    /// An [`Io`](Self::Io) error with its context.
    pub fn io(context: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Io { context: context.into(), source: source.into() }
    }

    /// A [`Failed`](Self::Failed) error.
    pub fn failed(action: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Failed { action: action.into(), detail: detail.into() }
    }

    /// A [`Protocol`](Self::Protocol) error.
    pub fn protocol(peer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Protocol { peer: peer.into(), detail: detail.into() }
    }
}
