//! What disks are, making them, and their change tracking.

use super::error::Result;
use super::request::{Asked, json};
use crate::provider::{DiskInfo, NewDisk};
use crate::state::Shared;
use crate::stream::{AskForPage, ChangePager, ChangesFormat, changes_body, receive_json};
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde::{Deserialize, Serialize};
use vmtide_block::CancelToken;

/// What a disk is, under the name that the client used.
#[derive(Serialize)]
struct NamedDisk {
    path: String,
    #[serde(flatten)]
    info: DiskInfo,
}

/// The body that switches tracking.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TrackingSwitch {
    enabled: bool,
}

/// Cancels what it is about when the request is over, whichever way.
struct CancelOnDrop(CancelToken);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// A moment of a disk.
#[derive(Serialize)]
struct Checkpoint {
    tracking_id: String,
}

/// `GET /v1/disks?path=`
pub(super) async fn info(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&["path"])?;
    describe(&state, asked.path()?).await
}

async fn describe(state: &Shared, path: String) -> Result<Response> {
    let info = state.with_disk(&path, |state, path| state.info(path)).await?;
    json(&NamedDisk { path, info })
}

/// `POST /v1/disks?path=`
pub(super) async fn create(
    State(state): State<Shared>,
    asked: Asked,
    body: Body,
) -> Result<Response> {
    asked.parameters.only(&["path"])?;
    asked.may_write()?;
    let path = asked.path()?;
    let disk: NewDisk = receive_json(body, &state.limits).await?;
    let requested = path.clone();
    let cancel = CancelToken::new();
    // A client that goes away, or an agent that ends, wants no disk that takes hours to make.
    let _given_up = CancelOnDrop(cancel.clone());
    state.blocking(move |state| state.create(&requested, &disk, &cancel)).await?;
    Ok((StatusCode::CREATED, describe(&state, path).await?).into_response())
}

/// `GET /v1/disks/tracking?path=`
pub(super) async fn tracking(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&["path"])?;
    let path = asked.path()?;
    json(&state.with_disk(&path, |state, path| state.tracking(path)).await?)
}

/// `PUT /v1/disks/tracking?path=`
pub(super) async fn set_tracking(
    State(state): State<Shared>,
    asked: Asked,
    body: Body,
) -> Result<Response> {
    asked.parameters.only(&["path"])?;
    asked.may_write()?;
    let path = asked.path()?;
    let TrackingSwitch { enabled } = receive_json(body, &state.limits).await?;
    let switched = state.with_disk(&path, move |state, path| {
        state.set_tracking(path, enabled)?;
        state.provider.tracking(path)
    });
    json(&switched.await?)
}

/// `POST /v1/disks/tracking/checkpoints?path=`
pub(super) async fn checkpoint(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&["path"])?;
    asked.may_write()?;
    let path = asked.path()?;
    let requested = path.clone();
    let sealed = state.with_disk(&path, move |state, path| {
        // The moment itself is not kept, only its name.
        let frozen = state.freeze(&[path.to_path_buf()])?;
        let id = frozen.disks().first().and_then(|disk| disk.tracking_id.clone());
        id.ok_or(crate::provider::ProviderError::TrackingDisabled { path: requested })
    });
    let tracking_id = sealed.await?;
    Ok((StatusCode::CREATED, json(&Checkpoint { tracking_id })?).into_response())
}

/// `GET /v1/disks/changes?path=&since=`
pub(super) async fn changes(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&["path", "since", "cursor", "limit"])?;
    let path = asked.path()?;
    let info = state.with_disk(&path, |state, path| state.info(path)).await?;
    changes_since(&state, &asked, path, info.virtual_size_bytes).await
}

/// A page of changes of the disk that the client calls `path`.
pub(super) async fn changes_since(
    state: &Shared,
    asked: &Asked,
    path: String,
    size_bytes: u64,
) -> Result<Response> {
    let since = asked.parameters.required("since")?.to_owned();
    let cursor = asked.parameters.number("cursor")?.unwrap_or(0);
    let most = crate::limits::MAX_RANGES;
    let limit = asked.parameters.number("limit")?.unwrap_or(most).clamp(1, most);
    let place = state.work.changes.take(&asked.caller.name)?;
    let pager = pager(state, path, since, size_bytes, cursor);
    let body = changes_body(pager, ChangesFormat::Page { limit }, place).await?;
    Ok(([(CONTENT_TYPE, "application/json")], body).into_response())
}

/// Asks for the changes of a disk, finding it anew for every page: its name may mean another file by then.
pub(crate) fn pager(
    state: &Shared,
    requested: String,
    since: String,
    size_bytes: u64,
    from: u64,
) -> ChangePager {
    let disk = requested.clone();
    let state = Shared::clone(state);
    let ask: AskForPage = Box::new(move |range| {
        state.with_located(&requested, |state, path| state.changes(path, &since, range))
    });
    ChangePager::new(disk, size_bytes, from, ask)
}
