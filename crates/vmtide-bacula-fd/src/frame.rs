//! Frames on the pipe: a letter, the length in six digits, a line feed, and the payload. See
//! `docs/bacula-protocol.md`.

/// The bytes before a payload.
pub const HEADER_BYTES: usize = 8;

/// The longest payload.
pub const MAX_PAYLOAD_BYTES: usize = 999_999;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A line of a command or an answer.
    Command,
    /// Data.
    Data,
    /// Data that lie in the memory.
    Place,
    /// What the oldest [`Place`](Self::Place) named was taken.
    Taken,
    /// The end of a block of frames.
    End,
    /// The backend is at work.
    Alive,
    /// Information for the job's report.
    Info,
    /// A warning.
    Warning,
    /// An error; the job goes on.
    Error,
    /// The job cannot go on.
    Abort,
}

/// A header that was understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Its length in bytes.
    pub length: usize,
}

impl Header {
    /// Reads a header; none where it is none.
    pub fn parse(bytes: [u8; HEADER_BYTES]) -> Option<Self> {
        let [letter, digits @ .., b'\n'] = bytes else { return None };
        let kind = match letter {
            b'C' => Kind::Command,
            b'D' => Kind::Data,
            b'M' => Kind::Place,
            b'R' => Kind::Taken,
            b'F' => Kind::End,
            b'K' => Kind::Alive,
            b'I' => Kind::Info,
            b'W' => Kind::Warning,
            b'E' => Kind::Error,
            b'A' => Kind::Abort,
            _ => return None,
        };
        let mut length = 0usize;
        for digit in digits {
            if !digit.is_ascii_digit() {
                return None;
            }
            length = length * 10 + usize::from(digit - b'0');
        }
        let has_none = matches!(kind, Kind::End | Kind::Alive | Kind::Taken);
        (length == 0 || !has_none).then_some(Self { kind, length })
    }

    /// The header as it is sent.
    pub fn bytes(self) -> [u8; HEADER_BYTES] {
        let letter = match self.kind {
            Kind::Command => b'C',
            Kind::Data => b'D',
            Kind::Place => b'M',
            Kind::Taken => b'R',
            Kind::End => b'F',
            Kind::Alive => b'K',
            Kind::Info => b'I',
            Kind::Warning => b'W',
            Kind::Error => b'E',
            Kind::Abort => b'A',
        };
        let mut bytes = [letter, b'0', b'0', b'0', b'0', b'0', b'0', b'\n'];
        let mut rest = self.length.min(MAX_PAYLOAD_BYTES);
        for digit in bytes.iter_mut().skip(1).take(6).rev() {
            *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
            rest /= 10;
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_as_they_were() {
        for (kind, length) in [
            (Kind::Command, 5),
            (Kind::Data, 999_999),
            (Kind::Data, 65_536),
            (Kind::Place, 9),
            (Kind::End, 0),
            (Kind::Taken, 0),
        ] {
            let header = Header { kind, length };
            assert_eq!(Header::parse(header.bytes()), Some(header));
        }
        assert_eq!(&Header { kind: Kind::Data, length: 65_536 }.bytes(), b"D065536\n");
    }

    #[test]
    fn what_is_no_header_is_refused() {
        for bad in [
            b"X000001\n",
            b"C00000a\n",
            b"C-00001\n",
            b"C0000011",
            b"F000001\n",
            b"K000009\n",
            b"R000001\n",
        ] {
            assert_eq!(Header::parse(*bad), None, "{bad:?}");
        }
    }
}
