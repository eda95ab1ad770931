//! The interface of rct-service, as its clients know it.
//!
//! | request | answer |
//! |---|---|
//! | `GET /vdisk/DISK/info` | `{"virtual_size":…,"parent_path":…,"virtual_storage_type":…,"provider_sub_type":…}` |
//! | `GET /vdisk/DISK/rct` | `{"enabled":…,"newer_changes":…,"most_recent_id":…}` |
//! | `PUT /vdisk/DISK/rct?enabled=true` | nothing |
//! | `GET /vdisk/DISK/rct/ID/changes` | `[{"offset":…,"length":…},…]` |
//! | `GET /vdisk/DISK/content?ranges=OFFSET:LENGTH,…` | the bytes, one range after the other |
//! | `POST /vdisk/DISK/content`, the ranges as JSON like changes | the same |
//!
//! Where rct-service answers, this answers the same: 401 without its key, 404 with `Bad vdisk path: …` and `RCT ID
//! not found: …`, 404 for what it has no route for (other methods, a missing parameter, another content type), 400
//! and 422 for JSON that is none or no list of ranges, a length with every content. Where rct-service breaks off
//! (a file that is no disk, a range past the end, an error of the platform) this answers with a status and a
//! line of text. Source: rct-service 0.1.0 (`src/main.rs`, over Rocket 0.4), and its Python client.

mod content;
pub mod errors;
pub mod paths;

use crate::audit::Note;
use crate::auth::{self, Caller, NoKey};
use crate::provider::DiskInfo;
use crate::state::Shared;
use crate::stream::{ChangesFormat, HeldMemory, changes_body};
use crate::v1;
use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use errors::ContractError;
use http::header::CONTENT_TYPE;
use http::{Method, StatusCode};
use paths::{Action, Target};
use serde::Serialize;

/// The routes. The path is read by hand: a disk may be written with slashes, escaped or not, and is one parameter.
pub fn router() -> Router<Shared> {
    Router::new().route("/vdisk/{*rest}", any(handle))
}

/// The answer to what is no request of any interface.
pub async fn unknown() -> Response {
    ContractError::NoRoute.into_response()
}

/// What the fuzz target calls: the disk that a path names.
pub fn parse_for_fuzzing(path: &str, query: &str) -> Option<String> {
    // Only that it ends, without a panic.
    let _ = content::ranges_of_query(query);
    paths::parse(path).map(|target| target.disk)
}

async fn handle(State(state): State<Shared>, request: Request) -> Response {
    let Some(target) = paths::parse(request.uri().path()) else {
        return unknown().await;
    };
    let disk = target.disk.clone();
    let (key, mut response) = match auth::caller(&state, request.headers()) {
        Ok(caller) => {
            let answer = answer(&state, &caller, target, request).await;
            (Some(caller.name), answer.unwrap_or_else(IntoResponse::into_response))
        }
        Err(NoKey) => (None, auth::unauthorized()),
    };
    response.extensions_mut().insert(Note { key, disk: Some(disk), ..Note::default() });
    response
}

async fn answer(
    state: &Shared,
    caller: &Caller,
    target: Target,
    request: Request,
) -> Result<Response, ContractError> {
    let Target { disk, action } = target;
    let (head, body) = request.into_parts();
    let query = head.uri.query().unwrap_or_default();
    let is_read = matches!(head.method, Method::GET | Method::HEAD);
    match action {
        Action::Info if is_read => info(state, &disk).await,
        Action::Tracking if is_read => tracking(state, &disk).await,
        Action::Tracking if head.method == Method::PUT => {
            set_tracking(state, caller, &disk, query).await
        }
        Action::Changes { id } if is_read => changes(state, caller, &disk, id).await,
        Action::Content if is_read => {
            let ranges = (content::ranges_of_query(query)?, HeldMemory::default());
            let transfer = content::begin(state, caller, &disk).await?;
            content::answer(state, &disk, ranges, transfer, head.method == Method::HEAD).await
        }
        Action::Content if head.method == Method::POST => {
            content::check_type(&head.headers)?;
            let transfer = content::begin(state, caller, &disk).await?;
            let ranges = content::ranges_of_body(state, body).await?;
            content::answer(state, &disk, ranges, transfer, false).await
        }
        _ => Err(ContractError::NoRoute),
    }
}

