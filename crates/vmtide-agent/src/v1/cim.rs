//! The management objects of the host's VMs, for clients that restore or examine them.
//!
//! Reading needs a key that may read, and sees no more than VMs need ([`cim_scope`]); calling a method, whatever it
//! does, one that may write. A key that may write can so make, change and remove VMs of this host, with disks wherever
//! the host's own service can reach them: it is the key of a Hyper-V administrator. So the audit log says of each call
//! what it asked, and of a method twice: before it is run, and how it was answered.

use super::cim_scope;
use super::error::{ApiError, Result};
use super::request::{Asked, noted};
use crate::audit::{Note, Record};
use crate::held_body;
use crate::limits::VM_JSON_BODY_BYTES;
use crate::provider::ProviderError;
use crate::server::Peer;
use crate::state::Shared;
use crate::stream::receive_json_of;
use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::CONTENT_TYPE;
use std::sync::Arc;
use vmtide_cim::remote::Call;
use vmtide_cim::{CimValue, ObjectPath};

/// `POST /v1/cim`
pub(super) async fn call(
    State(state): State<Shared>,
    asked: Asked,
    peer: Option<Extension<Peer>>,
    body: Body,
) -> Response {
    let mut note = asked.note();
    let answer = try_call(&state, &asked, peer.map(|peer| peer.0), body, &mut note).await;
    noted(answer.into_response(), note)
}

async fn try_call(
    state: &Shared,
    asked: &Asked,
    peer: Option<Peer>,
    body: Body,
    note: &mut Note,
) -> Result<Response> {
    asked.parameters.only(&[])?;
    let cim = state.vms.as_ref().and_then(|vms| vms.cim()).map(Arc::clone);
    let cim = cim.ok_or_else(|| {
        ApiError::new("unsupported", "this agent serves no management objects of VMs")
    })?;
    let place = state.work.calls.take(&asked.caller.name)?;
    let call: Call = receive_json_of(body, VM_JSON_BODY_BYTES, &state.limits).await?;
    (note.call, note.vm) = (Some(name_of(&call)), object_of(&call));
    call.check().and_then(|()| cim_scope::check(&call)).map_err(ApiError::bad_request)?;
    if call.changes() {
        asked.may_write()?;
        // A client that goes away, or an agent that dies, ends no call that the host has.
        state.audit.write(Record::begun(peer, note.clone(), "POST", "/v1/cim"));
    }
    let answer = state.blocking(move |_| {
        let text = serde_json::to_vec(&call.ask(&*cim)).map_err(|error| ProviderError::Failed {
            path: "the answer".into(),
            reason: format!("it cannot be written: {error}"),
        })?;
        // Given back only once the host has answered and the client has taken it, also where the client has gone.
        Ok((text, place))
    });
    let (text, place) = answer.await?;
    Ok(([(CONTENT_TYPE, "application/json")], held_body::hold(text, place)).into_response())
}

/// What is asked, for the audit log: the method with its class, or the class that is looked at.
fn name_of(call: &Call) -> String {
    match call {
        Call::Query { wql, .. } => format!("query {}", cim_scope::class_of(wql).unwrap_or("?")),
        Call::Get { path } => format!("get {}", path.class),
        Call::Associators { path, .. } => format!("associators {}", path.class),
        Call::References { path, .. } => format!("references {}", path.class),
        Call::Invoke { path, method, .. } => format!("{}.{method}", path.class),
    }
}

/// The object that it is about: the first one that a method is given, or the one that is asked.
fn object_of(call: &Call) -> Option<String> {
    let named = |path: &ObjectPath| {
        let names = ["Name", "InstanceID"].into_iter();
        names.filter_map(|key| path.keys.get(key)).next().cloned()
    };
    match call {
        Call::Query { .. } => None,
        Call::Get { path } | Call::Associators { path, .. } | Call::References { path, .. } => {
            named(path)
        }
        Call::Invoke { path, parameters, .. } => {
            let given = parameters.iter().flat_map(|(_, value)| value.elements());
            let given = given.filter_map(|value| match value {
                CimValue::Reference(path) => named(path),
                _ => None,
            });
            given.chain(named(path)).next()
        }
    }
}
