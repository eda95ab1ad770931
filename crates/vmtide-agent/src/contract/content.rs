//! The bytes of a disk.

use super::errors::ContractError;
use super::paths::query_value;
use crate::auth::Caller;
use crate::state::Shared;
use crate::stream::{ContentBody, ContentRequest, Encoding, HeldMemory, RangeList, receive_ranges};
use crate::transfers::{Transfer, TransferKind};
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use std::fmt::Display;
use std::time::{Duration, Instant};
use vmtide_block::ByteRange;

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

/// How long a request waits for others to end. Clients of rct-service know no answer that tells them to come again.
const PLACE_TIMEOUT: Duration = Duration::from_secs(120);
/// How often it is looked for a place.
const PLACE_INTERVAL: Duration = Duration::from_millis(10);

/// Takes a place among the transfers of a client, as soon as there is one: before its list is read, so that what
/// lists take is bounded.
pub async fn begin(state: &Shared, caller: &Caller, disk: &str) -> Result<Transfer, ContractError> {
    when_free(|| state.work.transfers.begin(&caller.name, TransferKind::Read, disk)).await
}

/// What `take` gives, as soon as it gives anything.
pub async fn when_free<T, E: Display>(
    mut take: impl FnMut() -> Result<T, E>,
) -> Result<T, ContractError> {
    let deadline = Instant::now() + PLACE_TIMEOUT;
    loop {
        match take() {
            Ok(taken) => return Ok(taken),
            Err(refused) if Instant::now() >= deadline => {
                return Err(ContractError::TooMany(refused.to_string()));
            }
            Err(_) => tokio::time::sleep(PLACE_INTERVAL).await,
        }
    }
}

/// The ranges of the body of a POST, and what holds their memory.
pub async fn ranges_of_body(
    state: &Shared,
    body: Body,
) -> Result<(Vec<ByteRange>, HeldMemory), ContractError> {
    let received = receive_ranges(body, &state.limits, &state.work.range_memory);
    received.await.map_err(ContractError::of_body)
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

/// The bytes of `ranges`, one after the other; without them where only the head is asked for.
pub async fn answer(
    state: &Shared,
    disk: &str,
    (ranges, memory): (Vec<ByteRange>, HeldMemory),
    transfer: Transfer,
    is_head: bool,
) -> Result<Response, ContractError> {
    let device = state.with_disk(disk, |state, path| state.open(path)).await;
    let device = device.map_err(|error| ContractError::of_disk(disk, error))?;
    let ranges = RangeList::new(ranges, device.size_bytes())
        .map_err(|error| ContractError::OutOfRange(error.to_string()))?
        .with_memory(memory);
    let total = ranges.total_bytes();
    transfer.set_total_bytes(total);
    let headers = [
        (CONTENT_TYPE, "application/octet-stream".to_owned()),
        (CONTENT_LENGTH, total.to_string()),
    ];
    if is_head {
        transfer.complete();
        return Ok((headers, Body::empty()).into_response());
    }
    let content =
        ContentRequest { device, ranges, from: 0, until: total, encoding: Encoding::Plain };
    let body = ContentBody::new(content, state.limits.stream, transfer).with_first_piece().await;
    let body = body.map_err(|error| ContractError::Internal(error.to_string()))?;
    Ok((headers, Body::new(body)).into_response())
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
