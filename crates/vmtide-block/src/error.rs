//! Errors of block devices: what failed, where on the disk, and what the reader can do about it.

use crate::ByteRange;

/// The result of an operation on a block device.
pub type Result<T, E = BlockError> = std::result::Result<T, E>;

/// Why an operation on a block device failed.
///
/// The variants are the classes a caller reacts to differently (retry, report damage, ask for
/// rights, give up); the text inside says what and where, in one line, for a person.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The range does not lie inside the device. A caller's mistake or a corrupt extent list.
    #[error("range {range} is outside {device} of {size_bytes} bytes")]
    OutOfRange {
        /// The device, as a person knows it (a path or URL).
        device: String,
        /// The range asked for.
        range: ByteRange,
        /// The size of the device in bytes.
        size_bytes: u64,
    },
    /// The operating system, or a peer through it, refused or failed the operation.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, to what, and where on it.
        context: String,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The bytes are there, but they break the rules of their format or protocol.
    #[error("{context}: {detail}")]
    Damaged {
        /// The file, export or object, and the offset in it.
        context: String,
        /// The structure that is broken, with the value found.
        detail: String,
    },
    /// What was asked for is valid but this device cannot do it.
    #[error("{context}: {detail}")]
    Unsupported {
        /// The file, export or device.
        context: String,
        /// What cannot be done, and what can instead.
        detail: String,
    },
    /// The device was opened read-only, or the other side forbids writing.
    #[error("{device} is read-only")]
    ReadOnly {
        /// The device, as a person knows it.
        device: String,
    },
    /// The other side went away and the operation cannot be completed.
    #[error("{context}: connection lost: {detail}")]
    Disconnected {
        /// The peer.
        context: String,
        /// What was seen.
        detail: String,
    },
    /// The caller cancelled the operation through its [`CancelToken`](crate::CancelToken).
    #[error("interrupted")]
    Cancelled,
}

impl BlockError {
    /// An [`Io`](Self::Io) error with its context.
    pub fn io(context: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Io { context: context.into(), source: source.into() }
    }

    /// A [`Damaged`](Self::Damaged) error.
    pub fn damaged(context: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Damaged { context: context.into(), detail: detail.into() }
    }

    /// An [`Unsupported`](Self::Unsupported) error.
    pub fn unsupported(context: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Unsupported { context: context.into(), detail: detail.into() }
    }

    /// A [`Disconnected`](Self::Disconnected) error.
    pub fn disconnected(context: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Disconnected { context: context.into(), detail: detail.into() }
    }

    /// The kind of the underlying operating-system error, where there is one.
    pub fn io_kind(&self) -> Option<std::io::ErrorKind> {
        match self {
            Self::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }
}
