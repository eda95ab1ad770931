//! `/v1`: the agent's own interface, described in `docs/agent-protocol.md`.
//!
//! Handlers read a request, ask the state, and tell the answer; what they have in common is the key and the
//! parameters ([`request`]) and the form of errors ([`error`]). Everything that streams is in
//! [`stream`](crate::stream).

mod agent;
mod cim;
mod cim_scope;
mod content;
mod disks;
mod error;
mod files;
mod form;
mod freezes;
mod request;
mod vms;

pub(crate) use disks::pager;

use crate::state::Shared;
use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use error::ApiError;

/// Everything below `/v1`.
pub(crate) fn router(state: &Shared) -> Router<Shared> {
    let with_key = Router::new()
        .route("/", get(agent::show))
        .route("/openapi.json", get(agent::openapi))
        .route("/metrics", get(agent::metrics))
        .route("/disks", get(disks::info).post(disks::create))
        .route("/disks/tracking", get(disks::tracking).put(disks::set_tracking))
        .route("/disks/tracking/checkpoints", post(disks::checkpoint))
        .route("/disks/changes", get(disks::changes))
        .route("/disks/content", get(content::read).post(content::read).put(content::write))
        .route("/freezes", get(freezes::list).post(freezes::create))
        .route("/freezes/{id}", get(freezes::show).put(freezes::renew).delete(freezes::end))
        .route("/freezes/{id}/disks/{index}/content", get(freezes::read).post(freezes::read))
        .route("/freezes/{id}/disks/{index}/changes", get(freezes::changes))
        .merge(vm_routes())
        .route("/jobs", get(agent::jobs))
        .route("/jobs/{id}", get(agent::job).delete(agent::cancel))
        .method_not_allowed_fallback(wrong_method)
        .fallback(unknown)
        .layer(from_fn_with_state(Shared::clone(state), request::require_key))
        // What is larger has a limit of its own, or none as content that is written.
        .layer(axum::extract::DefaultBodyLimit::disable());
    let open = Router::new().route("/health", get(agent::health));
    Router::new().nest("/v1", open.merge(with_key))
}

/// VMs, and what a restore of them needs beside disks.
fn vm_routes() -> Router<Shared> {
    Router::new()
        .route("/vms", get(vms::list))
        .route("/vms/config", get(vms::config))
        .route("/vms/health", get(vms::health))
        .route("/vms/reap", post(vms::reap))
        .route("/vms/freezes", get(vms::freezes).post(vms::freeze))
        .route("/vms/freezes/{id}", get(vms::show).put(vms::renew).delete(vms::abort))
        .route("/vms/freezes/{id}/seal", post(vms::seal))
        .route("/vms/freezes/{id}/commit", post(vms::commit))
        .route("/vms/freezes/{id}/check", get(vms::check))
        .route("/vms/freezes/{id}/disks/{index}/content", get(vms::read).post(vms::read))
        .route("/vms/freezes/{id}/disks/{index}/changes", get(vms::changes))
        .route("/cim", post(cim::call))
        .route("/files", get(files::list).delete(files::remove))
        .route("/files/content", get(files::read).post(files::write))
        .route("/files/directories", post(files::make_directory).delete(files::remove_directory))
}

async fn unknown() -> ApiError {
    ApiError::new("not_found", "there is nothing here: GET /v1/openapi.json tells all routes")
}

async fn wrong_method() -> ApiError {
    ApiError::new("method_not_allowed", "this route has no such method")
}
