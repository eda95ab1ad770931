//! Tracking ids: the names of sealed moments.

use std::fmt;

/// The most characters an id has where it is stored or shown by others (virtdisk.h gives 255).
pub(crate) const MAX_ID_CHARACTERS: usize = 255;

/// The largest counter: it is written with eight decimal digits.
pub(crate) const MAX_COUNTER: u32 = 99_999_999;

/// The random name of one uninterrupted tracking of one disk.
///
/// Not the disk's own id: tracking that was lost goes on under a new one, so that ids of before can never be
/// taken for ids of now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Series(pub(crate) [u8; 16]);

impl Series {
    /// Stands for "any series before this one": of an unreadable file nobody knows whose it was.
    pub(crate) const ANY: Self = Self([0; 16]);

    /// A new random one.
    pub(crate) fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
        // Version 4, variant 1 (RFC 9562): tools that look into ids find a GUID.
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Self(bytes))
    }
}

/// The name of a sealed moment: `rctX:`, a GUID whose dashes are colons, `:`, and a counter of eight digits
/// that goes up with every moment, as Hyper-V writes them. **Opaque** to everybody else.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TrackingId {
    pub(crate) series: Series,
    pub(crate) counter: u32,
}

impl TrackingId {
    /// Understands the text of an id; none for anything else.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if text.len() > MAX_ID_CHARACTERS {
            return None;
        }
        let rest = text.strip_prefix("rctX:")?;
        let mut fields = rest.split(':');
        let mut bytes = [0u8; 16];
        let mut at = 0;
        for width in [8, 4, 4, 4, 12] {
            let field = fields.next()?;
            if field.len() != width || !field.bytes().all(|c| c.is_ascii_hexdigit()) {
                return None;
            }
            for pair in 0..width / 2 {
                let digits = field.get(2 * pair..2 * pair + 2)?;
                *bytes.get_mut(at)? = u8::from_str_radix(digits, 16).ok()?;
                at += 1;
            }
        }
        let counter = fields.next()?;
        if counter.len() != 8 || !counter.bytes().all(|c| c.is_ascii_digit()) {
            return None;
        }
        let counter = counter.parse().ok()?;
        fields.next().is_none().then_some(Self { series: Series(bytes), counter })
    }
}

impl fmt::Display for TrackingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("rctX:")?;
        for (index, byte) in self.series.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str(":")?;
            }
            write!(f, "{byte:02x}")?;
        }
        write!(f, ":{:08}", self.counter)
    }
}

impl fmt::Debug for TrackingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_look_like_hyper_vs_and_are_read_back() {
        let text = "rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:00000001";
        let id = TrackingId::parse(text).unwrap();
        assert_eq!((id.counter, id.to_string().as_str()), (1, text));
        let id = TrackingId { series: Series::random().unwrap(), counter: MAX_COUNTER };
        assert_eq!(TrackingId::parse(&id.to_string()), Some(id));
    }

    #[test]
    fn garbage_is_no_id() {
        let long = format!("rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:{}", "0".repeat(300));
        let full = "x".repeat(MAX_ID_CHARACTERS);
        for text in [
            "",
            "rctX:",
            "rctX:5bfde23b:ce75:4303:b54f:6c18394f105c",
            "rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:1",
            "rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:0000000g",
            "rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:+0000001",
            "rctX:5bfde23b:ce75:4303:b54f:6c18394f105c:00000001:",
            "rctX:5bfde23b-ce75-4303-b54f-6c18394f105c:00000001",
            "rctx:5bfde23b:ce75:4303:b54f:6c18394f105c:00000001",
            "rctX:5bfde2éb:ce75:4303:b54f:6c18394f105c:00000001",
            &long,
            &full,
        ] {
            assert_eq!(TrackingId::parse(text), None, "{text}");
        }
    }
}
