//! Moments of disks over HTTP.

use super::content::{self, READ_PARAMETERS};
use super::disks::changes_since;
use super::error::{ApiError, Result};
use super::request::{Asked, json};
use crate::freezes::FreezeUse;
use crate::limits::{DEFAULT_FREEZE_TTL_SECONDS, FREEZE_TTL_SECONDS};
use crate::provider::ProviderError;
use crate::state::Shared;
use crate::stream::receive_json;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Deserialize;
use std::collections::HashSet;

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
pub(super) async fn create(
    State(state): State<Shared>,
    asked: Asked,
    body: Body,
) -> Result<Response> {
    asked.parameters.only(&[])?;
    let reservation = state.work.freezes.reserve(&asked.caller.name)?;
    let Wanted { disks, ttl_seconds } = receive_json(body, &state.limits).await?;
    check_disks(&disks, state.limits.disks_per_freeze)?;
    let ttl_seconds = check_ttl(ttl_seconds)?.unwrap_or(DEFAULT_FREEZE_TTL_SECONDS);
    let requested = disks.clone();
    // Whatever happens to this request, what was frozen is let go unless it is kept.
    let frozen = state.blocking(move |state| {
        let located = requested.iter().map(|disk| state.locate(disk));
        let located = located.collect::<std::result::Result<Vec<_>, ProviderError>>()?;
        let paths: Vec<_> = located.iter().map(|disk| disk.path().to_path_buf()).collect();
        for path in &paths {
            state.check_parents(path)?;
        }
        let frozen = state.provider.freeze(&paths)?;
        for (disk, requested) in located.iter().zip(&requested) {
            disk.recheck().map_err(|reason| ProviderError::Failed {
                path: requested.clone(),
                reason: reason.to_string(),
            })?;
        }
        if frozen.disks().len() != requested.len() {
            let path = requested.first().cloned().unwrap_or_default();
            let reason = "the platform froze another number of disks than asked for".to_owned();
            return Err(ProviderError::Failed { path, reason });
        }
        Ok(frozen)
    });
    let view = state.work.freezes.keep(reservation, frozen.await?, &disks, ttl_seconds);
    Ok((StatusCode::CREATED, json(&view)?).into_response())
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
) -> Result<Response> {
    asked.parameters.only(&READ_PARAMETERS[1..])?;
    let disk = use_disk(&state, &asked, &id, &index)?;
    let requested = disk.requested().to_owned();
    let read = content::read_request(&state, &asked, &requested, request).await?;
    let device = disk.into_device().ok_or_else(|| ApiError::unknown_freeze(&id))?;
    content::answer(&state, &asked.parameters, read, device).await
}

/// `GET /v1/freezes/ID/disks/N/changes?since=`
pub(super) async fn changes(
    State(state): State<Shared>,
    asked: Asked,
    Path((id, index)): Path<(String, String)>,
) -> Result<Response> {
    asked.parameters.only(&["since", "cursor", "limit"])?;
    let disk = use_disk(&state, &asked, &id, &index)?;
    let requested = disk.requested().to_owned();
    let device = disk.into_device().ok_or_else(|| ApiError::unknown_freeze(&id))?;
    changes_since(&state, &asked, requested, device.size_bytes()).await
}

fn use_disk(state: &Shared, asked: &Asked, id: &str, index: &str) -> Result<FreezeUse> {
    let found = index
        .parse()
        .ok()
        .and_then(|index| state.work.freezes.use_disk(&asked.caller.name, id, index));
    found.ok_or_else(|| ApiError::unknown_freeze(id))
}

fn check_disks(disks: &[String], most: usize) -> Result<()> {
    if disks.is_empty() || disks.len() > most {
        return Err(ApiError::bad_request(format!("disks: give 1 to {most} paths")));
    }
    let mut seen = HashSet::new();
    match disks.iter().find(|disk| !seen.insert(*disk)) {
        None => Ok(()),
        Some(_) => Err(ApiError::bad_request("disks: one is there twice")),
    }
}

fn check_ttl(seconds: Option<u64>) -> Result<Option<u64>> {
    match seconds {
        Some(seconds) if !FREEZE_TTL_SECONDS.contains(&seconds) => {
            let (least, most) = (FREEZE_TTL_SECONDS.start(), FREEZE_TTL_SECONDS.end());
            Err(ApiError::bad_request(format!("ttl_seconds is {least} to {most}")))
        }
        seconds => Ok(seconds),
    }
}
