//! Errors as they are told to another process.
//!
//! A platform may be asked through an agent on its host. What goes wrong there is to reach the person at the other
//! end in the same words and, above all, in the same class: the exit code and what a job does next go by it.

use crate::{Consistency, HypervisorError};
use serde::{Deserialize, Serialize};

/// The most characters of a text from another process that are kept.
const MAX_WORDS: usize = 1000;

/// The class of an error: stable, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// [`HypervisorError::NotFound`].
    NotFound,
    /// [`HypervisorError::Unreachable`].
    Unreachable,
    /// [`HypervisorError::Denied`].
    Denied,
    /// [`HypervisorError::Protocol`].
    Protocol,
    /// [`HypervisorError::Busy`].
    Busy,
    /// [`HypervisorError::ConsistencyNotReached`].
    ConsistencyNotReached,
    /// [`HypervisorError::Unsupported`].
    Unsupported,
    /// [`HypervisorError::Timeout`].
    Timeout,
    /// The caller asked for the end.
    Cancelled,
    /// Everything else, and what an older process does not know.
    #[serde(other)]
    Failed,
}

/// An error as it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReport {
    /// Its class.
    pub code: ErrorCode,
    /// What it is about: the action, the VM, the peer.
    pub what: String,
    /// The reason, for people.
    pub detail: String,
    /// How long was waited, in milliseconds; of a [`Timeout`](ErrorCode::Timeout) only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// The consistency that was not reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<Consistency>,
}

impl ErrorReport {
    /// A report without further figures.
    pub fn new(code: ErrorCode, what: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { code, what: what.into(), detail: detail.into(), timeout_ms: None, wanted: None }
    }

    /// The error that this reports. The texts are taken as foreign: short, and without what moves a terminal's
    /// cursor.
    pub fn into_error(self) -> HypervisorError {
        let (what, detail) = (words(&self.what), words(&self.detail));
        match self.code {
            ErrorCode::NotFound => HypervisorError::NotFound { what, detail },
            ErrorCode::Unreachable => HypervisorError::Unreachable { peer: what, detail },
            ErrorCode::Denied => HypervisorError::Denied { what, detail },
            ErrorCode::Protocol => HypervisorError::Protocol { peer: what, detail },
            ErrorCode::Busy => HypervisorError::Busy { vm: what, detail },
            ErrorCode::ConsistencyNotReached => HypervisorError::ConsistencyNotReached {
                wanted: self.wanted.unwrap_or(Consistency::Application),
                detail,
            },
            ErrorCode::Unsupported => HypervisorError::Unsupported { what, detail },
            ErrorCode::Timeout => HypervisorError::Timeout {
                action: what,
                timeout_ms: self.timeout_ms.unwrap_or_default(),
            },
            ErrorCode::Cancelled => HypervisorError::Block(vmtide_block::BlockError::Cancelled),
            ErrorCode::Failed => HypervisorError::failed(what, detail),
        }
    }
}

impl From<&HypervisorError> for ErrorReport {
    fn from(error: &HypervisorError) -> Self {
        match error {
            HypervisorError::NotFound { what, detail } => {
                Self::new(ErrorCode::NotFound, what, detail)
            }
            HypervisorError::Unreachable { peer, detail } => {
                Self::new(ErrorCode::Unreachable, peer, detail)
            }
            HypervisorError::Denied { what, detail } => Self::new(ErrorCode::Denied, what, detail),
            HypervisorError::Protocol { peer, detail } => {
                Self::new(ErrorCode::Protocol, peer, detail)
            }
            HypervisorError::Failed { action, detail } => {
                Self::new(ErrorCode::Failed, action, detail)
            }
            HypervisorError::Busy { vm, detail } => Self::new(ErrorCode::Busy, vm, detail),
            HypervisorError::ConsistencyNotReached { wanted, detail } => Self {
                wanted: Some(*wanted),
                ..Self::new(ErrorCode::ConsistencyNotReached, "consistency", detail)
            },
            HypervisorError::Unsupported { what, detail } => {
                Self::new(ErrorCode::Unsupported, what, detail)
            }
            HypervisorError::Timeout { action, timeout_ms } => Self {
                timeout_ms: Some(*timeout_ms),
                ..Self::new(ErrorCode::Timeout, action, error.to_string())
            },
            HypervisorError::Io { context, source } => {
                Self::new(ErrorCode::Failed, context, source.to_string())
            }
            HypervisorError::Block(vmtide_block::BlockError::Cancelled) => {
                Self::new(ErrorCode::Cancelled, "the job", "it was cancelled")
            }
            HypervisorError::Block(error) => {
                Self::new(ErrorCode::Failed, "reading a disk", error.to_string())
            }
        }
    }
}

/// Foreign text as a part of one line.
pub(crate) fn words(text: &str) -> String {
    let mut line: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_WORDS).collect();
    line.truncate(line.trim_end().len());
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_survive_being_told() {
        let errors = [
            HypervisorError::NotFound { what: "the VM web".into(), detail: "d".into() },
            HypervisorError::Unreachable { peer: "p".into(), detail: "d".into() },
            HypervisorError::Denied { what: "w".into(), detail: "d".into() },
            HypervisorError::protocol("p", "d"),
            HypervisorError::failed("convert", "d"),
            HypervisorError::Busy { vm: "web".into(), detail: "job 1".into() },
            HypervisorError::ConsistencyNotReached {
                wanted: Consistency::FileSystem,
                detail: "no agent".into(),
            },
            HypervisorError::Unsupported { what: "w".into(), detail: "d".into() },
            HypervisorError::Timeout { action: "the merge".into(), timeout_ms: 5 },
            HypervisorError::Block(vmtide_block::BlockError::Cancelled),
        ];
        for error in errors {
            let text = serde_json::to_string(&ErrorReport::from(&error)).unwrap();
            let read: ErrorReport = serde_json::from_str(&text).unwrap();
            assert_eq!(read.into_error().to_string(), error.to_string(), "{text}");
        }
    }

    #[test]
    fn what_is_not_known_is_a_failure_and_foreign_text_is_one_line() {
        let text = r#"{"code":"melted","what":"a\u001b[2J","detail":"b\nc"}"#;
        let read: ErrorReport = serde_json::from_str(text).unwrap();
        assert_eq!(read.into_error().to_string(), "a [2J failed: b c");
    }
}
