//! Errors of management calls.

use serde::{Deserialize, Serialize};

/// The result of a management call.
pub type Result<T, E = CimError> = std::result::Result<T, E>;

/// Why a management call failed. One line for a person; the variant for code that reacts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CimError {
    /// The host cannot be reached, or the connection broke.
    #[error("cannot reach {peer}: {detail}")]
    Unreachable {
        /// The host.
        peer: String,
        /// What was seen, and what to do.
        detail: String,
        /// Whether the request certainly never arrived.
        before_request: bool,
    },
    /// The host's certificate is not trusted.
    #[error("the certificate of {peer} is not trusted: {detail}")]
    Untrusted {
        /// The host.
        peer: String,
        /// Why, and what to do.
        detail: String,
    },
    /// The user name, password, ticket or client certificate was refused.
    #[error("{peer} refused the login: {detail}")]
    Login {
        /// The host.
        peer: String,
        /// What is wrong, and what to do.
        detail: String,
    },
    /// The user is known but lacks a right.
    #[error("{peer}: access denied: {detail}")]
    Denied {
        /// The host.
        peer: String,
        /// What was tried, and which right is missing.
        detail: String,
    },
    /// There is no such object, class or namespace.
    #[error("{what} not found: {detail}")]
    NotFound {
        /// What was asked for.
        what: String,
        /// The host's answer.
        detail: String,
    },
    /// The host did not answer in time.
    #[error("{action} did not finish within {timeout_ms} ms")]
    Timeout {
        /// What was waited for.
        action: String,
        /// How long, in milliseconds.
        timeout_ms: u64,
    },
    /// The host refused the request: a fault.
    #[error("{action} was refused: {detail}")]
    Fault {
        /// What was asked.
        action: String,
        /// The fault's own words, on one line.
        detail: String,
        /// The provider's code (an HRESULT or `WSManFault` code), where it gave one.
        code: Option<u32>,
    },
    /// An answer is larger than the limit.
    #[error("the answer to {action} is larger than {limit_bytes} bytes")]
    TooLarge {
        /// What was asked.
        action: String,
        /// The limit.
        limit_bytes: u64,
    },
    /// The other side does not keep to the protocol or the schema.
    #[error("{peer} answered unexpectedly: {detail}")]
    Protocol {
        /// The peer, or the class.
        peer: String,
        /// What was expected and what came.
        detail: String,
    },
}

impl CimError {
    /// A [`Protocol`](Self::Protocol) error.
    pub fn protocol(peer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Protocol { peer: peer.into(), detail: detail.into() }
    }

    /// Whether the method of a failed [`invoke`](crate::Cim::invoke) certainly did not run. Everything
    /// else may have run: what it would have made is looked for before it is made again.
    pub const fn was_not_run(&self) -> bool {
        match self {
            Self::Unreachable { before_request, .. } => *before_request,
            Self::Untrusted { .. }
            | Self::Login { .. }
            | Self::Denied { .. }
            | Self::NotFound { .. } => true,
            Self::Timeout { .. }
            | Self::Fault { .. }
            | Self::TooLarge { .. }
            | Self::Protocol { .. } => false,
        }
    }
}
