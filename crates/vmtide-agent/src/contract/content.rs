//! The bytes of a disk.

use super::errors::ContractError;
use super::paths::query_value;
use crate::auth::Caller;
use crate::state::Shared;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::HeaderMap;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt, Limited};
use serde::Deserialize;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::mpsc;
use vmtide_block::{BlockDevice, BlockError, ByteRange};

/// The most bytes of a list of ranges.
const MAX_BODY_BYTES: usize = 64 << 20;
/// How long a list of ranges may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// What is read at once.
const PIECE_BYTES: u64 = 256 << 10;
/// How much is read ahead.
const PIECES: usize = 6;

/// The ranges of `?ranges=OFFSET:LENGTH,…`.
pub fn ranges_of_query(query: &str) -> Result<Vec<ByteRange>, ContractError> {
    let text = query_value(query, "ranges")
        .ok_or(ContractError::Parameter("ranges=OFFSET:LENGTH,… is needed, or a POST with them"))?;
    text.split(',')
        .map(|range| {
            let (offset, length) = range.split_once(':')?;
            Some(ByteRange::new(number(offset)?, number(length)?))
        })
        .collect::<Option<_>>()
        .ok_or_else(|| ContractError::Malformed("ranges: OFFSET:LENGTH,… in decimal".into()))
}

/// A number without a sign.
fn number(text: &str) -> Option<u64> {
    if text.bytes().all(|digit| digit.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// The ranges of the body of a POST.
pub async fn ranges_of_body(_state: &Shared, body: Body) -> Result<Vec<ByteRange>, ContractError> {
    let body = Limited::new(body, MAX_BODY_BYTES).collect();
    let body =
        tokio::time::timeout(BODY_TIMEOUT, body).await.map_err(|_| ContractError::TooSlow)?;
    let body = body.map_err(|error| ContractError::TooLarge(error.to_string()))?.to_bytes();
    let ranges: Vec<Range> = serde_json::from_slice(&body).map_err(|error| {
        let text = format!("the ranges: {error}");
        if error.is_data() {
            ContractError::WrongData(text)
        } else {
            ContractError::Malformed(text)
        }
    })?;
    Ok(ranges.into_iter().map(|range| ByteRange::new(range.offset, range.length)).collect())
}

/// A range as clients send it; other members say nothing, as in rct-service.
#[derive(Deserialize)]
struct Range {
    offset: u64,
    length: u64,
}

/// rct-service has no route for a body of another type.
pub fn check_type(headers: &HeaderMap) -> Result<(), ContractError> {
    let is_json = headers.get(CONTENT_TYPE).is_some_and(|value| {
        let name = value.as_bytes().split(|byte| *byte == b';').next().unwrap_or_default();
        name.trim_ascii().eq_ignore_ascii_case(b"application/json")
    });
    if is_json {
        return Ok(());
    }
    Err(ContractError::Parameter("the ranges are sent as Content-Type: application/json"))
}

/// The bytes of `ranges`, one after the other.
pub async fn answer(
    state: &Shared,
    _caller: &Caller,
    disk: &str,
    ranges: Vec<ByteRange>,
) -> Result<Response, ContractError> {
    let device = state.with_disk(disk, |state, path| state.open(path)).await;
    let device = device.map_err(|error| ContractError::of_disk(disk, error))?;
    let mut total = 0u64;
    for range in &ranges {
        device.check_range(*range).map_err(|error| ContractError::OutOfRange(error.to_string()))?;
        total = total
            .checked_add(range.length)
            .ok_or_else(|| ContractError::Malformed("the ranges have too many bytes".into()))?;
    }
    let (sender, pieces) = mpsc::channel(PIECES);
    drop(tokio::task::spawn_blocking(move || read(&device, &ranges, &sender)));
    let headers = [
        (CONTENT_TYPE, "application/octet-stream".to_owned()),
        (CONTENT_LENGTH, total.to_string()),
    ];
    Ok((headers, Body::new(Content { pieces, left_bytes: total })).into_response())
}

fn read(
    device: &Arc<dyn BlockDevice>,
    ranges: &[ByteRange],
    pieces: &mpsc::Sender<Result<Bytes, BlockError>>,
) {
    for range in ranges {
        let mut at = range.offset;
        while at < range.end() {
            let length = PIECE_BYTES.min(range.end() - at);
            let mut piece = vec![0; usize::try_from(length).unwrap_or(0)];
            let read = device.read_at(&mut piece, at).map(|()| Bytes::from(piece));
            let failed = read.is_err();
            // A client that went away wants no more.
            if pieces.blocking_send(read).is_err() || failed {
                return;
            }
            at += length;
        }
    }
}

/// The body of an answer. One that ends early is an error, which cuts the connection.
struct Content {
    pieces: mpsc::Receiver<Result<Bytes, BlockError>>,
    left_bytes: u64,
}

impl http_body::Body for Content {
    type Data = Bytes;
    type Error = BlockError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BlockError>>> {
        match ready!(self.pieces.poll_recv(context)) {
            Some(Ok(piece)) => {
                self.left_bytes = self.left_bytes.saturating_sub(piece.len() as u64);
                Poll::Ready(Some(Ok(Frame::data(piece))))
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "reading a disk failed while it was sent");
                Poll::Ready(Some(Err(error)))
            }
            None if self.left_bytes > 0 => Poll::Ready(Some(Err(BlockError::Cancelled))),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.left_bytes == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_queries_are_read_strictly() {
        let read = |query| ranges_of_query(query).ok();
        assert_eq!(
            read("ranges=0:512,1024:0"),
            Some(vec![ByteRange::new(0, 512), ByteRange::new(1024, 0)])
        );
        for bad in [
            "",
            "ranges",
            "ranges=",
            "ranges=0",
            "ranges=0:",
            "ranges=:1",
            "ranges=0:1,",
            "ranges=+1:2",
            "ranges=-1:2",
            "ranges=0:1:2",
            "ranges=0x1:2",
            "ranges=18446744073709551616:1",
            "range=0:1",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
