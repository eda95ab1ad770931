//! The body of a request: content, read as it is sent.

use crate::spool::Content;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::io::Error;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

/// Content on its way. A new one is made for every try.
pub(crate) struct ContentBody {
    content: Content,
    offset: u64,
    sent_bytes: Arc<AtomicU64>,
}

impl ContentBody {
    /// All of `content`. How much of it was taken to be sent is kept in `sent_bytes`.
    pub(crate) const fn new(content: Content, sent_bytes: Arc<AtomicU64>) -> Self {
        Self { content, offset: 0, sent_bytes }
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
            self.sent_bytes.store(self.offset, Ordering::Relaxed);
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
