//! VMs of the host over HTTP: listed, described, frozen.

use super::content::{self, READ_PARAMETERS};
use super::error::{ApiError, Result};
use super::freezes::check_ttl;
use super::request::{Asked, json, noted};
use crate::audit::{Note, Record};
use crate::limits::{DEFAULT_FREEZE_TTL_SECONDS, VM_JSON_BODY_BYTES};
use crate::provider::ChangePage;
use crate::server::Peer;
use crate::state::Shared;
use crate::stream::{AskForPage, ChangePager, ChangesFormat, changes_body, receive_json_of};
use crate::vms::{EndError, Vms};
use axum::Extension;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde::Deserialize;
use std::sync::Arc;
use vmtide_block::RangeSet;
use vmtide_hypervisor::remote::{FreezeDocument, FreezeView};
use vmtide_hypervisor::{Hypervisor, HypervisorError, VmSelector};

/// The body that renews a freeze.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Renewal {
    ttl_seconds: Option<u64>,
}

/// The VMs of this host.
fn vms_of(state: &Shared) -> Result<&Arc<Vms>> {
    state.vms.as_ref().ok_or_else(|| {
        ApiError::new("unsupported", "this agent serves no VMs: its host has no Hyper-V")
    })
}

/// Asks the platform on a thread that may block.
async fn ask<T: Send + 'static>(
    state: &Shared,
    question: impl FnOnce(&dyn Hypervisor) -> vmtide_hypervisor::Result<T> + Send + 'static,
) -> Result<T> {
    let hypervisor = Arc::clone(vms_of(state)?.hypervisor());
    Ok(state.blocking(move |_| Ok(question(&*hypervisor))).await??)
}

/// `GET /v1/vms`
pub(super) async fn list(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&["select"])?;
    let select = asked.parameters.get("select")?.map(str::parse::<VmSelector>).transpose();
    let select = select.map_err(|wrong| ApiError::bad_request(format!("select: {wrong}")))?;
    let vms = ask(&state, move |hypervisor| match &select {
        Some(selector) => hypervisor.select(selector),
        None => hypervisor.list(),
    });
    let vms = vms.await?;
    json(&serde_json::json!({ "vms": vms }))
}

/// `GET /v1/vms/config?vm=`
pub(super) async fn config(State(state): State<Shared>, asked: Asked) -> Response {
    let mut note = asked.note();
    let answer = async {
        asked.parameters.only(&["vm"])?;
        let vm = asked.parameters.required("vm")?.to_owned();
        note.vm = Some(vm.clone());
        json(&ask(&state, move |hypervisor| hypervisor.describe(&vm)).await?)
    };
    let answer: Result<Response> = answer.await;
    noted(answer.into_response(), note)
}

/// `GET /v1/vms/health[?vm=]`
pub(super) async fn health(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&["vm"])?;
    let vm = asked.parameters.get("vm")?.map(str::to_owned);
    let checks = ask(&state, move |hypervisor| Ok(hypervisor.examine(vm.as_deref()))).await?;
    json(&serde_json::json!({ "checks": checks }))
}

/// `POST /v1/vms/reap[?orphans=true]`: what it removes of jobs that were killed, checkpoints and unfinished restores, is gone for good,
/// so it needs a key that may write, and has a line in the audit log before it begins.
pub(super) async fn reap(
    State(state): State<Shared>,
    asked: Asked,
    peer: Option<Extension<Peer>>,
) -> Response {
    let note = Note { call: Some("reap".to_owned()), ..asked.note() };
    let answer = async {
        asked.parameters.only(&["orphans"])?;
        let orphans = match asked.parameters.get("orphans")? {
            None | Some("false") => false,
            Some("true") => true,
            Some(_) => return Err(ApiError::bad_request("orphans is true or false")),
        };
        asked.may_write()?;
        vms_of(&state)?;
        let begun = Record::begun(peer.map(|peer| peer.0), note.clone(), "POST", "/v1/vms/reap");
        state.audit.write(begun);
        let report =
            ask(
                &state,
                move |hypervisor| {
                    if orphans { hypervisor.reap_orphans() } else { hypervisor.reap() }
                },
            );
        json(&report.await?)
    };
    let answer: Result<Response> = answer.await;
    noted(answer.into_response(), note)
}

