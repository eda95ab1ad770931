//! Why a stream was cut.

use thiserror::Error;
use vmtide_block::BlockError;

/// The end of a stream that is not its end: the connection is cut, because a part must not look like all.
#[derive(Debug, Error)]
pub enum StreamError {
    /// The disk could not be read.
    #[error("reading the disk failed: {0}")]
    Read(#[from] BlockError),
    /// Compression failed.
    #[error("compressing failed: {0}")]
    Compress(std::io::Error),
    /// A thread that reads ended without saying why.
    #[error("a reader of the disk ended abnormally")]
    ReaderLost,
    /// Somebody asked for the end of this transfer.
    #[error("cancelled")]
    Cancelled,
    /// The plan and what was sent do not agree: a mistake in this program, noticed before the client trusts it.
    #[error("{sent_bytes} bytes were sent where {expected_bytes} were announced")]
    WrongLength {
        /// What was sent.
        sent_bytes: u64,
        /// What should have been.
        expected_bytes: u64,
    },
    /// The provider of changed ranges failed after the first ones were sent.
    #[error("{0}")]
    Changes(String),
}
