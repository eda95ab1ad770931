//! Requests of the transmission phase: the compact header of 28 bytes and the extended one of 32.

use super::ProtocolError;
use super::constants::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC};
use super::wire::Fields;

/// Which headers both sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderStyle {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests; replies are chunks where they carry data (`NBD_OPT_STRUCTURED_REPLY`).
    Structured,
    /// 64-bit requests and replies (`NBD_OPT_EXTENDED_HEADERS`).
    Extended,
}

impl HeaderStyle {
    /// The length of a request header in bytes.
    pub(crate) const fn request_header_bytes(self) -> usize {
        match self {
            Self::Simple | Self::Structured => 28,
            Self::Extended => 32,
        }
    }
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestHeader {
    /// `NBD_CMD_FLAG_*`.
    pub(crate) flags: u16,
    /// `NBD_CMD_*`.
    pub(crate) command: u16,
    /// What ties the reply to it.
    pub(crate) cookie: u64,
    /// The first byte of the export.
    pub(crate) offset: u64,
    /// The length: of the payload where there is one, of the effect otherwise.
    pub(crate) length: u64,
}

impl RequestHeader {
    /// Appends the header.
    ///
    /// # Errors
    /// A length that does not fit a compact header.
    pub(crate) fn encode(
        &self,
        style: HeaderStyle,
        out: &mut Vec<u8>,
    ) -> Result<(), ProtocolError> {
        let extended = style == HeaderStyle::Extended;
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        out.extend(magic.to_be_bytes());
        out.extend(self.flags.to_be_bytes());
        out.extend(self.command.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        out.extend(self.offset.to_be_bytes());
        if extended {
            out.extend(self.length.to_be_bytes());
        } else {
            let length = u32::try_from(self.length).map_err(|_| ProtocolError::Length {
                what: "a compact request",
                found: self.length,
                rule: "which needs extended headers",
            })?;
            out.extend(length.to_be_bytes());
        }
        Ok(())
    }

    /// Reads a header of [`HeaderStyle::request_header_bytes`].
    pub(crate) fn decode(style: HeaderStyle, bytes: &[u8]) -> Result<Self, ProtocolError> {
        let extended = style == HeaderStyle::Extended;
        let mut fields = Fields::new("a request", bytes);
        let expected = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let found = fields.u32()?;
        if found != expected {
            return Err(ProtocolError::Magic {
                what: "a request",
                found: found.into(),
                expected: expected.into(),
            });
        }
        let (flags, command) = (fields.u16()?, fields.u16()?);
        let (cookie, offset) = (fields.u64()?, fields.u64()?);
        let length = if extended { fields.u64()? } else { fields.u32()?.into() };
        fields.end()?;
        Ok(Self { flags, command, cookie, offset, length })
    }
}