/// `POST /v1/vms/freezes`
pub(super) async fn freeze(State(state): State<Shared>, asked: Asked, body: Body) -> Response {
    let mut note = asked.note();
    let answer = try_freeze(&state, &asked, body, &mut note).await;
    noted(answer.into_response(), note)
}

async fn try_freeze(
    state: &Shared,
    asked: &Asked,
    body: Body,
    note: &mut Note,
) -> Result<Response> {
    asked.parameters.only(&[])?;
    let vms = vms_of(state)?;
    let wanted: FreezeDocument = receive_json_of(body, VM_JSON_BODY_BYTES, &state.limits).await?;
    note.vm = Some(wanted.vm.clone());
    let ttl_seconds = check_ttl(wanted.ttl_seconds)?.unwrap_or(DEFAULT_FREEZE_TTL_SECONDS);
    let admission = vms.admission(state);
    let (view, is_new) = vms.freezes.begin(&asked.caller.name, wanted, ttl_seconds, admission)?;
    note.freeze = Some(view.id.clone());
    let status = if is_new { StatusCode::ACCEPTED } else { StatusCode::OK };
    Ok((status, json(&view)?).into_response())
}

/// `GET /v1/vms/freezes`
pub(super) async fn freezes(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&[])?;
    let own = vms_of(&state)?.freezes.of_client(&asked.caller.name);
    json(&serde_json::json!({ "freezes": own }))
}

