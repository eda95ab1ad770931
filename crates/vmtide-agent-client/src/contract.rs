//! What every agent has: the interface of rct-service, which vmtide's agent keeps.
//!
//! | request | answer |
//! |---|---|
//! | GET `/vdisk/<path>/info` | [`DiskInfo`] |
//! | GET `/vdisk/<path>/rct` | [`TrackingState`] |
//! | PUT `/vdisk/<path>/rct?enabled=true` | nothing |
//! | GET `/vdisk/<path>/rct/<id>/changes` | `[{"offset":…,"length":…},…]` |
//! | POST `/vdisk/<path>/content` with such a list | the bytes, one range after the other |

use crate::changes::{Changes, Doubt, Gathering, RangeList, doubt_of};
use crate::transport::{Request, Transport};
use crate::tries::Failure;
use crate::url::segment;
use crate::{AgentError, Result};
use http::Method;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vmtide_block::{ByteRange, CancelToken};

/// The most of a list of changes, in bytes: [`MAX_RANGES`](crate::MAX_RANGES) ranges are shorter.
const MAX_CHANGES_BYTES: usize = 256 << 20;

/// What a disk is, as every agent tells it. The numbers are those of `virtdisk.h`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Size that the guest sees, in bytes.
    pub virtual_size: u64,
    /// The parent of a differencing disk.
    #[serde(default)]
    pub parent_path: Option<String>,
    /// 0 unknown, 1 ISO, 2 VHD, 3 VHDX, 4 VHD set.
    #[serde(default)]
    pub virtual_storage_type: u32,
    /// 2 fixed, 3 dynamic, 4 differencing.
    #[serde(default)]
    pub provider_sub_type: u32,
}

/// The state of a disk's change tracking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackingState {
    /// Whether writes are tracked.
    pub enabled: bool,
    /// Whether something was written since the most recent id.
    pub newer_changes: bool,
    /// The most recent id; empty where there is none.
    pub most_recent_id: String,
}

fn target(path: &str, what: &str) -> String {
    format!("/vdisk/{}/{what}", segment(path))
}

pub(crate) fn json<T: DeserializeOwned>(agent: &str, body: &[u8]) -> Result<T> {
    serde_json::from_slice(body)
        .map_err(|error| AgentError::protocol(agent, format!("no such document: {error}")))
}

pub(crate) fn info(transport: &Transport, path: &str, cancel: &CancelToken) -> Result<DiskInfo> {
    let info: DiskInfo =
        json(&transport.agent, &transport.document(&Request::get(target(path, "info")), cancel)?)?;
    if i64::try_from(info.virtual_size).is_err() {
        let detail = format!("a disk of {} bytes", info.virtual_size);
        return Err(AgentError::protocol(&transport.agent, detail));
    }
    Ok(info)
}

pub(crate) fn tracking(
    transport: &Transport,
    path: &str,
    cancel: &CancelToken,
) -> Result<TrackingState> {
    json(&transport.agent, &transport.document(&Request::get(target(path, "rct")), cancel)?)
}

pub(crate) fn set_tracking(
    transport: &Transport,
    path: &str,
    enabled: bool,
    cancel: &CancelToken,
) -> Result<()> {
    let request = Request::new(Method::PUT, format!("{}?enabled={enabled}", target(path, "rct")));
    transport.document(&request, cancel).map(drop)
}

pub(crate) fn changes(
    transport: &Transport,
    path: &str,
    id: &str,
    size_bytes: u64,
    cancel: &CancelToken,
) -> Result<Changes> {
    let what = format!("rct/{}/changes", segment(id));
    let request = Request::get(target(path, &what)).at_most(MAX_CHANGES_BYTES);
    let body = match transport.document(&request, cancel) {
        Ok(body) => body,
        Err(error) => return doubt_of(error).map(Err),
    };
    let list: RangeList = match serde_json::from_slice(&body) {
        Ok(list) => list,
        Err(error) => return Ok(Err(Doubt::Broken(format!("no list of changed ranges: {error}")))),
    };
    let mut gathering = Gathering::new(size_bytes);
    Ok(gathering.page(list.0, None).map(|()| gathering.finish()))
}

#[derive(Serialize)]
struct WireRange {
    offset: u64,
    length: u64,
}

/// Reads once, from `offset` into `buffer`. Answers with how many bytes came and how it ended.
pub(crate) async fn read(
    transport: &Transport,
    path: &str,
    buffer: &mut [u8],
    offset: u64,
) -> (usize, std::result::Result<(), Failure>) {
    let wanted = ByteRange::new(offset, buffer.len() as u64);
    let body = match serde_json::to_vec(&[WireRange { offset, length: wanted.length }]) {
        Ok(body) => body,
        Err(error) => return (0, Err(transport.nonsense(error.to_string()))),
    };
    let request =
        Request::new(Method::POST, target(path, "content")).body("application/json", body);
    let mut response = match transport.begin(&request).await {
        Ok(response) => response,
        Err(failure) => return (0, Err(failure)),
    };
    if let Some(length) = response.content_length()
        && length != wanted.length
    {
        let detail = format!("{length} bytes of content where {} were asked for", wanted.length);
        return (0, Err(transport.nonsense(detail)));
    }
    let mut done = 0;
    loop {
        match transport.part(&mut response).await {
            Ok(Some(part)) => match buffer.get_mut(done..done + part.len()) {
                Some(place) => {
                    place.copy_from_slice(&part);
                    done += part.len();
                }
                None => return (0, Err(transport.nonsense(format!("more content than {wanted}")))),
            },
            Ok(None) if done == buffer.len() => return (done, Ok(())),
            Ok(None) => {
                return (done, Err(transport.lost(format!("the content of {wanted} was cut"))));
            }
            Err(failure) => return (done, Err(failure)),
        }
    }
}
