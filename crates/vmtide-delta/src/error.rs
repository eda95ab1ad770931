//! Errors of delta streams.

use vmtide_block::BlockError;

/// The result of an operation on a delta.
pub type Result<T, E = DeltaError> = std::result::Result<T, E>;

/// Why an operation on a delta failed. The variants are what a caller reacts to differently.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    /// The stream is torn, altered, or never was a delta. Nothing in it may be used.
    #[error("{delta}: {detail}")]
    Damaged {
        /// The file or stream.
        delta: String,
        /// What is wrong, and where.
        detail: String,
    },
    /// A delta of a newer version, or values that this version does not take.
    #[error("{delta}: {detail}")]
    Unsupported {
        /// The file or stream.
        delta: String,
        /// What is not understood.
        detail: String,
    },
    /// The target is not what the delta was made from.
    #[error("{delta} cannot be applied to {target}: {detail}")]
    WrongBase {
        /// The file or stream.
        delta: String,
        /// The image or device.
        target: String,
        /// In what it differs from the base, and what to do.
        detail: String,
    },
    /// Deltas that do not follow each other.
    #[error("{newer} does not follow {older}: {detail}")]
    BrokenChain {
        /// The delta that should come first.
        older: String,
        /// The delta that should come next.
        newer: String,
        /// What does not fit.
        detail: String,
    },
    /// The delta's own stream could not be read or written.
    #[error("{context}: {source}")]
    Io {
        /// What was being done to which stream.
        context: String,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A disk.
    #[error(transparent)]
    Block(#[from] BlockError),
}

impl DeltaError {
    /// A [`Damaged`](Self::Damaged) error.
    pub fn damaged(delta: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Damaged { delta: delta.into(), detail: detail.into() }
    }

    /// An [`Unsupported`](Self::Unsupported) error.
    pub fn unsupported(delta: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Unsupported { delta: delta.into(), detail: detail.into() }
    }

    /// An [`Io`](Self::Io) error with its context.
    pub fn io(context: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { context: context.into(), source }
    }
}
