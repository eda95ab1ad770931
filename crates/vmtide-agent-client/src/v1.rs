//! `/v1`: what vmtide's own agent has beside the contract. `docs/agent-protocol.md` describes it.

use crate::changes::{Changes, Doubt, Gathering, RangeList, doubt_of};
use crate::contract::json;
use crate::frames::{Frame, FrameError, FrameReader, MEDIA_TYPE};
use crate::transport::{Request, Transport};
use crate::tries::{Failure, Verdict};
use crate::url::segment;
use crate::{AgentError, Result};
use http::{HeaderValue, Method};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use vmtide_block::{ByteRange, CancelToken};

/// The most of one page of changes, in bytes: a million ranges of the longest numbers.
const MAX_PAGE_BYTES: usize = 80 << 20;

/// What a disk is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDetails {
    /// Size that the guest sees, in bytes.
    pub virtual_size_bytes: u64,
    /// Size of the file, in bytes.
    #[serde(default)]
    pub physical_size_bytes: u64,
    /// Unit of allocation in bytes; 0 for fixed disks.
    #[serde(default)]
    pub block_size_bytes: u32,
    /// Logical sector in bytes.
    #[serde(default)]
    pub logical_sector_bytes: u32,
    /// Physical sector in bytes.
    #[serde(default)]
    pub physical_sector_bytes: u32,
    /// The parent of a differencing disk.
    #[serde(default)]
    pub parent_path: Option<String>,
    /// 0 unknown, 1 ISO, 2 VHD, 3 VHDX, 4 VHD set.
    #[serde(default)]
    pub virtual_storage_type: u32,
    /// 2 fixed, 3 dynamic, 4 differencing.
    #[serde(default)]
    pub provider_sub_type: u32,
    /// `vhdx`, `vhd`, `vmdk`, `qcow2` or `raw`.
    #[serde(default)]
    pub format: String,
    /// The disk's own id, where the format has one.
    #[serde(default)]
    pub disk_id: Option<String>,
}

/// Disks at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Freeze {
    /// Names it.
    pub id: String,
    /// How long it lives when nobody uses it, in seconds.
    pub ttl_seconds: u64,
    /// Its disks, in the order asked for.
    pub disks: Vec<FreezeDisk>,
}

/// One disk of a [`Freeze`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct FreezeDisk {
    /// Its path.
    pub path: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The tracking id of the moment; none where it is not tracked.
    pub tracking_id: Option<String>,
}

#[derive(Deserialize)]
pub(crate) struct ChangesDocument {
    pub ranges: RangeList,
    pub next_cursor: Option<u64>,
    disk_size_bytes: u64,
}

/// Where content or changes are asked of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The disk at a path, as it is at the moment.
    Live(String),
    /// A disk of a freeze, by its number.
    Frozen(String, usize),
    /// A disk of a frozen VM, by its number.
    FrozenVm(String, usize),
}

impl Place {
    fn target(&self, what: &str) -> String {
        match self {
            Self::Live(path) => format!("/v1/disks/{what}?path={}&", segment(path)),
            Self::Frozen(id, number) => {
                format!("/v1/freezes/{}/disks/{number}/{what}?", segment(id))
            }
            Self::FrozenVm(id, number) => {
                format!("/v1/vms/freezes/{}/disks/{number}/{what}?", segment(id))
            }
        }
    }
}

pub(crate) fn to_json(agent: &str, document: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(document).map_err(|error| AgentError::protocol(agent, error.to_string()))
}

