//! Numbers and texts of messages: little-endian, read with every bound checked.

use crate::error::{Result, SmbError};

/// A message that is being read. Every access is checked: the other side is not trusted.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    /// What is read, for messages.
    what: &'static str,
}

impl<'a> Reader<'a> {
    pub(crate) const fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { bytes, what }
    }

    /// The bytes `offset..offset + length`.
    pub(crate) fn slice(&self, offset: usize, length: usize) -> Result<&'a [u8]> {
        offset.checked_add(length).and_then(|end| self.bytes.get(offset..end)).ok_or_else(|| {
            SmbError::protocol(format!(
                "{}: {length} bytes at {offset} are not inside its {} bytes",
                self.what,
                self.bytes.len()
            ))
        })
    }

    fn array<const N: usize>(&self, offset: usize) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.slice(offset, N)?);
        Ok(array)
    }

    pub(crate) fn u8(&self, offset: usize) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array(offset)?))
    }

    pub(crate) fn u16(&self, offset: usize) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array(offset)?))
    }

    pub(crate) fn u32(&self, offset: usize) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(offset)?))
    }

    pub(crate) fn u64(&self, offset: usize) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(offset)?))
    }

    pub(crate) fn bytes16(&self, offset: usize) -> Result<[u8; 16]> {
        self.array(offset)
    }

    /// The field `StructureSize` at `offset`, which must have this value.
    pub(crate) fn structure(&self, offset: usize, size: u16) -> Result<()> {
        let found = self.u16(offset)?;
        if found == size {
            return Ok(());
        }
        Err(SmbError::protocol(format!("{}: StructureSize is {found}, not {size}", self.what)))
    }
}

/// A message that is being written.
#[derive(Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    pub(crate) fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn zeros(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }
}

/// UTF-16LE.
pub(crate) fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// The text in UTF-16LE; what is no text becomes U+FFFD.
pub(crate) fn from_utf16(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2).map(|unit| match unit {
        [low, high] => u16::from_le_bytes([*low, *high]),
        _ => 0,
    });
    char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

/// The length of a part of a message in its field of 16 bits.
pub(crate) fn length16(bytes: &[u8], what: &str) -> Result<u16> {
    u16::try_from(bytes.len()).map_err(|_| SmbError::unsupported(format!("{what} is too long")))
}

/// The length of a part of a message in its field of 32 bits.
pub(crate) fn length32(bytes: &[u8], what: &str) -> Result<u32> {
    u32::try_from(bytes.len()).map_err(|_| SmbError::unsupported(format!("{what} is too long")))
}
