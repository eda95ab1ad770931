//! GUIDs as VHDX stores and names things.
//!
//! In a file the first three fields are little-endian and the last eight bytes are in order; in
//! text all digits are in the order of significance. Here the bytes are kept as they are stored, so
//! comparing never converts.

use std::fmt;
use std::str::FromStr;
use vmtide_block::{BlockError, Result};

/// A globally unique identifier.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Guid([u8; 16]);

impl Guid {
    /// All zeros, which in every VHDX field means "none".
    pub(crate) const NIL: Self = Self([0; 16]);

    /// The GUID that is written `first-second-third-last[0..2]-last[2..8]`.
    pub(crate) const fn new(first: u32, second: u16, third: u16, last: [u8; 8]) -> Self {
        let (a, b, c) = (first.to_le_bytes(), second.to_le_bytes(), third.to_le_bytes());
        Self([
            a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], last[0], last[1], last[2], last[3],
            last[4], last[5], last[6], last[7],
        ])
    }

    /// The GUID at `at` of a structure; nil where the slice ends before (callers check lengths).
    pub(crate) fn at(bytes: &[u8], at: usize) -> Self {
        bytes
            .get(at..at.saturating_add(16))
            .and_then(|field| field.try_into().ok())
            .map_or(Self::NIL, Self)
    }

    /// The sixteen bytes as they are stored.
    pub(crate) const fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// Whether this is the nil GUID.
    pub(crate) fn is_nil(&self) -> bool {
        *self == Self::NIL
    }

    /// A new random GUID (RFC 9562 version 4).
    ///
    /// # Errors
    /// [`BlockError::Io`] where the operating system gives no random bytes.
    pub(crate) fn random() -> Result<Self> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| {
            BlockError::io("get random bytes for a GUID", std::io::Error::from(error))
        })?;
        // The version is in the high bits of the third field, which is stored little-endian.
        bytes[7] = bytes[7] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Self(bytes))
    }
}

/// Lower case, without braces.
impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
        for (place, index) in ORDER.into_iter().enumerate() {
            if matches!(place, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0[index])?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What is not a GUID in text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotAGuid;

/// Any case, with or without braces.
impl FromStr for Guid {
    type Err = NotAGuid;

    fn from_str(text: &str) -> Result<Self, NotAGuid> {
        let plain = text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).unwrap_or(text);
        let mut fields = plain.split('-');
        let mut field = |digits: usize| {
            let text = fields.next().filter(|text| text.len() == digits).ok_or(NotAGuid)?;
            // from_str_radix would take a sign.
            if !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(NotAGuid);
            }
            u64::from_str_radix(text, 16).map_err(|_| NotAGuid)
        };
        let first = u32::try_from(field(8)?).map_err(|_| NotAGuid)?;
        let second = u16::try_from(field(4)?).map_err(|_| NotAGuid)?;
        let third = u16::try_from(field(4)?).map_err(|_| NotAGuid)?;
        let last = (field(4)? << 48 | field(12)?).to_be_bytes();
        if fields.next().is_some() {
            return Err(NotAGuid);
        }
        Ok(Self::new(first, second, third, last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_mixed_endian_and_written_in_order() {
        let guid =
            Guid::new(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 8]);
        let stored = [
            0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd,
            0x4a, 0x08,
        ];
        assert_eq!(guid.to_bytes(), stored);
        assert_eq!(Guid::at(&stored, 0), guid);
        assert_eq!(guid.to_string(), "2dc27766-f623-4200-9d64-115e9bfd4a08");
        for text in
            ["2dc27766-f623-4200-9d64-115e9bfd4a08", "{2DC27766-F623-4200-9D64-115E9BFD4A08}"]
        {
            assert_eq!(text.parse(), Ok(guid));
        }
    }

    #[test]
    fn what_is_no_guid_is_refused() {
        for text in [
            "",
            "{}",
            "2dc27766",
            "2dc27766-f623-4200-9d64-115e9bfd4a0",
            "2dc27766-f623-4200-9d64-115e9bfd4a08-",
            "+dc27766-f623-4200-9d64-115e9bfd4a08",
            "2dc2776é-f623-4200-9d64-115e9bfd4a08",
            "{2dc27766-f623-4200-9d64-115e9bfd4a08",
        ] {
            assert_eq!(text.parse::<Guid>(), Err(NotAGuid), "{text:?}");
        }
    }

    #[test]
    fn random_ones_are_version_4_and_differ() {
        let (one, other) = (Guid::random().unwrap(), Guid::random().unwrap());
        assert_ne!(one, other);
        assert_eq!(one.to_string().as_bytes()[14], b'4');
        assert!(Guid::NIL.is_nil() && !one.is_nil());
    }
}
