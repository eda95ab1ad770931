//! Errors of jobs: the classes that a front end tells apart, with the layers' own errors inside.

use vmtide_agent_client::AgentError;
use vmtide_block::BlockError;
use vmtide_hypervisor::HypervisorError;
use vmtide_repo::RepoError;

/// The result of a job or a part of one.
pub type Result<T, E = EngineError> = std::result::Result<T, E>;

/// Why a job failed. One line for a person; the variant, and the variant of the error inside, for
/// the exit code.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// What was asked cannot be: a URL that is none, options that exclude each other.
    #[error("{0}")]
    Usage(String),
    /// A source, target or disk that was named does not exist.
    #[error("{what} not found{}{hint}", if .hint.is_empty() { "" } else { ": " })]
    NotFound {
        /// What was looked for, and where.
        what: String,
        /// What to do; may be empty.
        hint: String,
    },
    /// Going on would destroy something or is known to fail.
    #[error("{what}: {detail}")]
    Refused {
        /// What was to be done, to what.
        what: String,
        /// Why not, and what to do.
        detail: String,
    },
    /// What was being overwritten is now neither what it was nor what it should become.
    #[error("{source}; {target} is incomplete now: restore it again")]
    Incomplete {
        /// The file, device or export.
        target: String,
        /// What happened.
        #[source]
        source: Box<EngineError>,
    },
    /// A local file failed.
    #[error("{context}: {source}")]
    Io {
        /// What was done to which file.
        context: String,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The repository.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// The platform that the VM runs on.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// A disk.
    #[error(transparent)]
    Block(#[from] BlockError),
}

impl From<AgentError> for EngineError {
    fn from(error: AgentError) -> Self {
        match error {
            AgentError::Usage(text) => Self::Usage(text),
            other => Self::Hypervisor(other.into()),
        }
    }
}

impl EngineError {
    /// A [`Usage`](Self::Usage) error.
    pub fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }

    /// A [`Refused`](Self::Refused) error.
    pub fn refused(what: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Refused { what: what.into(), detail: detail.into() }
    }

    /// An [`Io`](Self::Io) error with its context.
    pub fn io(context: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Io { context: context.into(), source: source.into() }
    }
}
