//! Answers that are in memory whole, and take their place there until their client has them.
//!
//! How many such answers there may be at once is limited by places. A place that came back when the answer was made
//! would limit nothing: a client that takes its answers slowly could have any number of them kept. They are handed
//! over in pieces, so that a guard against stalled clients sees each of them go.

use axum::body::Body;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll};

/// What is handed over at once, in bytes; as much as is buffered for a connection is more than that.
const PIECE_BYTES: usize = 256 << 10;

/// A body of `content`, which keeps `place` until the last piece was taken, or nobody will take it.
pub fn hold(content: Vec<u8>, place: impl Send + Unpin + 'static) -> Body {
    Body::new(HeldBody { content: content.into(), place: Some(place) })
}

struct HeldBody<P> {
    content: Bytes,
    place: Option<P>,
}

impl<P: Unpin> http_body::Body for HeldBody<P> {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.content.is_empty() {
            self.place = None;
            return Poll::Ready(None);
        }
        let length = self.content.len().min(PIECE_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.content.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.content.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.content.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use std::sync::Arc;

    #[tokio::test]
    async fn the_place_is_kept_until_all_was_taken_or_nobody_is_there() {
        let content: Vec<u8> = (0..=250).cycle().take(PIECE_BYTES * 2 + 7).collect();
        let place = Arc::new(());
        let mut body = hold(content.clone(), Arc::clone(&place));
        assert_eq!(http_body::Body::size_hint(&body).exact(), Some(content.len() as u64));
        let mut taken = Vec::new();
        while let Some(frame) = body.frame().await {
            assert_eq!(Arc::strong_count(&place), 2, "while it is taken");
            let piece = frame.unwrap().into_data().unwrap();
            assert!(piece.len() <= PIECE_BYTES);
            taken.extend_from_slice(&piece);
        }
        assert!(taken == content && http_body::Body::is_end_stream(&body));
        drop(body);
        assert_eq!(Arc::strong_count(&place), 1);
        drop(hold(content, Arc::clone(&place)));
        assert_eq!(Arc::strong_count(&place), 1, "nobody took it");
    }
}
