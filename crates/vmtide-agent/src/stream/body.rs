//! Content as the body of an answer.

use super::encode::Encoding;
use super::error::StreamError;
use super::pipeline::{Pipeline, Place, Ready, StreamOptions};
use super::plan::Planner;
use super::ranges::RangeList;
use crate::transfers::Transfer;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Sleep;
use vmtide_block::BlockDevice;

/// How long a stream that failed waits before it cuts the connection, so that what was sent before, and the
/// head of the answer, still reach a client that takes it. Nothing depends on it: a client counts what it got.
const FLUSH_TIME: Duration = Duration::from_millis(100);

/// What to send.
pub struct ContentRequest {
    /// The disk.
    pub device: Arc<dyn BlockDevice>,
    /// Which ranges of it.
    pub ranges: RangeList,
    /// The position to begin at.
    pub from: u64,
    /// The position to end at; what is past the end means the end.
    pub until: u64,
    /// The form.
    pub encoding: Encoding,
}

/// A body that reads a disk as fast as its client takes it.
///
/// It ends with all bytes, or with an error; hyper cuts the connection then. Dropping it ends its readers, and
/// its [`Transfer`] as aborted, unless everything was handed over.
pub struct ContentBody {
    pipeline: Arc<Pipeline>,
    pieces: mpsc::UnboundedReceiver<Place>,
    /// The piece that comes next, while it is read.
    next: Option<Place>,
    /// A piece that has to wait for the limit of its client, and until when.
    held: Option<(Ready, Pin<Box<Sleep>>)>,
    /// What came of waiting for the first piece.
    first: Option<Option<Ready>>,
    transfer: Transfer,
    /// Why the connection will be cut, once what was sent before has left.
    failure: Option<(StreamError, Pin<Box<Sleep>>)>,
    /// What is still to come, in bytes of content.
    left_bytes: u64,
    /// The exact length of the body that is still to come, where it is known.
    exact: bool,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing was asked of it yet: nothing is read.
    New,
    Running,
    Ended,
}

impl ContentBody {
    /// A body. Nothing is read before it is first polled.
    pub fn new(request: ContentRequest, options: StreamOptions, transfer: Transfer) -> Self {
        let ContentRequest { device, ranges, from, until, encoding } = request;
        let planner = Planner::new(ranges, from, until, encoding.is_framed());
        let left_bytes = planner.left_bytes();
        let (pipeline, pieces) = Pipeline::new(device, planner, encoding, options);
        let exact = encoding == Encoding::Plain;
        let mut body = Self {
            pipeline,
            pieces,
            next: None,
            held: None,
            first: None,
            transfer,
            failure: None,
            left_bytes,
            exact,
            state: State::New,
        };
        if exact && left_bytes == 0 {
            body.state = State::Ended;
            body.transfer.complete();
        }
        body
    }

    /// The same body once its first piece was read: a disk that cannot be read at all is then known before the
    /// head of the answer is sent.
    ///
    /// # Errors
    /// What happened to the first piece.
    pub async fn with_first_piece(mut self) -> Result<Self, StreamError> {
        if self.state == State::New {
            self.state = State::Running;
            self.pipeline.start(self.transfer.threads());
            match std::future::poll_fn(|context| self.poll_piece(context)).await {
                Ok(piece) => self.first = Some(piece),
                Err(error) => return Err(self.fail(error)),
            }
        }
        Ok(self)
    }

    /// Bytes of content that are still to come; for plain content the length of the body.
    pub const fn left_bytes(&self) -> u64 {
        self.left_bytes
    }

    /// The next piece, as soon as it was read and its client may have it.
    fn poll_piece(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Option<Ready>, StreamError>> {
        if self.transfer.poll_cancelled(context).is_ready() {
            return Poll::Ready(Err(StreamError::Cancelled));
        }
        if let Some(piece) = self.first.take() {
            return Poll::Ready(Ok(piece));
        }
        if let Some((_, sleep)) = &mut self.held {
            ready!(sleep.as_mut().poll(context));
            return Poll::Ready(Ok(self.held.take().map(|(piece, _)| piece)));
        }
        let place = match &mut self.next {
            Some(place) => place,
            none => match ready!(self.pieces.poll_recv(context)) {
                Some(place) => none.insert(place),
                None => return Poll::Ready(Ok(None)),
            },
        };
        let outcome = ready!(Pin::new(place).poll(context));
        self.next = None;
        let piece = outcome.unwrap_or(Err(StreamError::ReaderLost))?;
        let sent_bytes = piece.bytes.as_ref().len() as u64;
        match self.transfer.wait_for_share(sent_bytes) {
            None => Poll::Ready(Ok(Some(piece))),
            Some(until) => {
                let sleep = Box::pin(tokio::time::sleep_until(until));
                self.held = Some((piece, sleep));
                self.poll_piece(context)
            }
        }
    }

    /// Accounts for a piece that goes to the connection.
    fn hand_over(&mut self, piece: Ready) -> Result<Bytes, StreamError> {
        let Ready { bytes, content_bytes, last } = piece;
        let bytes = Bytes::from_owner(bytes);
        let Some(left_bytes) = self.left_bytes.checked_sub(content_bytes) else {
            let (sent_bytes, expected_bytes) = (content_bytes, self.left_bytes);
            return Err(StreamError::WrongLength { sent_bytes, expected_bytes });
        };
        if self.exact && content_bytes != bytes.len() as u64 {
            let sent_bytes = bytes.len() as u64;
            return Err(StreamError::WrongLength { sent_bytes, expected_bytes: content_bytes });
        }
        self.left_bytes = left_bytes;
        self.transfer.moved(content_bytes, bytes.len() as u64);
        if last {
            self.end()?;
        }
        Ok(bytes)
    }

    /// Everything was handed over.
    fn end(&mut self) -> Result<(), StreamError> {
        self.state = State::Ended;
        self.pipeline.close();
        match self.left_bytes {
            0 => {
                self.transfer.complete();
                Ok(())
            }
            left => Err(StreamError::WrongLength { sent_bytes: 0, expected_bytes: left }),
        }
    }

    fn fail(&mut self, error: StreamError) -> StreamError {
        self.state = State::Running;
        self.pipeline.close();
        self.transfer.fail(&error.to_string());
        error
    }
}

impl Body for ContentBody {
    type Data = Bytes;
    type Error = StreamError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamError>>> {
        if self.state == State::Ended {
            return Poll::Ready(None);
        }
        if self.state == State::New {
            self.state = State::Running;
            self.pipeline.start(self.transfer.threads());
        }
        if self.failure.is_none() {
            let outcome = match ready!(self.poll_piece(context)) {
                Ok(Some(piece)) => self.hand_over(piece),
                Ok(None) => match self.end() {
                    Ok(()) => return Poll::Ready(None),
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            };
            match outcome {
                Ok(bytes) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                Err(error) => {
                    let sleep = Box::pin(tokio::time::sleep(FLUSH_TIME));
                    self.failure = Some((self.fail(error), sleep));
                }
            }
        }
        if let Some((_, sleep)) = &mut self.failure {
            ready!(sleep.as_mut().poll(context));
        }
        self.state = State::Ended;
        Poll::Ready(self.failure.take().map(|(error, _)| Err(error)))
    }

    fn is_end_stream(&self) -> bool {
        self.state == State::Ended
    }

    fn size_hint(&self) -> SizeHint {
        match self.exact {
            true => SizeHint::with_exact(self.left_bytes),
            false => SizeHint::default(),
        }
    }
}

impl Drop for ContentBody {
    fn drop(&mut self) {
        self.pipeline.close();
    }
}
