//! Moments of disks over HTTP.

use super::content::{self, READ_PARAMETERS};
use super::disks::changes_since;
use super::error::{ApiError, Result};
use super::request::{Asked, json, noted};
use crate::audit::Note;
use crate::freezes::FreezeUse;
use crate::limits::{DEFAULT_FREEZE_TTL_SECONDS, FREEZE_TTL_SECONDS};
use crate::provider::{FrozenDisks, ProviderError};
use crate::roots::Located;
use crate::state::{AppState, Shared};
use crate::stream::receive_json;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Deserialize;

/// The body that asks for a freeze.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    disks: Vec<String>,
    ttl_seconds: Option<u64>,
}

/// The body that renews one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Renewal {
    ttl_seconds: Option<u64>,
}

/// `POST /v1/freezes`
pub(super) async fn create(State(state): State<Shared>, asked: Asked, body: Body) -> Response {
    let mut note = asked.note();
    let answer = try_create(&state, &asked, body, &mut note).await;
    noted(answer.into_response(), note)
}

async fn try_create(
    state: &Shared,
    asked: &Asked,
    body: Body,
    note: &mut Note,
) -> Result<Response> {
    asked.parameters.only(&[])?;
    let reservation = state.work.freezes.reserve(&asked.caller.name)?;
    let Wanted { disks, ttl_seconds } = receive_json(body, &state.limits).await?;
    if disks.is_empty() || disks.len() > state.limits.disks_per_freeze {
        let most = state.limits.disks_per_freeze;
        return Err(ApiError::bad_request(format!("disks: give 1 to {most} paths")));
    }
    note.disks.clone_from(&disks);
    let ttl_seconds = check_ttl(ttl_seconds)?.unwrap_or(DEFAULT_FREEZE_TTL_SECONDS);
    let requested = disks.clone();
    // Whatever happens to this request, what was frozen is let go unless it is kept.
    let frozen = state.blocking(move |state| Ok(freeze(state, &requested))).await??;
    let view = state.work.freezes.keep(reservation, frozen, &disks, ttl_seconds);
    note.freeze = Some(view.id.clone());
    Ok((StatusCode::CREATED, json(&view)?).into_response())
}

/// One moment of the disks that a client named. Blocks.
fn freeze(state: &AppState, requested: &[String]) -> Result<Box<dyn FrozenDisks>> {
    let located = requested.iter().map(|disk| state.locate(disk));
    let located = located.collect::<std::result::Result<Vec<_>, ProviderError>>()?;
    // Not by what the client wrote: one disk that is to be frozen twice waits for itself, and its VM with it.
    let is_twice = |(at, disk): (usize, &Located)| {
        located.iter().take(at).any(|other| other.is_same_file(disk))
    };
    if located.iter().enumerate().any(is_twice) {
        return Err(ApiError::bad_request("disks: one is there twice"));
    }
    let paths: Vec<_> = located.iter().map(|disk| disk.path().to_path_buf()).collect();
    let frozen = state.freeze(&paths)?;
    for (disk, requested) in located.iter().zip(requested) {
        disk.recheck().map_err(|reason| ProviderError::Failed {
            path: requested.clone(),
            reason: reason.to_string(),
        })?;
    }
    if frozen.disks().len() != requested.len() {
        let path = requested.first().cloned().unwrap_or_default();
        let reason = "the platform froze another number of disks than asked for".to_owned();
        return Err(ProviderError::Failed { path, reason }.into());
    }
    Ok(frozen)
}

/// `GET /v1/freezes`
pub(super) async fn list(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&[])?;
    json(&serde_json::json!({ "freezes": state.work.freezes.of_client(&asked.caller.name) }))
}

/// `GET /v1/freezes/ID`
pub(super) async fn show(
    State(state): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Result<Response> {
    asked.parameters.only(&[])?;
    let found = state.work.freezes.find(&asked.caller.name, &id);
    json(&found.ok_or_else(|| ApiError::unknown_freeze(&id))?)
}

/// `PUT /v1/freezes/ID`
pub(super) async fn renew(
    State(state): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response> {
    asked.parameters.only(&[])?;
    let Renewal { ttl_seconds } = receive_json(body, &state.limits).await?;
    let ttl_seconds = check_ttl(ttl_seconds)?;
    let renewed = state.work.freezes.renew(&asked.caller.name, &id, ttl_seconds);
    json(&renewed.ok_or_else(|| ApiError::unknown_freeze(&id))?)
}

/// `DELETE /v1/freezes/ID`
pub(super) async fn end(
    State(state): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Result<Response> {
    asked.parameters.only(&[])?;
    match state.work.freezes.end(&asked.caller.name, &id) {
        true => Ok(StatusCode::NO_CONTENT.into_response()),
        false => Err(ApiError::unknown_freeze(&id)),
    }
}

/// `GET` and `POST /v1/freezes/ID/disks/N/content`
pub(super) async fn read(
    State(state): State<Shared>,
    asked: Asked,
    Path((id, index)): Path<(String, String)>,
    request: Request,
) -> Response {
    let mut note = asked.note();
    let answer = async {
        asked.parameters.only(&READ_PARAMETERS[1..])?;
        let disk = use_disk(&state, &asked, &id, &index, &mut note)?;
        let requested = disk.requested().to_owned();
        let read = content::read_request(&state, &asked, &requested, request).await?;
        let device = disk.into_device().ok_or_else(|| ApiError::unknown_freeze(&id))?;
        content::answer(&state, &asked.parameters, read, device).await
    };
    let answer: Result<Response> = answer.await;
    noted(answer.into_response(), note)
}

/// `GET /v1/freezes/ID/disks/N/changes?since=`
pub(super) async fn changes(
    State(state): State<Shared>,
    asked: Asked,
    Path((id, index)): Path<(String, String)>,
) -> Response {
    let mut note = asked.note();
    let answer = async {
        asked.parameters.only(&["since", "cursor", "limit"])?;
        let disk = use_disk(&state, &asked, &id, &index, &mut note)?;
        let requested = disk.requested().to_owned();
        let device = disk.into_device().ok_or_else(|| ApiError::unknown_freeze(&id))?;
        changes_since(&state, &asked, requested, device.size_bytes()).await
    };
    let answer: Result<Response> = answer.await;
    noted(answer.into_response(), note)
}

/// The disk of a freeze, which the audit log is told, too.
fn use_disk(
    state: &Shared,
    asked: &Asked,
    id: &str,
    index: &str,
    note: &mut Note,
) -> Result<FreezeUse> {
    let found = index
        .parse()
        .ok()
        .and_then(|index| state.work.freezes.use_disk(&asked.caller.name, id, index));
    let disk = found.ok_or_else(|| ApiError::unknown_freeze(id))?;
    note.freeze = Some(id.to_owned());
    note.disk = Some(disk.requested().to_owned());
    Ok(disk)
}

/// A time to live that may be asked for.
pub(super) fn check_ttl(seconds: Option<u64>) -> Result<Option<u64>> {
    match seconds {
        Some(seconds) if !FREEZE_TTL_SECONDS.contains(&seconds) => {
            let (least, most) = (FREEZE_TTL_SECONDS.start(), FREEZE_TTL_SECONDS.end());
            Err(ApiError::bad_request(format!("ttl_seconds is {least} to {most}")))
        }
        seconds => Ok(seconds),
    }
}
