//! Reading and writing big-endian fields in bounded byte slices.

use super::{ProtocolError, constants::MAX_STRING_BYTES, violation};

/// A cursor over the bytes of one message.
pub(crate) struct Fields<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// The fields of the message `what`.
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    /// The next `length` bytes.
    pub(crate) fn bytes(&mut self, length: usize) -> Result<&'a [u8], ProtocolError> {
        match self.rest.split_at_checked(length) {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(head)
            }
            None => Err(violation(format!(
                "{} ends {} bytes early",
                self.what,
                length - self.rest.len()
            ))),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N)?);
        Ok(out)
    }

    /// 16 bits.
    pub(crate) fn u16(&mut self) -> Result<u16, ProtocolError> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    /// 32 bits.
    pub(crate) fn u32(&mut self) -> Result<u32, ProtocolError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// 64 bits.
    pub(crate) fn u64(&mut self) -> Result<u64, ProtocolError> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// All bytes that are left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// A string with a 32-bit length before it.
    pub(crate) fn counted_string(&mut self) -> Result<String, ProtocolError> {
        let length = self.u32()?;
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= MAX_STRING_BYTES)
            .ok_or(ProtocolError::Length {
                what: self.what,
                found: length.into(),
                rule: "and strings end at 4096",
            })?;
        string(self.what, self.bytes(length)?)
    }

    /// Succeeds where nothing is left.
    pub(crate) fn end(self) -> Result<(), ProtocolError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(violation(format!("{} has {} bytes too many", self.what, self.rest.len())))
    }
}

/// The bytes as a string of the protocol: UTF-8 without NUL, at most 4096 bytes.
pub(crate) fn string(what: &'static str, bytes: &[u8]) -> Result<String, ProtocolError> {
    match std::str::from_utf8(bytes) {
        Ok(text) if bytes.len() <= MAX_STRING_BYTES && !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(violation(format!("{what} holds a string that is not valid"))),
    }
}

/// A peer's text made safe to print: no control characters, bounded length.
pub(crate) fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(512)])
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// Appends a string with its 32-bit length.
pub(crate) fn put_counted_string(out: &mut Vec<u8>, text: &str) {
    // Callers bound every string by MAX_STRING_BYTES; saturating keeps the message well-formed
    // for the peer to refuse were that ever broken.
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    out.extend(length.to_be_bytes());
    out.extend(text.as_bytes());
}