/// `GET /v1/vms/freezes/ID`
pub(super) async fn show(
    State(state): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Result<Response> {
    asked.parameters.only(&[])?;
    let found = vms_of(&state)?.freezes.find(&asked.caller.name, &id);
    json(&found.ok_or_else(|| ApiError::unknown_freeze(&id))?)
}

/// `PUT /v1/vms/freezes/ID`
pub(super) async fn renew(
    State(state): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response> {
    asked.parameters.only(&[])?;
    let vms = vms_of(&state)?;
    let Renewal { ttl_seconds } = receive_json_of(body, VM_JSON_BODY_BYTES, &state.limits).await?;
    let ttl_seconds = check_ttl(ttl_seconds)?;
    let renewed = vms.freezes.renew(&asked.caller.name, &id, ttl_seconds);
    json(&renewed.ok_or_else(|| ApiError::unknown_freeze(&id))?)
}

/// `POST /v1/vms/freezes/ID/seal`
pub(super) async fn seal(
    State(state): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Response {
    ended(&state, &asked, &id, |vms, client| vms.freezes.seal(client, &id))
}

/// `POST /v1/vms/freezes/ID/commit`
pub(super) async fn commit(
    State(state): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Response {
    ended(&state, &asked, &id, |vms, client| vms.freezes.commit(client, &id))
}

/// `DELETE /v1/vms/freezes/ID`
pub(super) async fn abort(
    State(state): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Response {
    ended(&state, &asked, &id, |vms, client| vms.freezes.abort(client, &id))
}

/// The answer to a request for a step: 202 while the platform is at it, 200 once it is over.
fn ended(
    state: &Shared,
    asked: &Asked,
    id: &str,
    end: impl FnOnce(&Vms, &str) -> std::result::Result<FreezeView, EndError>,
) -> Response {
    let mut note = asked.note();
    let answer = || {
        asked.parameters.only(&[])?;
        let view = end(vms_of(state)?, &asked.caller.name).map_err(|error| match error {
            EndError::Unknown => ApiError::unknown_freeze(id),
            EndError::State(_) => ApiError::new("wrong_state", error.to_string()),
        })?;
        note.vm = Some(view.vm.clone());
        note.freeze = Some(view.id.clone());
        let status = if view.state.is_passing() { StatusCode::ACCEPTED } else { StatusCode::OK };
        Ok((status, json(&view)?).into_response())
    };
    let answer: Result<Response> = answer();
    noted(answer.into_response(), note)
}

/// `GET /v1/vms/freezes/ID/check`
pub(super) async fn check(
    State(state): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Result<Response> {
    asked.parameters.only(&[])?;
    let freezes = Arc::clone(&vms_of(&state)?.freezes);
    let (client, freeze) = (Arc::clone(&asked.caller.name), id.clone());
    let checked = state.blocking(move |_| Ok(freezes.check(&client, &freeze))).await?;
    match checked {
        None => Err(ApiError::unknown_freeze(&id)),
        Some(Ok(())) => json(&serde_json::json!({})),
        Some(Err(error)) => Err(ApiError::new("moment_lost", error.to_string())),
    }
}

/// `GET` and `POST /v1/vms/freezes/ID/disks/N/content`
pub(super) async fn read(
    State(state): State<Shared>,
    asked: Asked,
    Path((id, index)): Path<(String, String)>,
    request: Request,
) -> Response {
    let mut note = asked.note();
    let answer = async {
        asked.parameters.only(&READ_PARAMETERS[1..])?;
        let found = index
            .parse()
            .ok()
            .and_then(|index| state.vms.as_ref()?.freezes.use_disk(&asked.caller.name, &id, index));
        vms_of(&state)?;
        let device = Arc::new(found.ok_or_else(|| ApiError::unknown_freeze(&id))?);
        let name = vmtide_block::BlockDevice::name(&*device);
        note.freeze = Some(id.clone());
        note.disk = Some(name.clone());
        let read = content::read_request(&state, &asked, &name, request).await?;
        content::answer(&state, &asked.parameters, read, device).await
    };
    let answer: Result<Response> = answer.await;
    noted(answer.into_response(), note)
}

/// `GET /v1/vms/freezes/ID/disks/N/changes`
pub(super) async fn changes(
    State(state): State<Shared>,
    asked: Asked,
    Path((id, index)): Path<(String, String)>,
) -> Result<Response> {
    asked.parameters.only(&["cursor", "limit"])?;
    let vms = vms_of(&state)?;
    let found =
        index.parse().ok().and_then(|index| vms.freezes.changes(&asked.caller.name, &id, index));
    let (ranges, size_bytes) = found.ok_or_else(|| ApiError::unknown_freeze(&id))?;
    let ranges = ranges.unwrap_or_else(|| Arc::new(RangeSet::full(size_bytes)));
    let cursor = asked.parameters.number("cursor")?.unwrap_or(0);
    let most = crate::limits::MAX_RANGES;
    let limit = asked.parameters.number("limit")?.unwrap_or(most).clamp(1, most);
    let place = state.work.changes.take(&asked.caller.name)?;
    let answer: AskForPage = Box::new(move |asked| {
        let ranges = ranges.within(asked);
        Ok(ChangePage { ranges: ranges.as_slice().to_vec(), processed_bytes: asked.length })
    });
    let pager = ChangePager::new(format!("freeze {id}"), size_bytes, cursor, answer);
    let body = changes_body(pager, ChangesFormat::Page { limit }, place).await?;
    Ok(([(CONTENT_TYPE, "application/json")], body).into_response())
}

impl From<HypervisorError> for ApiError {
    fn from(error: HypervisorError) -> Self {
        let code = match &error {
            HypervisorError::NotFound { .. } => "not_found",
            HypervisorError::Denied { .. } => "denied",
            HypervisorError::Busy { .. } => "in_use",
            HypervisorError::Unsupported { .. } => "unsupported",
            _ => "failed",
        };
        Self::new(code, error.to_string())
    }
}
