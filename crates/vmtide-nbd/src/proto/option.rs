//! Options and their replies: the handshake's messages.

use super::ProtocolError;
use super::constants::{MAX_OPTION_BYTES, OPTION_MAGIC, OPTION_REPLY_MAGIC, rep};
use super::wire::{Fields, printable, put_counted_string, string};

/// The length of an option's header.
pub(crate) const OPTION_HEADER_BYTES: usize = 16;
/// The length of an option reply's header.
pub(crate) const OPTION_REPLY_HEADER_BYTES: usize = 20;

/// An option as the client sends it.
pub(crate) fn encode_option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(OPTION_HEADER_BYTES + data.len());
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(data);
    out
}

/// The option and the length of its data, from a header.
pub(crate) fn decode_option_header(bytes: &[u8]) -> Result<(u32, u32), ProtocolError> {
    let mut fields = Fields::new("an option", bytes);
    let found = fields.u64()?;
    if found != OPTION_MAGIC {
        return Err(ProtocolError::Magic { what: "an option", found, expected: OPTION_MAGIC });
    }
    let (option, length) = (fields.u32()?, fields.u32()?);
    check_length("an option", length)?;
    Ok((option, length))
}

fn check_length(what: &'static str, length: u32) -> Result<(), ProtocolError> {
    if length <= MAX_OPTION_BYTES {
        return Ok(());
    }
    Err(ProtocolError::Length { what, found: length.into(), rule: "more than 64 KiB" })
}

/// A reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OptionReply {
    /// The option it replies to.
    pub(crate) option: u32,
    /// `NBD_REP_*`.
    pub(crate) kind: u32,
    /// What it says.
    pub(crate) data: Vec<u8>,
}

impl OptionReply {
    /// The reply, of which only the header is known, and the length of its data.
    pub(crate) fn decode_header(bytes: &[u8]) -> Result<(Self, u32), ProtocolError> {
        let mut fields = Fields::new("an option reply", bytes);
        let found = fields.u64()?;
        if found != OPTION_REPLY_MAGIC {
            return Err(ProtocolError::Magic {
                what: "an option reply",
                found,
                expected: OPTION_REPLY_MAGIC,
            });
        }
        let (option, kind, length) = (fields.u32()?, fields.u32()?, fields.u32()?);
        check_length("an option reply", length)?;
        let data = Vec::new();
        Ok((Self { option, kind, data }, length))
    }

    /// The bytes of the reply.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(OPTION_REPLY_HEADER_BYTES + self.data.len());
        out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        out.extend(self.option.to_be_bytes());
        out.extend(self.kind.to_be_bytes());
        out.extend(u32::try_from(self.data.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend(&self.data);
        out
    }

    /// Whether the option failed.
    pub(crate) const fn is_error(&self) -> bool {
        self.kind & rep::ERROR_BIT != 0
    }
}

/// An option the server refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the server refused {option}: {reason}{message}")]
pub(crate) struct Refusal {
    /// The option's name.
    pub(crate) option: &'static str,
    /// `NBD_REP_ERR_*`.
    pub(crate) code: u32,
    /// The code in words.
    pub(crate) reason: &'static str,
    /// The server's words after a colon, or nothing.
    pub(crate) message: String,
}

impl Refusal {
    /// The refusal in an error reply.
    pub(crate) fn new(option: &'static str, reply: &OptionReply) -> Self {
        let reason = match reply.kind {
            rep::ERR_UNSUP => "it does not know this option",
            rep::ERR_POLICY => "its policy forbids it",
            rep::ERR_INVALID => "it calls the request invalid",
            rep::ERR_PLATFORM => "its platform cannot do it",
            rep::ERR_TLS_REQD => "it demands TLS (use nbds:// or nbds+unix://)",
            rep::ERR_UNKNOWN => "there is no such export",
            rep::ERR_SHUTDOWN => "it is shutting down",
            rep::ERR_BLOCK_SIZE_REQD => "it demands block size constraints",
            rep::ERR_TOO_BIG => "the request is too big",
            rep::ERR_EXT_HEADER_REQD => "it demands extended headers",
            _ => "unknown error",
        };
        let message = if reply.data.is_empty() {
            String::new()
        } else {
            format!(": {}", printable(&reply.data))
        };
        Self { option, code: reply.kind, reason, message }
    }
}

/// An export as `NBD_OPT_LIST` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// The name to connect to; the empty name is the default export.
    pub name: String,
    /// The server's words about it, often empty.
    pub description: String,
}

impl ListedExport {
    /// From the data of `NBD_REP_SERVER`.
    pub(crate) fn decode(data: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::new("a listed export", data);
        let name = fields.counted_string()?;
        let description = string("a listed export", fields.rest())?;
        Ok(Self { name, description })
    }

    /// The data of `NBD_REP_SERVER`.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_counted_string(&mut out, &self.name);
        out.extend(self.description.as_bytes());
        out
    }
}

/// The data of `NBD_OPT_GO` and `NBD_OPT_INFO`.
pub(crate) fn encode_go(name: &str, requests: &[u16]) -> Vec<u8> {
    let mut out = Vec::new();
    put_counted_string(&mut out, name);
    out.extend(u16::try_from(requests.len()).unwrap_or(0).to_be_bytes());
    out.extend(requests.iter().flat_map(|request| request.to_be_bytes()));
    out
}

/// The export and the information requests of `NBD_OPT_GO` and `NBD_OPT_INFO`.
pub(crate) fn decode_go(data: &[u8]) -> Result<(String, Vec<u16>), ProtocolError> {
    let mut fields = Fields::new("NBD_OPT_GO", data);
    let name = fields.counted_string()?;
    let count = fields.u16()?;
    let requests = (0..count).map(|_| fields.u16()).collect::<Result<_, _>>()?;
    fields.end()?;
    Ok((name, requests))
}
