//! The management objects of the host's VMs, for clients that restore or examine them.
//!
//! Reading needs a key that may read, and sees no more than VMs need ([`cim_scope`]); calling a method, whatever it does, one that may write. A key that may write
//! can so make, change and remove VMs of this host, with disks wherever the host's own service can reach them: it is
//! the key of a Hyper-V administrator.

use super::cim_scope;
use super::error::{ApiError, Result};
use super::request::{Asked, json};
use crate::limits::VM_JSON_BODY_BYTES;
use crate::state::Shared;
use crate::stream::receive_json_of;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use std::sync::Arc;
use vmtide_cim::remote::Call;

/// `POST /v1/cim`
pub(super) async fn call(
    State(state): State<Shared>,
    asked: Asked,
    body: Body,
) -> Result<Response> {
    asked.parameters.only(&[])?;
    let cim = state.vms.as_ref().and_then(|vms| vms.cim()).map(Arc::clone);
    let cim = cim.ok_or_else(|| {
        ApiError::new("unsupported", "this agent serves no management objects of VMs")
    })?;
    let place = state.work.calls.take(&asked.caller.name)?;
    let call: Call = receive_json_of(body, VM_JSON_BODY_BYTES, &state.limits).await?;
    call.check().and_then(|()| cim_scope::check(&call)).map_err(ApiError::bad_request)?;
    if call.changes() {
        asked.may_write()?;
    }
    let reply = state.blocking(move |_| {
        // Given back only once the host has answered, also where the client has gone.
        let _place = place;
        Ok(call.ask(&*cim))
    });
    json(&reply.await?)
}
