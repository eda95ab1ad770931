//! What can go wrong between a client and an agent: one line each, naming the agent, never the key.

use std::io::ErrorKind;
use thiserror::Error;
use vmtide_block::BlockError;
use vmtide_hypervisor::HypervisorError;

/// The result of a call to an agent.
pub type Result<T, E = AgentError> = std::result::Result<T, E>;

/// Why an agent could not do what was asked.
#[derive(Debug, Error)]
pub enum AgentError {
    /// A URL, key or fingerprint that is none.
    #[error("{0}")]
    Usage(String),
    /// The agent cannot be reached, or went away and did not come back.
    #[error("cannot reach {agent}: {detail}")]
    Unreachable {
        /// The agent's URL.
        agent: String,
        /// What was seen, and how often it was tried.
        detail: String,
    },
    /// Its certificate is not the expected one, or of no trusted authority.
    #[error("{agent}: {detail}")]
    Certificate {
        /// The agent's URL.
        agent: String,
        /// What is wrong with it, and what to do.
        detail: String,
    },
    /// The key is missing, wrong, or lacks the right.
    #[error("{agent}: {detail}")]
    Denied {
        /// The agent's URL.
        agent: String,
        /// What it answered, and what to do.
        detail: String,
    },
    /// There is no such disk, tracking id or freeze.
    #[error("{agent}: {detail}")]
    NotFound {
        /// The agent's URL.
        agent: String,
        /// The agent's stable word for it, such as `unknown-tracking-id`; empty where it gave none.
        code: String,
        /// What was looked for.
        detail: String,
    },
    /// The agent refused or failed for good.
    #[error("{agent} answered {status}: {detail}")]
    Refused {
        /// The agent's URL.
        agent: String,
        /// The HTTP status.
        status: u16,
        /// The agent's stable word for it; empty where it gave none.
        code: String,
        /// Its message.
        detail: String,
    },
    /// It does not keep to its protocol.
    #[error("{agent} answered unexpectedly: {detail}")]
    Protocol {
        /// The agent's URL.
        agent: String,
        /// What was expected and what came.
        detail: String,
    },
    /// Bytes changed on the way, again and again.
    #[error("{agent}: {detail}")]
    Corrupt {
        /// The agent's URL.
        agent: String,
        /// Which bytes.
        detail: String,
    },
    /// This agent does not have it.
    #[error("{agent}: {detail}")]
    Unsupported {
        /// The agent's URL.
        agent: String,
        /// What it lacks, and what to do instead.
        detail: String,
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
    /// The caller cancelled.
    #[error("interrupted")]
    Cancelled,
}

impl AgentError {
    /// The agent's stable word for what went wrong; empty where it gave none.
    pub fn code(&self) -> &str {
        match self {
            Self::NotFound { code, .. } | Self::Refused { code, .. } => code,
            _ => "",
        }
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }

    pub(crate) fn protocol(agent: &str, detail: impl Into<String>) -> Self {
        Self::Protocol { agent: agent.into(), detail: detail.into() }
    }
}

/// As a disk's error: the class that an exit code or a retry goes by is kept.
impl From<AgentError> for BlockError {
    fn from(error: AgentError) -> Self {
        let text = error.to_string();
        let io = |kind| Self::io("agent", std::io::Error::new(kind, text.clone()));
        match error {
            AgentError::Cancelled => Self::Cancelled,
            AgentError::Unreachable { agent, detail } => Self::disconnected(agent, detail),
            AgentError::Denied { .. } => io(ErrorKind::PermissionDenied),
            AgentError::NotFound { .. } => io(ErrorKind::NotFound),
            AgentError::Unsupported { agent, detail } => Self::unsupported(agent, detail),
            AgentError::Io { context, source } => Self::io(context, source),
            // Nonsense on a connection is no damage of anybody's data.
            AgentError::Protocol { .. } | AgentError::Corrupt { .. } => io(ErrorKind::InvalidData),
            AgentError::Usage(_) | AgentError::Certificate { .. } | AgentError::Refused { .. } => {
                io(ErrorKind::Other)
            }
        }
    }
}

impl From<AgentError> for HypervisorError {
    fn from(error: AgentError) -> Self {
        match error {
            AgentError::Cancelled => Self::Block(BlockError::Cancelled),
            AgentError::Usage(detail) => Self::failed("agent", detail),
            AgentError::Unreachable { agent, detail }
            | AgentError::Certificate { agent, detail } => {
                Self::Unreachable { peer: agent, detail }
            }
            AgentError::Denied { agent, detail } => Self::Denied { what: agent, detail },
            AgentError::NotFound { agent, detail, .. } => {
                Self::NotFound { what: format!("disk of {agent}"), detail }
            }
            AgentError::Refused { agent, status, detail, .. } => {
                Self::failed(format!("request to {agent}"), format!("{status}: {detail}"))
            }
            AgentError::Protocol { agent, detail } | AgentError::Corrupt { agent, detail } => {
                Self::Protocol { peer: agent, detail }
            }
            AgentError::Unsupported { agent, detail } => Self::Unsupported { what: agent, detail },
            AgentError::Io { context, source } => Self::Io { context, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_survive_the_way_to_the_exit_code() {
        let denied = || AgentError::Denied { agent: "a".into(), detail: "no".into() };
        assert_eq!(BlockError::from(denied()).io_kind(), Some(ErrorKind::PermissionDenied));
        assert!(matches!(HypervisorError::from(denied()), HypervisorError::Denied { .. }));
        let broken = AgentError::protocol("a", "x");
        assert_eq!(BlockError::from(broken).io_kind(), Some(ErrorKind::InvalidData));
        assert!(matches!(BlockError::from(AgentError::Cancelled), BlockError::Cancelled));
    }
}
