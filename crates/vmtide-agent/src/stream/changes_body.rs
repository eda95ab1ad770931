//! Changed ranges as a JSON text, sent as it is made.

use super::changes::ChangePager;
use super::error::StreamError;
use crate::places::Place;
use crate::provider::{ProviderError, Result};
use axum::body::Body;
use bytes::Bytes;
use http_body::Frame;
use std::io::Write;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// The text is sent in pieces of about this size; shorter answers have a length in their head.
const PIECE_BYTES: usize = 64 << 10;

/// How many pieces may wait for the client.
const QUEUED_PIECES: usize = 4;

/// The form of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangesFormat {
    /// `[{"offset":…,"length":…},…]`, to the end.
    List,
    /// `{"ranges":[…],"next_cursor":…,"disk_size_bytes":…}`, with at most `limit` ranges.
    Page {
        /// The most ranges.
        limit: usize,
    },
}

enum Message {
    Piece(Bytes),
    Last(Bytes),
    Failed(ProviderError),
}

/// The text as a body. Errors of the provider before the first piece is full are returned; later ones cut the
/// connection. Inside of a tokio runtime; the provider is asked on a thread that may block. That thread waits for
/// the client, and so `place` is given back only once both the thread and the body have ended.
///
/// # Errors
/// Those of [`ChangePager::next_range`].
pub async fn changes_body(pager: ChangePager, format: ChangesFormat, place: Place) -> Result<Body> {
    let (sender, mut receiver) = mpsc::channel(QUEUED_PIECES);
    let place = Arc::new(place);
    let of_thread = Arc::clone(&place);
    drop(tokio::task::spawn_blocking(move || {
        let _counted = of_thread.thread();
        let mut text = Text { text: Vec::with_capacity(PIECE_BYTES + 128), sender };
        match text.write(pager, format) {
            Ok(()) => text.last(),
            Err(error) => drop(text.sender.blocking_send(Message::Failed(error))),
        }
    }));
    match receiver.recv().await {
        Some(Message::Last(text)) => Ok(Body::from(text)),
        Some(Message::Piece(first)) => {
            Ok(Body::new(ChangesBody { first: Some(first), receiver, ended: false, _place: place }))
        }
        Some(Message::Failed(error)) => Err(error),
        None => Err(ProviderError::Failed {
            path: "the request".into(),
            reason: "failed inside the agent; its log says more".into(),
        }),
    }
}

struct Text {
    text: Vec<u8>,
    sender: mpsc::Sender<Message>,
}

impl Text {
    fn write(&mut self, mut pager: ChangePager, format: ChangesFormat) -> Result<()> {
        let (limit, opening) = match format {
            ChangesFormat::List => (usize::MAX, "["),
            ChangesFormat::Page { limit } => (limit, "{\"ranges\":["),
        };
        self.put(format_args!("{opening}"));
        let mut count = 0usize;
        let mut next_cursor = None;
        while let Some(range) = pager.next_range()? {
            if count >= limit {
                next_cursor = Some(range.offset);
                break;
            }
            let comma = if count == 0 { "" } else { "," };
            let (offset, length) = (range.offset, range.length);
            self.put(format_args!("{comma}{{\"offset\":{offset},\"length\":{length}}}"));
            count += 1;
            if self.text.len() >= PIECE_BYTES && !self.send() {
                return Ok(());
            }
        }
        match (format, next_cursor) {
            (ChangesFormat::List, _) => self.put(format_args!("]")),
            (ChangesFormat::Page { .. }, Some(cursor)) => {
                self.put(format_args!("],\"next_cursor\":{cursor}"));
            }
            (ChangesFormat::Page { .. }, None) => self.put(format_args!("],\"next_cursor\":null")),
        }
        if format != ChangesFormat::List {
            self.put(format_args!(",\"disk_size_bytes\":{}}}", pager.size_bytes()));
        }
        Ok(())
    }

    fn put(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing into memory does not fail.
        let _ = self.text.write_fmt(text);
    }

    /// Sends what there is; false where the client has gone.
    fn send(&mut self) -> bool {
        let text = std::mem::replace(&mut self.text, Vec::with_capacity(PIECE_BYTES + 128));
        self.sender.blocking_send(Message::Piece(text.into())).is_ok()
    }

    fn last(self) {
        // A client that has gone needs no end.
        drop(self.sender.blocking_send(Message::Last(self.text.into())));
    }
}

struct ChangesBody {
    first: Option<Bytes>,
    receiver: mpsc::Receiver<Message>,
    ended: bool,
    _place: Arc<Place>,
}

impl http_body::Body for ChangesBody {
    type Data = Bytes;
    type Error = StreamError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, StreamError>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let message = std::task::ready!(self.receiver.poll_recv(context));
        self.ended = !matches!(message, Some(Message::Piece(_)));
        Poll::Ready(Some(match message {
            Some(Message::Piece(text) | Message::Last(text)) => Ok(Frame::data(text)),
            Some(Message::Failed(error)) => {
                tracing::warn!(%error, "an answer with changed ranges was cut off");
                Err(StreamError::Changes(error.to_string()))
            }
            None => Err(StreamError::ReaderLost),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Limits;
    use crate::places::Places;
    use crate::provider::ChangePage;
    use http_body_util::BodyExt;
    use vmtide_block::ByteRange;

    /// A pager over a disk of which every second KiB has changed.
    fn pager(ranges: u64) -> ChangePager {
        let size = ranges * 2048;
        let ask = |asked: ByteRange| {
            let ranges = asked.offset / 2048..asked.end() / 2048;
            let ranges = ranges.map(|at| ByteRange::new(at * 2048, 1024)).collect();
            Ok(ChangePage { ranges, processed_bytes: asked.length })
        };
        ChangePager::new("disk".into(), size, 0, Box::new(ask))
    }

    #[tokio::test]
    async fn a_list_keeps_its_place_until_it_was_taken_or_given_up() {
        let places = Places::new(&Limits::default());
        let client: Arc<str> = "a".into();
        for read in [true, false] {
            let place = places.take(&client).unwrap();
            let body = changes_body(pager(100_000), ChangesFormat::List, place).await.unwrap();
            assert_eq!(places.taken(), 1);
            match read {
                true => assert!(body.collect().await.unwrap().to_bytes().len() > 3_000_000),
                false => drop(body),
            }
            // The thread ends a little later.
            while places.taken() > 0 {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        }
    }
}
