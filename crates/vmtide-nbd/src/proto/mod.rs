//! The protocol without input or output: what the messages look like, and what a valid reply is.
//!
//! One noun of the specification (the NBD project's `doc/proto.md`, with the `EXTENDED_HEADERS`
//! extension of its branch `extension-ext-header`) per file. Everything here works on byte slices
//! that are already in memory and bounded; nothing here blocks, so all of it can be fuzzed.

pub(crate) mod assembly;
pub(crate) mod constants;
pub(crate) mod errno;
pub(crate) mod export_info;
pub(crate) mod meta_context;
pub(crate) mod option;
pub(crate) mod reply;
pub(crate) mod request;
pub(crate) mod status;
pub(crate) mod wire;

/// Why a peer's bytes are not NBD. The connection that carried them cannot be used further.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A message does not start with its magic number, so the stream is out of step.
    #[error("{what} starts with {found:#x} instead of {expected:#x}")]
    Magic {
        /// The message.
        what: &'static str,
        /// The number that arrived.
        found: u64,
        /// The number the specification demands.
        expected: u64,
    },
    /// A length field breaks its rule; nothing was allocated for it.
    #[error("{what} has a length of {found} bytes, {rule}")]
    Length {
        /// The message or field.
        what: &'static str,
        /// The length that arrived.
        found: u64,
        /// What the length has to be.
        rule: &'static str,
    },
    /// Any other rule of the specification that was broken.
    #[error("{0}")]
    Violation(String),
}

/// Shorthand for a broken rule.
pub(crate) fn violation(text: impl Into<String>) -> ProtocolError {
    ProtocolError::Violation(text.into())
}
