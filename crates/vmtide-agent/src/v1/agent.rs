//! The agent itself: whether it lives, what it allows, what it counts, and its transfers.

use super::error::{ApiError, Result};
use super::request::{Asked, json};
use crate::count::Count;
use crate::metrics::{self, Gauges};
use crate::state::Shared;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;

/// `GET /v1/health`: nothing that anybody could use.
pub(super) async fn health() -> Response {
    ([(CONTENT_TYPE, "application/json")], r#"{"status":"ok"}"#).into_response()
}

/// `GET /v1`
pub(super) async fn show(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&[])?;
    json(&serde_json::json!({
        "api": 1,
        "version": env!("CARGO_PKG_VERSION"),
        "key": { "name": &*asked.caller.name, "rights": asked.caller.rights },
        "limits": state.limits,
    }))
}

/// `GET /v1/openapi.json`
pub(super) async fn openapi(asked: Asked) -> Result<Response> {
    asked.parameters.only(&[])?;
    json(&crate::openapi::document())
}

/// `GET /v1/metrics`
pub(super) async fn metrics(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&[])?;
    let (work, disks) = (&state.work, state.provider.open_disks());
    let threads = [
        &state.metrics.threads,
        work.transfers.threads(),
        work.changes.threads(),
        work.freezes.threads(),
    ];
    let gauges = Gauges {
        transfers: work.transfers.running(),
        change_lists: work.changes.taken(),
        calls: work.calls.taken(),
        freezes: work.freezes.held(),
        vm_freezes: state.vms.as_ref().map_or(0, |vms| vms.freezes.held()),
        open_disks: disks.open,
        attached_disks: disks.attached,
        blocking_threads: threads.into_iter().map(Count::now).sum(),
        totals: work.transfers.totals(),
    };
    let text = state.metrics.render(&gauges);
    Ok(([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

/// `GET /v1/jobs`
pub(super) async fn jobs(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&[])?;
    json(&serde_json::json!({ "jobs": state.work.transfers.of_client(&asked.caller.name) }))
}

/// `GET /v1/jobs/ID`
pub(super) async fn job(
    State(state): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Result<Response> {
    asked.parameters.only(&[])?;
    let found = state.work.transfers.find(&asked.caller.name, &id);
    json(&found.ok_or_else(|| ApiError::unknown_job(&id))?)
}

/// `DELETE /v1/jobs/ID`
pub(super) async fn cancel(
    State(state): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Result<Response> {
    asked.parameters.only(&[])?;
    match state.work.transfers.cancel(&asked.caller.name, &id) {
        true => Ok(StatusCode::NO_CONTENT.into_response()),
        false => Err(ApiError::unknown_job(&id)),
    }
}
