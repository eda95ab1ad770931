//! An answer over HTTP/2 whose client must take it.
//!
//! [`StallGuard`](crate::stall::StallGuard) watches a connection; over HTTP/2 that is not enough. A client may leave
//! one stream of a connection unread while its library goes on answering pings and reading other streams: the
//! connection makes progress for ever, and the answer, with the disk that it reads and its places among the limits,
//! is kept for as long. So each answer is watched, too: one that nobody has asked for more of for too long is
//! dropped, with all that it holds; what its client gets is a stream that is reset. What was handed to the
//! connection before stays there, one frame at most.

use axum::body::Body;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// The same body, dropped where nobody asks it for more for as long as `timeout`. Inside of a tokio runtime.
pub fn guard(body: Body, timeout: Duration) -> Body {
    if http_body::Body::is_end_stream(&body) {
        return body;
    }
    let state = State { inner: Some(body), idle_since: Some(Instant::now()) };
    let state = Arc::new(Mutex::new(state));
    let watch = tokio::spawn(watch(Arc::downgrade(&state), timeout)).abort_handle();
    Body::new(StallBody { state, watch })
}

struct StallBody {
    state: Arc<Mutex<State>>,
    watch: AbortHandle,
}

struct State {
    /// None once it was given up.
    inner: Option<Body>,
    /// Since when it has been waiting for its client; none while its client waits for it.
    idle_since: Option<Instant>,
}

async fn watch(state: Weak<Mutex<State>>, timeout: Duration) {
    let mut next = Some(Instant::now() + timeout);
    while let Some(at) = next {
        tokio::time::sleep_until(at).await;
        next = state.upgrade().and_then(|state| look(&state, timeout));
    }
}

/// Gives the body up where it is time; else when to look again.
fn look(state: &Mutex<State>, timeout: Duration) -> Option<Instant> {
    let now = Instant::now();
    let mut state = state.lock();
    let ends = state.idle_since.unwrap_or(now) + timeout;
    if ends > now {
        return Some(ends);
    }
    let given_up = state.inner.take();
    // What it holds is let go without the lock.
    drop(state);
    drop(given_up);
    tracing::debug!("an answer was given up: its client does not take it");
    None
}

impl http_body::Body for StallBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut state = self.state.lock();
        let Some(inner) = &mut state.inner else {
            let reason = "the other side does not take what is sent to it";
            let error = std::io::Error::new(std::io::ErrorKind::TimedOut, reason);
            return Poll::Ready(Some(Err(axum::Error::new(error))));
        };
        let polled = Pin::new(inner).poll_frame(context);
        state.idle_since = polled.is_ready().then(Instant::now);
        polled
    }

    fn is_end_stream(&self) -> bool {
        // One that was given up has an error to tell.
        self.state.lock().inner.as_ref().is_some_and(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.state.lock().inner.as_ref().map(http_body::Body::size_hint).unwrap_or_default()
    }
}

impl Drop for StallBody {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{Request, Response};
    use http_body_util::BodyExt;
    use hyper::service::service_fn;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const TIMEOUT: Duration = Duration::from_millis(200);

    /// A body of so many pieces, each of which takes a while; counts how many of its kind there are.
    struct Pieces {
        left: usize,
        takes: Duration,
        sleep: Option<Pin<Box<tokio::time::Sleep>>>,
        alive: Arc<AtomicUsize>,
    }

    impl Pieces {
        fn body(left: usize, takes: Duration, alive: &Arc<AtomicUsize>) -> Body {
            alive.fetch_add(1, Ordering::SeqCst);
            Body::new(Self { left, takes, sleep: None, alive: Arc::clone(alive) })
        }
    }

    impl Drop for Pieces {
        fn drop(&mut self) {
            self.alive.fetch_sub(1, Ordering::SeqCst);
        }
    }

    impl http_body::Body for Pieces {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            if self.left == 0 {
                return Poll::Ready(None);
            }
            let takes = self.takes;
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(takes)));
            std::task::ready!(sleep.as_mut().poll(context));
            self.sleep = None;
            self.left -= 1;
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[7; 4096])))))
        }
    }

    #[tokio::test]
    async fn a_slow_disk_is_waited_for() {
        let alive = Arc::default();
        let body = guard(Pieces::body(3, TIMEOUT * 3, &alive), TIMEOUT);
        assert_eq!(body.collect().await.unwrap().to_bytes().len(), 3 * 4096);
        assert_eq!(alive.load(Ordering::SeqCst), 0);
    }

    /// Asks over HTTP/2 for an endless answer, with a window of so many bytes; reads nothing.
    async fn ask(
        window_bytes: u32,
        alive: Arc<AtomicUsize>,
    ) -> (Response<hyper::body::Incoming>, impl Drop) {
        let (near, far) = tokio::io::duplex(1 << 20);
        let service = service_fn(move |_| {
            let body = guard(Pieces::body(usize::MAX, Duration::ZERO, &alive), TIMEOUT);
            async { Ok::<_, Infallible>(Response::new(body)) }
        });
        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move { drop(server.serve_connection(TokioIo::new(far), service).await) });
        let (mut sender, connection) =
            hyper::client::conn::http2::Builder::new(TokioExecutor::new())
                .initial_stream_window_size(window_bytes)
                .handshake::<_, Body>(TokioIo::new(near))
                .await
                .unwrap();
        tasks.spawn(async move { drop(connection.await) });
        let request = Request::get("http://agent/").body(Body::empty()).unwrap();
        let answer = sender.send_request(request).await.unwrap();
        (answer, Connected { _sender: sender, _tasks: tasks })
    }

    struct Connected<S> {
        _sender: S,
        _tasks: tokio::task::JoinSet<()>,
    }

    impl<S> Drop for Connected<S> {
        fn drop(&mut self) {}
    }

    #[tokio::test]
    async fn a_stream_of_http2_that_nobody_reads_is_given_up_and_the_connection_is_not() {
        for window_bytes in [1, 64 << 10] {
            let alive: Arc<AtomicUsize> = Arc::default();
            let (answer, _connected) = ask(window_bytes, Arc::clone(&alive)).await;
            assert_eq!(alive.load(Ordering::SeqCst), 1);
            while alive.load(Ordering::SeqCst) > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            // What is still read of it ends with an error, and not as if it were all.
            assert!(answer.into_body().collect().await.is_err(), "{window_bytes}");
        }
    }
}
