//! The bodies of requests: read with a limit to everything, and to the memory of all of them together.

use super::ranges_json::{JsonRangesError, RangesParser};
use crate::limits::Limits;
use bytes::Bytes;
use http_body::Body;
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use vmtide_block::ByteRange;

/// The ranges that are accounted for at a time: 1 MiB of them. Lists far shorter are not worth the account.
const UNIT_RANGES: usize = (1 << 20) / size_of::<ByteRange>();

/// Lists up to this length are not accounted for: 64 KiB.
const FREE_RANGES: usize = UNIT_RANGES / 16;

/// Why the body of a request is not taken.
#[derive(Debug, Error)]
pub enum ReceiveError {
    /// It is larger than such a body may be.
    #[error("the body of the request is larger than {most} bytes")]
    TooLarge {
        /// The limit.
        most: u64,
    },
    /// More ranges than one request may have.
    #[error("more than {most} ranges: ask for them in several requests")]
    TooManyRanges {
        /// The limit.
        most: usize,
    },
    /// Its next part, or its end, did not come in time.
    #[error("the body of the request did not arrive in time")]
    Timeout,
    /// The connection was lost in the middle of it.
    #[error("the body of the request was cut off")]
    Cut,
    /// It is no JSON.
    #[error("{0}")]
    Malformed(String),
    /// It is JSON, and not what was asked for.
    #[error("{0}")]
    WrongData(String),
    /// All memory for lists of ranges is in use.
    #[error("the agent has no memory for more lists of ranges now: ask again later")]
    Busy,
}

impl From<JsonRangesError> for ReceiveError {
    fn from(error: JsonRangesError) -> Self {
        match error {
            JsonRangesError::TooMany { most } => Self::TooManyRanges { most },
            JsonRangesError::Syntax { .. } => Self::Malformed(error.to_string()),
            JsonRangesError::Data { .. } => Self::WrongData(error.to_string()),
        }
    }
}

/// The memory of all lists of ranges of an agent.
#[derive(Clone, Debug)]
pub struct RangeMemory(Arc<Semaphore>);

impl RangeMemory {
    /// An account of so many bytes.
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes >> 20)))
    }

    /// Makes `held` enough for `count` ranges.
    fn hold(&self, count: usize, held: &mut HeldMemory) -> Result<(), ReceiveError> {
        if count <= FREE_RANGES {
            return Ok(());
        }
        while held.units * UNIT_RANGES < count {
            let permit = Arc::clone(&self.0).try_acquire_owned().map_err(|_| ReceiveError::Busy)?;
            held.units += 1;
            match &mut held.permit {
                Some(all) => all.merge(permit),
                none => *none = Some(permit),
            }
        }
        Ok(())
    }
}

/// A part of the memory for lists of ranges; given back when it is dropped.
#[derive(Debug, Default)]
pub struct HeldMemory {
    permit: Option<OwnedSemaphorePermit>,
    units: usize,
}

/// The next part of a body, none at its end.
async fn next_part<B>(
    body: &mut B,
    part_timeout: Duration,
    deadline: Instant,
) -> Result<Option<Bytes>, ReceiveError>
where
    B: Body<Data = Bytes> + Unpin,
{
    let deadline = deadline.min(Instant::now() + part_timeout);
    loop {
        let frame = tokio::time::timeout_at(deadline, body.frame()).await;
        return match frame.map_err(|_| ReceiveError::Timeout)? {
            None => Ok(None),
            Some(Err(_)) => Err(ReceiveError::Cut),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(bytes) => Ok(Some(bytes)),
                // Trailers mean nothing here.
                Err(_) => continue,
            },
        };
    }
}

/// Calls `take` with every part of a body of at most `most` bytes.
async fn for_each_part<B>(
    mut body: B,
    most: u64,
    limits: &Limits,
    mut take: impl FnMut(&[u8]) -> Result<(), ReceiveError>,
) -> Result<(), ReceiveError>
where
    B: Body<Data = Bytes> + Unpin,
{
    // A body that says how long it is, is refused before any of it is read.
    if body.size_hint().lower() > most {
        return Err(ReceiveError::TooLarge { most });
    }
    let deadline = Instant::now() + limits.json_body_timeout;
    let mut received = 0u64;
    while let Some(part) = next_part(&mut body, limits.body_part_timeout, deadline).await? {
        received = received.saturating_add(part.len() as u64);
        if received > most {
            return Err(ReceiveError::TooLarge { most });
        }
        take(&part)?;
    }
    Ok(())
}

