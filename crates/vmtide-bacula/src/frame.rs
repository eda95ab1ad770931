//! Frames on the pipe between plugin and backend: a letter, the length in six digits, a line feed, and the
//! payload. `docs/bacula-protocol.md` has the whole of it.

/// The bytes before a payload.
pub const HEADER_BYTES: usize = 8;

/// The longest payload: what six digits can say.
pub const MAX_PAYLOAD_BYTES: usize = 999_999;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `C`: a line of a command or an answer.
    Command,
    /// `D`: data.
    Data,
    /// `M`: data that lie in the memory that the plugin gave.
    Place,
    /// `R`: what the oldest [`Place`](Self::Place) named was taken.
    Taken,
    /// `F`: the end of a block of frames.
    End,
    /// `K`: the backend is at work.
    Alive,
    /// `I`: information for the job's report.
    Info,
    /// `W`: a warning.
    Warning,
    /// `E`: an error; the job goes on.
    Error,
    /// `A`: the job cannot go on.
    Abort,
}

const LETTERS: [(Kind, u8); 10] = [
    (Kind::Command, b'C'),
    (Kind::Data, b'D'),
    (Kind::Place, b'M'),
    (Kind::Taken, b'R'),
    (Kind::End, b'F'),
    (Kind::Alive, b'K'),
    (Kind::Info, b'I'),
    (Kind::Warning, b'W'),
    (Kind::Error, b'E'),
    (Kind::Abort, b'A'),
];

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Its length in bytes, at most [`MAX_PAYLOAD_BYTES`].
    pub length: usize,
}

impl Header {
    /// Reads a header; none where it is none.
    pub fn parse(bytes: [u8; HEADER_BYTES]) -> Option<Self> {
        let [letter, digits @ .., b'\n'] = bytes else { return None };
        let (kind, _) = LETTERS.iter().find(|(_, known)| *known == letter)?;
        let mut length = 0usize;
        for digit in digits {
            let value = digit.checked_sub(b'0').filter(|value| *value < 10)?;
            length = length * 10 + usize::from(value);
        }
        let fits = length == 0 || !matches!(kind, Kind::End | Kind::Alive | Kind::Taken);
        fits.then_some(Self { kind: *kind, length })
    }

    /// As it is written. A length that is too large would be a mistake of the caller, and is cut.
    pub fn bytes(self) -> [u8; HEADER_BYTES] {
        let letter = LETTERS.iter().find(|(kind, _)| *kind == self.kind);
        let mut bytes = *b"C000000\n";
        bytes[0] = letter.map_or(b'C', |(_, letter)| *letter);
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
        for (kind, _) in LETTERS {
            for length in [0, 1, 65_536, 999_999] {
                let header = Header { kind, length };
                let has_none = matches!(kind, Kind::End | Kind::Alive | Kind::Taken);
                let expected = (length == 0 || !has_none).then_some(header);
                assert_eq!(Header::parse(header.bytes()), expected);
            }
        }
        assert_eq!(&Header { kind: Kind::Data, length: 65_536 }.bytes(), b"D065536\n");
        for bad in [b"X000001\n", b"C00000a\n", b"C-00001\n", b"C0000011", b"c000001\n"] {
            assert_eq!(Header::parse(*bad), None, "{bad:?}");
        }
    }
}
