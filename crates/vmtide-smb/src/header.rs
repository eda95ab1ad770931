//! The header of a message (MS-SMB2 2.2.1).

use crate::error::{Result, SmbError};
use crate::wire::{Reader, Writer};

/// The length of a header in bytes.
pub(crate) const HEADER_BYTES: usize = 64;
/// Where a header has the signature.
pub(crate) const SIGNATURE_AT: usize = 48;

const PROTOCOL: [u8; 4] = *b"\xfeSMB";

/// The commands that are used (2.2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Command {
    Negotiate = 0,
    SessionSetup = 1,
    TreeConnect = 3,
    Create = 5,
    Close = 6,
    Flush = 7,
    Read = 8,
    Write = 9,
    Ioctl = 11,
    Echo = 13,
    QueryDirectory = 14,
    QueryInfo = 16,
    SetInfo = 17,
}

/// `SMB2_FLAGS_SERVER_TO_REDIR`: this is an answer.
pub(crate) const FLAG_RESPONSE: u32 = 1;
/// `SMB2_FLAGS_ASYNC_COMMAND`: the answer, or another one, comes later.
pub(crate) const FLAG_ASYNC: u32 = 2;
/// `SMB2_FLAGS_SIGNED`.
pub(crate) const FLAG_SIGNED: u32 = 8;

/// The header of a request.
pub(crate) struct RequestHeader {
    pub(crate) command: Command,
    pub(crate) credit_charge: u16,
    pub(crate) credit_request: u16,
    pub(crate) flags: u32,
    pub(crate) message_id: u64,
    pub(crate) tree_id: u32,
    pub(crate) session_id: u64,
}

impl RequestHeader {
    pub(crate) fn encode(&self, writer: &mut Writer) {
        writer.bytes(&PROTOCOL).u16(64).u16(self.credit_charge).u32(0).u16(self.command as u16);
        writer.u16(self.credit_request).u32(self.flags).u32(0).u64(self.message_id);
        writer.u32(0).u32(self.tree_id).u64(self.session_id).zeros(16);
    }
}

/// The header of an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResponseHeader {
    pub(crate) status: u32,
    pub(crate) credits: u16,
    pub(crate) flags: u32,
    pub(crate) message_id: u64,
    pub(crate) session_id: u64,
    pub(crate) tree_id: u32,
}

impl ResponseHeader {
    /// Reads the header of a message that came alone.
    pub(crate) fn decode(message: &[u8]) -> Result<Self> {
        let reader = Reader::new(message, "header");
        if reader.slice(0, 4)? != PROTOCOL {
            return Err(SmbError::protocol("a message that is not SMB 2"));
        }
        reader.structure(4, 64)?;
        let header = Self {
            status: reader.u32(8)?,
            credits: reader.u16(14)?,
            flags: reader.u32(16)?,
            message_id: reader.u64(24)?,
            tree_id: reader.u32(36)?,
            session_id: reader.u64(40)?,
        };
        // Only requests that were sent together are answered together, and none are.
        if reader.u32(20)? != 0 {
            return Err(SmbError::protocol("answers to several requests in one message"));
        }
        reader.slice(SIGNATURE_AT, 16)?;
        if header.flags & FLAG_RESPONSE == 0 {
            return Err(SmbError::protocol("a request where an answer was expected"));
        }
        Ok(header)
    }
}
