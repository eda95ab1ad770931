//! The answer to a request, and the place its content goes to as it arrives: into memory of its own, or straight into
//! that of whoever reads an object. With the former in between, 4 MiB of fresh memory were made and thrown away for each
//! part of a pack, and every byte was copied once more.

use bytes::{Bytes, BytesMut};
use http::HeaderMap;

/// A successful answer.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The status.
    pub(crate) status: u16,
    /// The headers.
    pub(crate) headers: HeaderMap,
    /// The body; empty where it is longer than was asked for, or where it went into memory of the caller's.
    pub(crate) body: Bytes,
    /// The bytes of the body, wherever it went; 0 where it is longer than was asked for.
    pub(crate) body_bytes: usize,
}

impl Answer {
    /// A header's text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

/// Where content goes as it arrives.
pub(crate) enum Sink<'a> {
    /// Into memory of its own, so many bytes at most.
    Kept { bytes: BytesMut, limit: usize },
    /// Into the caller's, no more than fit in it.
    Caller { buffer: &'a mut [u8], filled: usize },
}

impl<'a> Sink<'a> {
    /// Memory of its own for so many bytes at most.
    pub(crate) fn kept(limit: usize) -> Self {
        Self::Kept { bytes: BytesMut::new(), limit }
    }

    /// The caller's memory, which is overwritten from its beginning.
    pub(crate) const fn caller(buffer: &'a mut [u8]) -> Self {
        Self::Caller { buffer, filled: 0 }
    }

    /// The most that it takes.
    pub(crate) const fn limit(&self) -> usize {
        match self {
            Self::Kept { limit, .. } => *limit,
            Self::Caller { buffer, .. } => buffer.len(),
        }
    }

    /// What it has taken.
    pub(crate) fn length(&self) -> usize {
        match self {
            Self::Kept { bytes, .. } => bytes.len(),
            Self::Caller { filled, .. } => *filled,
        }
    }

    /// Takes what arrived next; false, and all of it forgotten, where that is too much.
    pub(crate) fn push(&mut self, part: &[u8]) -> bool {
        if part.len() > self.limit() - self.length() {
            match self {
                Self::Kept { bytes, .. } => bytes.clear(),
                Self::Caller { filled, .. } => *filled = 0,
            }
            return false;
        }
        match self {
            Self::Kept { bytes, .. } => bytes.extend_from_slice(part),
            Self::Caller { buffer, filled } => {
                buffer[*filled..*filled + part.len()].copy_from_slice(part);
                *filled += part.len();
            }
        }
        true
    }

    /// What is in memory of its own.
    pub(crate) fn into_bytes(self) -> Bytes {
        match self {
            Self::Kept { bytes, .. } => bytes.freeze(),
            Self::Caller { .. } => Bytes::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_arrives_in_pieces_and_too_much_of_it_is_forgotten() {
        let mut buffer = [0; 5];
        for (mut sink, expected) in
            [(Sink::kept(5), &b"abcde"[..]), (Sink::caller(&mut buffer), b"")]
        {
            assert_eq!((sink.limit(), sink.length()), (5, 0));
            assert!(sink.push(b"abc") && sink.push(b"") && sink.push(b"de"));
            assert_eq!(sink.length(), 5);
            assert!(!sink.push(b"f"));
            assert_eq!(sink.length(), 0);
            assert!(sink.push(b"abcde"));
            assert_eq!(&sink.into_bytes()[..], expected);
        }
        assert_eq!(&buffer, b"abcde");
    }
}
