//! Why the agent does not start, or ends.

use std::io;
use thiserror::Error;

/// An error of the agent as a whole: one line, what failed, where, and what to do. What goes wrong with one
/// request is an answer to it and no error of the agent.
#[derive(Debug, Error)]
pub enum AgentError {
    /// What was asked for makes no sense: an option, or the content of a file that the operator wrote.
    #[error("{0}")]
    Usage(String),
    /// The operating system refused something.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, to what.
        context: String,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// Something else does not fit: a certificate, a key, a random source.
    #[error("{context}: {reason}")]
    Refused {
        /// What was being done, to what.
        context: String,
        /// Why not, and what to do.
        reason: String,
    },
}

/// The result of the agent's own calls.
pub type Result<T> = std::result::Result<T, AgentError>;

impl AgentError {
    /// An [`Io`](Self::Io) error with its context.
    pub fn io(context: impl Into<String>, source: io::Error) -> Self {
        Self::Io { context: context.into(), source }
    }

    /// A [`Usage`](Self::Usage) error.
    pub fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }

    /// A [`Refused`](Self::Refused) error.
    pub fn refused(context: impl Into<String>, reason: impl ToString) -> Self {
        Self::Refused { context: context.into(), reason: reason.to_string() }
    }
}