/// Whether the agent has `/v1`.
///
/// # Errors
/// Where it cannot be reached or the key is wrong.
pub(crate) fn is_there(transport: &Transport, cancel: &CancelToken) -> Result<bool> {
    match transport.document(&Request::get("/v1"), cancel) {
        Ok(body) => {
            Ok(serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&body).is_ok())
        }
        Err(AgentError::NotFound { .. } | AgentError::Refused { status: 400..=499 | 501, .. }) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

pub(crate) fn details_request(path: &str) -> Request {
    Request::get(format!("/v1/disks?path={}", segment(path)))
}

pub(crate) fn details(
    transport: &Transport,
    path: &str,
    cancel: &CancelToken,
) -> Result<DiskDetails> {
    let request = details_request(path);
    let details: DiskDetails = json(&transport.agent, &transport.document(&request, cancel)?)?;
    check_size(transport, details.virtual_size_bytes)?;
    Ok(details)
}

pub(crate) fn check_size(transport: &Transport, size_bytes: u64) -> Result<()> {
    match i64::try_from(size_bytes) {
        Ok(_) => Ok(()),
        Err(_) => {
            Err(AgentError::protocol(&transport.agent, format!("a disk of {size_bytes} bytes")))
        }
    }
}

fn renewal(id: &str, ttl: Duration) -> Request {
    Request::new(Method::PUT, format!("/v1/freezes/{}", segment(id)))
        .body("application/json", format!("{{\"ttl_seconds\":{}}}", ttl.as_secs()))
}

pub(crate) fn renew(
    transport: &Transport,
    id: &str,
    ttl: Duration,
    cancel: &CancelToken,
) -> Result<()> {
    transport.document(&renewal(id, ttl), cancel).map(drop)
}

pub(crate) fn renew_once(transport: &Transport, id: &str, ttl: Duration) -> Result<()> {
    transport.once(&renewal(id, ttl)).map(drop)
}

/// Ends a freeze, with one try: it ends by itself otherwise, and whoever wants it ended is about to go.
pub(crate) fn end_freeze(transport: &Transport, id: &str) -> Result<()> {
    match transport.once(&Request::new(Method::DELETE, format!("/v1/freezes/{}", segment(id)))) {
        Ok(_) | Err(AgentError::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

pub(crate) fn changes(
    transport: &Transport,
    place: &Place,
    id: &str,
    size_bytes: u64,
    cancel: &CancelToken,
) -> Result<Changes> {
    let base = format!("{}since={}", place.target("changes"), segment(id));
    pages(transport, base, size_bytes, cancel)
}

/// What may differ from the base on a disk of a frozen VM, as it was found out when it was frozen.
pub(crate) fn frozen_vm_changes(
    transport: &Transport,
    place: &Place,
    size_bytes: u64,
    cancel: &CancelToken,
) -> Result<Changes> {
    pages(transport, format!("{}limit=1000000", place.target("changes")), size_bytes, cancel)
}

/// All pages of changes from `base` on, which has a query.
fn pages(
    transport: &Transport,
    base: String,
    size_bytes: u64,
    cancel: &CancelToken,
) -> Result<Changes> {
    let mut gathering = Gathering::new(size_bytes);
    let mut target = base.clone();
    loop {
        let request = Request::get(target).at_most(MAX_PAGE_BYTES);
        let body = match transport.document(&request, cancel) {
            Ok(body) => body,
            Err(error) => return doubt_of(error).map(Err),
        };
        let page: ChangesDocument = match serde_json::from_slice(&body) {
            Ok(page) => page,
            Err(error) => {
                return Ok(Err(Doubt::Broken(format!("no page of changed ranges: {error}"))));
            }
        };
        drop(body);
        if page.disk_size_bytes != size_bytes {
            let told = page.disk_size_bytes;
            return Ok(Err(Doubt::Broken(format!(
                "changes of a disk of {told} bytes, not of {size_bytes}"
            ))));
        }
        if let Err(doubt) = gathering.page(page.ranges.0, page.next_cursor) {
            return Ok(Err(doubt));
        }
        match page.next_cursor {
            Some(next) => target = format!("{base}&cursor={next}"),
            None => return Ok(Ok(gathering.finish())),
        }
    }
}

/// Reads once, from `offset` into `buffer`. Answers with how many bytes came whole and how it ended.
pub(crate) async fn read(
    transport: &Transport,
    place: &Place,
    compress: bool,
    buffer: &mut [u8],
    offset: u64,
) -> (usize, std::result::Result<(), Failure>) {
    let mut done = 0;
    let outcome = read_frames(transport, place, compress, buffer, offset, &mut done).await;
    (done, outcome)
}

async fn read_frames(
    transport: &Transport,
    place: &Place,
    compress: bool,
    buffer: &mut [u8],
    offset: u64,
    done: &mut usize,
) -> std::result::Result<(), Failure> {
    let wanted = ByteRange::new(offset, buffer.len() as u64);
    let compress = if compress { "&compress=zstd" } else { "" };
    let target = format!(
        "{}ranges={}:{}&format=ranges{compress}",
        place.target("content"),
        wanted.offset,
        wanted.length
    );
    let request = Request::get(target).header("accept", HeaderValue::from_static(MEDIA_TYPE));
    let mut response = transport.begin(&request).await?;
    let mut reader = FrameReader::new();
    loop {
        let Some(part) = transport.part(&mut response).await? else {
            return Err(transport.lost(format!("the content of {wanted} was cut")));
        };
        reader.push(&part);
        while let Some(frame) = reader.next_frame().map_err(|error| broken(transport, &error))? {
            if place_frame(frame, buffer, offset, done)
                .map_err(|detail| transport.nonsense(detail))?
            {
                return Ok(());
            }
        }
    }
}

/// How many bytes from the beginning of `range` are zeros, as far as the agent says so before it comes to data; what
/// follows is not waited for.
pub(crate) async fn zeros_ahead(
    transport: &Transport,
    place: &Place,
    range: ByteRange,
) -> std::result::Result<u64, Failure> {
    let target = format!(
        "{}ranges={}:{}&format=ranges",
        place.target("content"),
        range.offset,
        range.length
    );
    let request = Request::get(target).header("accept", HeaderValue::from_static(MEDIA_TYPE));
    let mut response = transport.begin(&request).await?;
    let mut reader = FrameReader::new();
    let mut zeros = 0_u64;
    while let Some(part) = transport.part(&mut response).await? {
        reader.push(&part);
        while let Some(frame) = reader.next_frame().map_err(|error| broken(transport, &error))? {
            match frame {
                Frame::Zero { offset, length }
                    if offset == range.offset + zeros && length <= range.length - zeros =>
                {
                    zeros += length;
                }
                Frame::Zero { .. } => {
                    return Err(transport.nonsense("zeros at a place that was not asked for"));
                }
                Frame::Data { .. } | Frame::End { .. } => return Ok(zeros),
            }
        }
    }
    Err(transport.lost("the answer was cut"))
}

/// Puts one frame where it belongs. Answers with whether it was the last.
fn place_frame(
    frame: Frame,
    buffer: &mut [u8],
    offset: u64,
    done: &mut usize,
) -> std::result::Result<bool, String> {
    let at = offset + *done as u64;
    let (from, length) = match &frame {
        Frame::Data { offset, content } => (*offset, content.len() as u64),
        Frame::Zero { offset, length } => (*offset, *length),
        Frame::End { position } if *done == buffer.len() && *position == *done as u64 => {
            return Ok(true);
        }
        Frame::End { position } => {
            return Err(format!("the end at {position} after {done} of {} bytes", buffer.len()));
        }
    };
    let end = usize::try_from(length)
        .ok()
        .and_then(|length| done.checked_add(length))
        .filter(|_| from == at);
    let Some(place) = end.and_then(|end| buffer.get_mut(*done..end)) else {
        return Err(format!("content at byte {from} where that at {at} was to come"));
    };
    match frame {
        Frame::Data { content, .. } => place.copy_from_slice(&content),
        _ => place.fill(0),
    }
    *done += place.len();
    Ok(false)
}

fn broken(transport: &Transport, error: &FrameError) -> Failure {
    match error {
        FrameError::Broken(detail) => transport.nonsense(detail.as_str()),
        FrameError::Corrupt(detail) => Failure {
            error: AgentError::Corrupt { agent: transport.agent.clone(), detail: detail.clone() },
            verdict: Verdict::Few,
            wait: None,
            answered: true,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn targets_keep_paths_in_one_piece() {
        let live = Place::Live("C:\\VMs\\a&b.vhdx".into());
        assert_eq!(live.target("content"), "/v1/disks/content?path=C%3A%5CVMs%5Ca%26b.vhdx&");
        let frozen = Place::Frozen("5f".into(), 3);
        assert_eq!(frozen.target("changes"), "/v1/freezes/5f/disks/3/changes?");
    }

    #[test]
    fn frames_fill_the_buffer_in_order_and_to_the_end() {
        let mut buffer = [1; 10];
        let mut done = 0;
        let data =
            |offset, bytes: &[u8]| Frame::Data { offset, content: Bytes::copy_from_slice(bytes) };
        let mut put = |frame| place_frame(frame, &mut buffer, 100, &mut done);
        assert_eq!(put(data(100, b"abc")), Ok(false));
        for wrong in [
            data(100, b"abc"),
            data(104, b"x"),
            data(103, b"12345678"),
            Frame::Zero { offset: 103, length: u64::MAX },
            Frame::End { position: 3 },
        ] {
            assert!(put(wrong.clone()).is_err(), "{wrong:?}");
        }
        assert_eq!(put(Frame::Zero { offset: 103, length: 7 }), Ok(false));
        assert!(put(Frame::End { position: 9 }).is_err());
        assert_eq!(put(Frame::End { position: 10 }), Ok(true));
        assert_eq!(&buffer, b"abc\0\0\0\0\0\0\0");
    }
}
