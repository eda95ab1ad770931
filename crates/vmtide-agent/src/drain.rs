//! Requests that are refused before all of them was read.
//!
//! A server that answers and closes while its client still sends makes the client's system throw the answer away:
//! the client sees a broken connection and no reason. So what is left of a request's body is read and forgotten,
//! for a while, whenever a handler drops it unread.

use axum::body::Body;
use axum::extract::Request;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

/// The most that is read for nothing. A client that sends more does not want to know.
const MAX_BYTES: usize = 16 << 20;

/// How long is read for nothing: a connection is held for as long.
const MAX_TIME: Duration = Duration::from_secs(2);

/// The same request, whose body is read for a while after it was dropped.
pub(crate) async fn wrap(request: Request) -> Request {
    request.map(|body| match http_body::Body::is_end_stream(&body) {
        true => body,
        false => Body::new(Drained { inner: Some(body) }),
    })
}

struct Drained {
    /// None once it was read to its end, or failed.
    inner: Option<Body>,
}

impl http_body::Body for Drained {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Some(inner) = &mut self.inner else {
            return Poll::Ready(None);
        };
        let polled = std::task::ready!(Pin::new(inner).poll_frame(context));
        if !matches!(polled, Some(Ok(_))) {
            self.inner = None;
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), http_body::Body::size_hint)
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        let rest = self.inner.take().filter(|rest| !http_body::Body::is_end_stream(rest));
        if let (Some(rest), Ok(runtime)) = (rest, tokio::runtime::Handle::try_current()) {
            drop(runtime.spawn(tokio::time::timeout(MAX_TIME, drain(rest))));
        }
    }
}

async fn drain(mut rest: Body) {
    let mut left = MAX_BYTES;
    while let Some(Ok(frame)) = rest.frame().await {
        let Some(fewer) = left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) else {
            return;
        };
        left = fewer;
    }
}
