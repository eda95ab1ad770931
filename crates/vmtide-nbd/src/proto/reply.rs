//! Reply headers: simple (16 bytes), structured (20 bytes) and extended (32 bytes).

use super::ProtocolError;
use super::constants::{
    EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use super::request::HeaderStyle;
use super::wire::Fields;

/// The shortest reply header; its magic says how many bytes follow.
pub(crate) const SHORTEST_REPLY_HEADER_BYTES: usize = 16;

/// The longest reply header.
pub(crate) const LONGEST_REPLY_HEADER_BYTES: usize = 32;

/// The header of a simple reply or of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReplyHeader {
    /// The whole reply; data follows a successful read.
    Simple {
        /// 0, or an error value.
        error: u32,
        /// The request's.
        cookie: u64,
    },
    /// One chunk of a reply.
    Chunk {
        /// `NBD_REPLY_FLAG_*`.
        flags: u16,
        /// `NBD_REPLY_TYPE_*`.
        kind: u16,
        /// The request's.
        cookie: u64,
        /// The request's, in extended headers only.
        offset: Option<u64>,
        /// The payload that follows, in bytes.
        length: u64,
    },
}

impl ReplyHeader {
    /// How long the header is that starts with `magic`, where the agreed style allows it.
    pub(crate) fn length_by_magic(style: HeaderStyle, magic: u32) -> Result<usize, ProtocolError> {
        match (style, magic) {
            (HeaderStyle::Simple | HeaderStyle::Structured, SIMPLE_REPLY_MAGIC) => Ok(16),
            (HeaderStyle::Structured, STRUCTURED_REPLY_MAGIC) => Ok(20),
            (HeaderStyle::Extended, EXTENDED_REPLY_MAGIC) => Ok(32),
            (_, found) => Err(ProtocolError::Magic {
                what: "a reply",
                found: found.into(),
                expected: match style {
                    HeaderStyle::Simple => SIMPLE_REPLY_MAGIC,
                    HeaderStyle::Structured => STRUCTURED_REPLY_MAGIC,
                    HeaderStyle::Extended => EXTENDED_REPLY_MAGIC,
                }
                .into(),
            }),
        }
    }

    /// Reads a header whose length [`length_by_magic`](Self::length_by_magic) gave.
    pub(crate) fn decode(style: HeaderStyle, bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::new("a reply", bytes);
        let magic = fields.u32()?;
        Self::length_by_magic(style, magic)?;
        let header = if magic == SIMPLE_REPLY_MAGIC {
            Self::Simple { error: fields.u32()?, cookie: fields.u64()? }
        } else {
            let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
            let extended = magic == EXTENDED_REPLY_MAGIC;
            let offset = if extended { Some(fields.u64()?) } else { None };
            let length = if extended { fields.u64()? } else { fields.u32()?.into() };
            Self::Chunk { flags, kind, cookie, offset, length }
        };
        fields.end()?;
        Ok(header)
    }

    /// Appends the header. A chunk without an offset becomes a structured one, with one an
    /// extended one.
    ///
    /// # Errors
    /// A length that does not fit a structured chunk.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        match *self {
            Self::Simple { error, cookie } => {
                out.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
                out.extend(error.to_be_bytes());
                out.extend(cookie.to_be_bytes());
            }
            Self::Chunk { flags, kind, cookie, offset, length } => {
                let magic = match offset {
                    Some(_) => EXTENDED_REPLY_MAGIC,
                    None => STRUCTURED_REPLY_MAGIC,
                };
                out.extend(magic.to_be_bytes());
                out.extend(flags.to_be_bytes());
                out.extend(kind.to_be_bytes());
                out.extend(cookie.to_be_bytes());
                if let Some(offset) = offset {
                    out.extend(offset.to_be_bytes());
                    out.extend(length.to_be_bytes());
                } else {
                    let length = u32::try_from(length).map_err(|_| ProtocolError::Length {
                        what: "a structured chunk",
                        found: length,
                        rule: "which needs extended headers",
                    })?;
                    out.extend(length.to_be_bytes());
                }
            }
        }
        Ok(())
    }

    /// What ties it to a request.
    pub(crate) const fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => *cookie,
        }
    }

    /// Whether nothing follows this simple reply or chunk for its request.
    pub(crate) const fn is_last(&self) -> bool {
        match self {
            Self::Simple { .. } => true,
            Self::Chunk { flags, .. } => *flags & REPLY_FLAG_DONE != 0,
        }
    }
}