/// What rct-service tells of a disk, in its words and its order.
#[derive(Serialize)]
struct Info {
    virtual_size: u64,
    parent_path: Option<String>,
    virtual_storage_type: u32,
    provider_sub_type: u32,
}

impl From<DiskInfo> for Info {
    fn from(info: DiskInfo) -> Self {
        Self {
            virtual_size: info.virtual_size_bytes,
            parent_path: info.parent_path,
            virtual_storage_type: info.virtual_storage_type,
            provider_sub_type: info.provider_sub_type,
        }
    }
}

/// What rct-service tells of change tracking, likewise.
#[derive(Serialize)]
struct Tracking {
    enabled: bool,
    newer_changes: bool,
    most_recent_id: String,
}

async fn info(state: &Shared, disk: &str) -> Result<Response, ContractError> {
    let info = state.with_disk(disk, |state, path| state.info(path)).await;
    json(&Info::from(info.map_err(|error| ContractError::of_disk(disk, error))?))
}

async fn tracking(state: &Shared, disk: &str) -> Result<Response, ContractError> {
    let tracking = state.with_disk(disk, |state, path| state.tracking(path)).await;
    let tracking = tracking.map_err(|error| ContractError::of_disk(disk, error))?;
    json(&Tracking {
        enabled: tracking.enabled,
        newer_changes: tracking.newer_changes,
        most_recent_id: tracking.most_recent_id,
    })
}

async fn set_tracking(
    state: &Shared,
    caller: &Caller,
    disk: &str,
    query: &str,
) -> Result<Response, ContractError> {
    // The words that a form may have for yes and no.
    let enabled = match paths::query_value(query, "enabled").as_deref() {
        Some("true" | "on") => true,
        Some("false" | "off") => false,
        _ => return Err(ContractError::Parameter("enabled=true or enabled=false is needed")),
    };
    if !caller.may_write() {
        return Err(ContractError::ReadOnlyKey);
    }
    let done = state.with_disk(disk, move |state, path| state.set_tracking(path, enabled));
    done.await.map_err(|error| ContractError::of_disk(disk, error))?;
    Ok(StatusCode::OK.into_response())
}

async fn changes(
    state: &Shared,
    caller: &Caller,
    disk: &str,
    id: String,
) -> Result<Response, ContractError> {
    let place = content::when_free(|| state.work.changes.take(&caller.name)).await?;
    let info = state.with_disk(disk, |state, path| state.info(path)).await;
    let size_bytes = info.map_err(|error| ContractError::of_disk(disk, error))?.virtual_size_bytes;
    let pager = v1::pager(state, disk.to_owned(), id.clone(), size_bytes, 0);
    let body = changes_body(pager, ChangesFormat::List, place).await;
    let body = body.map_err(|error| ContractError::of_changes(disk, &id, error))?;
    Ok(([(CONTENT_TYPE, "application/json")], body).into_response())
}

fn json(value: &impl Serialize) -> Result<Response, ContractError> {
    let text = serde_json::to_vec(value).map_err(|error| {
        ContractError::Internal(format!("the answer cannot be written: {error}"))
    })?;
    Ok(([(CONTENT_TYPE, "application/json")], text).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmtide_block::ByteRange;

    #[test]
    fn json_has_the_names_and_the_order_of_rct_service() {
        let info = Info {
            virtual_size: u64::MAX,
            parent_path: None,
            virtual_storage_type: 3,
            provider_sub_type: 4,
        };
        assert_eq!(
            serde_json::to_string(&info).unwrap(),
            "{\"virtual_size\":18446744073709551615,\"parent_path\":null,\
             \"virtual_storage_type\":3,\"provider_sub_type\":4}"
        );
        assert_eq!(
            serde_json::to_string(&[ByteRange::new(0, 512)]).unwrap(),
            "[{\"offset\":0,\"length\":512}]"
        );
    }
}
