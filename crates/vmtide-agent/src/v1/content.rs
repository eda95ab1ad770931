//! Content of disks: sent as one stream, and taken for writing.

use super::error::{ApiError, Result};
use super::form::{Form, Window};
use super::request::{Asked, Parameters, json};
use crate::provider::ProviderError;
use crate::state::Shared;
use crate::stream::{
    ContentBody, ContentRequest, Encoding, HeldMemory, RangeList, WriteKind, frame,
    parse_range_list, receive_ranges, write_body,
};
use crate::transfers::{Transfer, TransferKind};
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::header::{
    ACCEPT_RANGES, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use std::sync::Arc;
use vmtide_block::{BlockDevice, ByteRange};

/// Names the transfer, for `/v1/jobs`.
const JOB_HEADER: HeaderName = HeaderName::from_static("vmtide-job");

/// How many bytes of content an answer speaks for, whatever its form.
const CONTENT_BYTES_HEADER: HeaderName = HeaderName::from_static("vmtide-content-bytes");

/// The parameters of reading.
pub(super) const READ_PARAMETERS: &[&str] = &["path", "ranges", "from", "format", "compress"];

/// A part of a request that is needed to answer with content.
pub(super) struct ReadRequest {
    is_head: bool,
    headers: HeaderMap,
    /// None for all of the disk.
    ranges: Option<Vec<ByteRange>>,
    memory: HeldMemory,
    transfer: Transfer,
}

/// `GET` and `POST /v1/disks/content?path=`
pub(super) async fn read(
    State(state): State<Shared>,
    asked: Asked,
    request: Request,
) -> Result<Response> {
    asked.parameters.only(READ_PARAMETERS)?;
    let path = asked.path()?;
    let read = read_request(&state, &asked, &path, request).await?;
    let device = state.with_disk(&path, |state, path| state.open(path)).await?;
    answer(&state, &asked.parameters, read, device).await
}

/// Takes a place for a transfer and then reads what is asked for, so that a client that asks for too much at once
/// is told before it has sent its list.
pub(super) async fn read_request(
    state: &Shared,
    asked: &Asked,
    disk: &str,
    request: Request,
) -> Result<ReadRequest> {
    let transfer = state.work.transfers.begin(&asked.caller.name, TransferKind::Read, disk)?;
    let (parts, body) = request.into_parts();
    let most = state.limits.ranges_per_request;
    let mut memory = HeldMemory::default();
    let ranges = match asked.parameters.get("ranges")? {
        Some(_) if parts.method == Method::POST => {
            return Err(ApiError::bad_request("give the ranges in the query or in the body"));
        }
        Some(text) => Some(parse_range_list(text, most)?),
        None if parts.method == Method::POST => {
            check_json(&parts.headers)?;
            let (ranges, held) =
                receive_ranges(body, &state.limits, &state.work.range_memory).await?;
            memory = held;
            Some(ranges)
        }
        None => None,
    };
    let is_head = parts.method == Method::HEAD;
    Ok(ReadRequest { is_head, headers: parts.headers, ranges, memory, transfer })
}

/// The answer with content of `device`.
pub(super) async fn answer(
    state: &Shared,
    parameters: &Parameters,
    read: ReadRequest,
    device: Arc<dyn BlockDevice>,
) -> Result<Response> {
    let ReadRequest { is_head, headers, ranges, memory, transfer } = read;
    let form = Form::choose(parameters, &headers)?;
    let size_bytes = device.size_bytes();
    let ranges = match ranges {
        Some(ranges) => RangeList::new(ranges, size_bytes)?.with_memory(memory),
        None => RangeList::whole(size_bytes),
    };
    let from = parameters.number("from")?.unwrap_or(0);
    let window = Window::choose(from, ranges.total_bytes(), form, &headers)?;
    transfer.set_total_bytes(window.until - window.from);
    let mut answer = head(form, &window, transfer.id());
    if is_head {
        transfer.complete();
        return Ok(answer);
    }
    let content = ContentRequest {
        device,
        ranges,
        from: window.from,
        until: window.until,
        encoding: form.encoding(),
    };
    let body = ContentBody::new(content, state.limits.stream, transfer);
    *answer.body_mut() = Body::new(body.with_first_piece().await?);
    Ok(answer)
}

/// The answer without its body.
fn head(form: Form, window: &Window, job: &str) -> Response {
    let mut answer = Body::empty().into_response();
    let bytes = window.until - window.from;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(form.content_type()));
    headers.insert(CONTENT_BYTES_HEADER, HeaderValue::from(bytes));
    headers.insert(VARY, HeaderValue::from_static("accept, accept-encoding"));
    if let Ok(job) = HeaderValue::from_str(job) {
        headers.insert(JOB_HEADER, job);
    }
    match form.encoding() {
        Encoding::Plain => {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes));
            headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        }
        Encoding::Zstd => {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("zstd"));
        }
        Encoding::Ranges { .. } => {}
    }
    if let Some(range) = &window.content_range
        && let Ok(range) = HeaderValue::from_str(range)
    {
        headers.insert(CONTENT_RANGE, range);
        *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    answer
}

/// `PUT /v1/disks/content?path=`
pub(super) async fn write(
    State(state): State<Shared>,
    asked: Asked,
    headers: HeaderMap,
    body: Body,
) -> Result<Response> {
    asked.parameters.only(&["path", "offset"])?;
    asked.may_write()?;
    let path = asked.path()?;
    let kind = write_kind(&headers, &asked.parameters)?;
    let mut transfer =
        state.work.transfers.begin(&asked.caller.name, TransferKind::Write, &path)?;
    let requested = path.clone();
    let opened = state.with_disk(&path, move |state, path| {
        let claim = state.work.claim(path).ok_or_else(|| ProviderError::InUse {
            path: requested,
            reason: "another client of the agent writes it".into(),
        })?;
        Ok((claim, state.open_writable(path)?))
    });
    let (claim, device) = opened.await?;
    let written = write_body(body, device, kind, &state.limits, claim, &mut transfer).await;
    match &written {
        Ok(summary) => {
            transfer.set_total_bytes(summary.position);
            transfer.complete();
        }
        Err(error) => transfer.fail(&error.to_string()),
    }
    let mut answer = json(&written?)?;
    if let Ok(job) = HeaderValue::from_str(transfer.id()) {
        answer.headers_mut().insert(JOB_HEADER, job);
    }
    Ok(answer)
}

/// How the body of a `PUT` is meant.
fn write_kind(headers: &HeaderMap, parameters: &Parameters) -> Result<WriteKind> {
    let offset = parameters.number("offset")?;
    match (media_type(headers).as_str(), offset) {
        (frame::CONTENT_TYPE, None) => Ok(WriteKind::Ranges),
        (frame::CONTENT_TYPE, Some(_)) => {
            Err(ApiError::bad_request("frames say themselves where they belong: without offset"))
        }
        ("application/octet-stream", Some(offset)) => Ok(WriteKind::Raw { offset }),
        ("application/octet-stream", None) => {
            Err(ApiError::bad_request("the parameter offset is missing"))
        }
        _ => Err(ApiError::new(
            "unsupported_media_type",
            "content is written as application/octet-stream or application/vnd.vmtide.ranges",
        )),
    }
}

fn check_json(headers: &HeaderMap) -> Result<()> {
    match media_type(headers).as_str() {
        "application/json" => Ok(()),
        _ => Err(ApiError::new(
            "unsupported_media_type",
            "the ranges are sent as Content-Type: application/json",
        )),
    }
}

/// The media type of a body, without its parameters.
fn media_type(headers: &HeaderMap) -> String {
    let value = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}