/// Reads a list of ranges in JSON.
///
/// # Errors
/// [`ReceiveError`].
pub async fn receive_ranges<B>(
    body: B,
    limits: &Limits,
    memory: &RangeMemory,
) -> Result<(Vec<ByteRange>, HeldMemory), ReceiveError>
where
    B: Body<Data = Bytes> + Unpin,
{
    let mut parser = RangesParser::new(limits.ranges_per_request);
    let mut held = HeldMemory::default();
    for_each_part(body, limits.range_body_bytes, limits, |part| {
        parser.feed(part)?;
        memory.hold(parser.count(), &mut held)
    })
    .await?;
    Ok((parser.finish()?, held))
}

/// Reads a body of at most `most` bytes.
///
/// # Errors
/// [`ReceiveError`].
pub async fn receive_bytes<B>(body: B, most: u64, limits: &Limits) -> Result<Vec<u8>, ReceiveError>
where
    B: Body<Data = Bytes> + Unpin,
{
    let mut bytes = Vec::new();
    for_each_part(body, most, limits, |part| {
        bytes.extend_from_slice(part);
        Ok(())
    })
    .await?;
    Ok(bytes)
}

/// Reads a small body of JSON.
///
/// # Errors
/// [`ReceiveError`].
pub async fn receive_json<B, T>(body: B, limits: &Limits) -> Result<T, ReceiveError>
where
    B: Body<Data = Bytes> + Unpin,
    T: DeserializeOwned,
{
    receive_json_of(body, limits.json_body_bytes, limits).await
}

/// Reads a body of JSON of at most `most` bytes.
///
/// # Errors
/// [`ReceiveError`].
pub async fn receive_json_of<B, T>(body: B, most: u64, limits: &Limits) -> Result<T, ReceiveError>
where
    B: Body<Data = Bytes> + Unpin,
    T: DeserializeOwned,
{
    let text = receive_bytes(body, most, limits).await?;
    serde_json::from_slice(&text).map_err(|error| match error.is_data() {
        true => ReceiveError::WrongData(error.to_string()),
        false => ReceiveError::Malformed(error.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::Full;

    fn body(text: &str) -> Full<Bytes> {
        Full::new(Bytes::copy_from_slice(text.as_bytes()))
    }

    /// A body that begins and then does not go on, and has no length.
    struct Stalled(Option<Bytes>);

    impl Body for Stalled {
        type Data = Bytes;
        type Error = std::io::Error;
        fn poll_frame(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
            match self.0.take() {
                Some(bytes) => std::task::Poll::Ready(Some(Ok(http_body::Frame::data(bytes)))),
                None => std::task::Poll::Pending,
            }
        }
    }

    #[tokio::test]
    async fn bodies_are_limited_in_size_ranges_and_time() {
        let limits = Limits {
            range_body_bytes: 100,
            ranges_per_request: 2,
            body_part_timeout: Duration::from_millis(20),
            ..Limits::default()
        };
        let memory = RangeMemory::new(1 << 20);
        let one = r#"{"offset":1,"length":2}"#;
        let good = receive_ranges(body(&format!("[{one},{one}]")), &limits, &memory).await;
        assert_eq!(good.unwrap().0.len(), 2);
        let many = receive_ranges(body(&format!("[{one},{one},{one}]")), &limits, &memory).await;
        assert!(matches!(many, Err(ReceiveError::TooManyRanges { most: 2 })));
        let large = receive_ranges(body(&" ".repeat(101)), &limits, &memory).await;
        assert!(matches!(large, Err(ReceiveError::TooLarge { most: 100 })));
        let bad = receive_ranges(body("[1]"), &limits, &memory).await;
        assert!(matches!(bad, Err(ReceiveError::WrongData(_))));
        let stalled = Stalled(Some(Bytes::from_static(b"[")));
        let late = receive_ranges(stalled, &limits, &memory).await;
        assert!(matches!(late, Err(ReceiveError::Timeout)));
    }

    #[test]
    fn memory_for_lists_is_counted_and_given_back() {
        let memory = RangeMemory::new(2 << 20);
        let mut first = HeldMemory::default();
        memory.hold(FREE_RANGES, &mut first).unwrap();
        assert_eq!(first.units, 0);
        memory.hold(UNIT_RANGES + 1, &mut first).unwrap();
        assert_eq!(first.units, 2);
        let mut second = HeldMemory::default();
        assert!(memory.hold(UNIT_RANGES, &mut second).is_err());
        drop(first);
        assert!(memory.hold(UNIT_RANGES, &mut second).is_ok());
    }
}
