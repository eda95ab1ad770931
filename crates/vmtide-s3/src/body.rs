//! The body of a request: content, read as it is sent.

use crate::spool::Content;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::io::Error;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Content on its way. A new one is made for every try.
pub(crate) struct ContentBody {
    content: Content,
    offset: u64,
}

impl ContentBody {
    /// All of `content`.
    pub(crate) const fn new(content: Content) -> Self {
        Self { content, offset: 0 }
    }
}

impl Body for ContentBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if self.is_end_stream() {
            return Poll::Ready(None);
        }
        // A file is read here and now: it was written a moment ago, and comes out of memory.
        Poll::Ready(Some(self.content.read_from(self.offset).map(|bytes| {
            self.offset += bytes.len() as u64;
            Frame::data(bytes)
        })))
    }

    fn is_end_stream(&self) -> bool {
        self.offset >= self.content.length_bytes()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.content.length_bytes().saturating_sub(self.offset))
    }
}
