//! The error values of replies (`doc/proto.md`, section "Error values").

use std::io::ErrorKind;
use vmtide_block::BlockError;

pub(crate) const EPERM: u32 = 1;
pub(crate) const EIO: u32 = 5;
pub(crate) const ENOMEM: u32 = 12;
pub(crate) const EINVAL: u32 = 22;
pub(crate) const ENOSPC: u32 = 28;
pub(crate) const EOVERFLOW: u32 = 75;
pub(crate) const ENOTSUP: u32 = 95;
pub(crate) const ESHUTDOWN: u32 = 108;

/// An error a server answered one request with. The connection is still good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServerError {
    /// One of the values above; a server may send others.
    pub(crate) code: u32,
    /// The server's words, made printable, or nothing.
    pub(crate) message: String,
}

impl ServerError {
    fn describe(&self) -> String {
        let text = match self.code {
            EPERM => "operation not permitted (EPERM)",
            EIO => "input/output error (EIO)",
            ENOMEM => "out of memory (ENOMEM)",
            EINVAL => "invalid request (EINVAL)",
            ENOSPC => "no space left (ENOSPC)",
            EOVERFLOW => "request too large (EOVERFLOW)",
            ENOTSUP => "not supported (ENOTSUP)",
            ESHUTDOWN => "the server is shutting down (ESHUTDOWN)",
            other => return format!("the server answered error {other}{}", self.words()),
        };
        format!("the server answered: {text}{}", self.words())
    }

    fn words(&self) -> String {
        if self.message.is_empty() { String::new() } else { format!(": {}", self.message) }
    }

    /// The error as that of a block device. `context` says what was done where.
    pub(crate) fn into_block_error(self, context: String) -> BlockError {
        let kind = match self.code {
            EPERM => ErrorKind::PermissionDenied,
            ENOMEM => ErrorKind::OutOfMemory,
            ENOSPC => ErrorKind::StorageFull,
            EINVAL | EOVERFLOW => ErrorKind::InvalidInput,
            ENOTSUP => return BlockError::unsupported(context, self.describe()),
            ESHUTDOWN => return BlockError::disconnected(context, self.describe()),
            _ => ErrorKind::Other,
        };
        BlockError::io(context, std::io::Error::new(kind, self.describe()))
    }
}

/// The value a server of ours answers with for a device's error.
pub(crate) fn code_of(error: &BlockError) -> u32 {
    match error {
        BlockError::OutOfRange { .. } => EINVAL,
        BlockError::ReadOnly { .. } => EPERM,
        BlockError::Unsupported { .. } => ENOTSUP,
        BlockError::Io { source, .. } => match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => ENOSPC,
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => EPERM,
            ErrorKind::OutOfMemory => ENOMEM,
            _ => EIO,
        },
        _ => EIO,
    }
}
