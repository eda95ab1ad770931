//! GUIDs as the interface writes them.

use std::fmt;

/// A GUID. Shown in lower case with dashes, without braces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Guid {
    /// The first field.
    pub data1: u32,
    /// The second field.
    pub data2: u16,
    /// The third field.
    pub data3: u16,
    /// The last two fields.
    pub data4: [u8; 8],
}

impl Guid {
    /// From its 16 bytes as they lie in memory on a little-endian machine.
    pub fn from_memory(bytes: [u8; 16]) -> Self {
        let [a0, a1, a2, a3, b0, b1, c0, c1, data4 @ ..] = bytes;
        Self {
            data1: u32::from_le_bytes([a0, a1, a2, a3]),
            data2: u16::from_le_bytes([b0, b1]),
            data3: u16::from_le_bytes([c0, c1]),
            data4,
        }
    }

    /// From text as [`Display`](fmt::Display) has it, in any case, with braces or without; none for any other text.
    pub fn parse(text: &str) -> Option<Self> {
        let bare = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(text);
        let lengths = [8, 4, 4, 4, 12];
        let parts: Vec<&str> = bare.split('-').collect();
        let fits = parts.len() == lengths.len()
            && parts.iter().zip(lengths).all(|(part, length)| {
                part.len() == length && part.bytes().all(|byte| byte.is_ascii_hexdigit())
            });
        let [a, b, c, d, e] = parts.as_slice() else { return None };
        let tail = u64::from_str_radix(&format!("{d}{e}"), 16).ok().filter(|_| fits)?;
        Some(Self {
            data1: u32::from_str_radix(a, 16).ok()?,
            data2: u16::from_str_radix(b, 16).ok()?,
            data3: u16::from_str_radix(c, 16).ok()?,
            data4: tail.to_be_bytes(),
        })
    }

    /// Whether all bits are zero, which stands for "none".
    pub fn is_nil(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, rest @ ..] = self.data4;
        write!(f, "{:08x}-{:04x}-{:04x}-{a:02x}{b:02x}-", self.data1, self.data2, self.data3)?;
        rest.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `VIRTUAL_STORAGE_TYPE_VENDOR_MICROSOFT` of virtdisk.h.
    #[test]
    fn text_is_read_as_it_is_written() {
        let text = "ec984aec-a0f9-47e9-901f-71415a66345b";
        let id = Guid::parse(text).unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!(Guid::parse(&format!("{{{}}}", text.to_uppercase())), Some(id));
        for bad in [
            "",
            "x",
            &text[1..],
            "ec984aec-a0f9-47e9-901f-71415a66345g",
            "+c984aec-a0f9-47e9-901f-71415a66345b",
        ] {
            assert_eq!(Guid::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn fields_are_little_endian_and_the_rest_is_not() {
        let bytes = [
            0xec_u8, 0x4a, 0x98, 0xec, 0xf9, 0xa0, 0xe9, 0x47, 0x90, 0x1f, 0x71, 0x41, 0x5a, 0x66,
            0x34, 0x5b,
        ];
        assert_eq!(Guid::from_memory(bytes).to_string(), "ec984aec-a0f9-47e9-901f-71415a66345b");
        assert!(!Guid::from_memory(bytes).is_nil() && Guid::from_memory([0; 16]).is_nil());
    }
}
