//! The requests of `/v1/vms`, which `docs/agent-protocol.md` describes.

use crate::contract::json;
use crate::resend::TIME_TO_LIVE;
use crate::transport::{Request, Transport, words};
use crate::tries::{Failure, random_bytes};
use crate::url::segment;
use crate::v1::to_json;
use crate::{AgentError, Result};
use http::Method;
use serde::Deserialize;
use std::time::{Duration, Instant};
use vmtide_block::CancelToken;
use vmtide_hypervisor::remote::{FreezeDocument, FreezeState, FreezeView};
use vmtide_hypervisor::{
    FreezeRequest, HealthCheck, HypervisorError, ReapReport, VmConfig, VmSelector, VmSummary,
};

/// The most of an answer that holds configurations: those of Hyper-V have files of some megabytes in them.
const MAX_BYTES: usize = 64 << 20;

/// How long the first and the longest wait is between two questions for how something stands. The agent does it
/// anyway; these are only how soon it is known.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// How often a wait looks whether the user wants to end.
const CANCEL_INTERVAL: Duration = Duration::from_millis(50);

#[derive(Deserialize)]
struct VmList {
    vms: Vec<VmSummary>,
}

#[derive(Deserialize)]
struct CheckList {
    checks: Vec<HealthCheck>,
}

/// The most checks that are shown; a host with 256 VMs of 8 disks has some 5000.
const MAX_CHECKS: usize = 10_000;

fn freeze_target(id: &str) -> String {
    format!("/v1/vms/freezes/{}", segment(id))
}

pub(crate) fn list(transport: &Transport, select: Option<&VmSelector>) -> Result<Vec<VmSummary>> {
    let target = match select {
        Some(selector) => format!("/v1/vms?select={}", segment(&selector.to_string())),
        None => "/v1/vms".to_owned(),
    };
    let request = Request::get(target).at_most(MAX_BYTES);
    let list: VmList = json(&transport.agent, &transport.document(&request, &CancelToken::new())?)?;
    Ok(list.vms)
}

pub(crate) fn config(transport: &Transport, vm: &str) -> Result<VmConfig> {
    let target = format!("/v1/vms/config?vm={}", segment(vm));
    let request = Request::get(target).at_most(MAX_BYTES);
    json(&transport.agent, &transport.document(&request, &CancelToken::new())?)
}

/// What an agent finds on its host; an older one has nothing to say.
pub(crate) fn health(transport: &Transport, vm: Option<&str>) -> Result<Vec<HealthCheck>> {
    let target = match vm {
        Some(vm) => format!("/v1/vms/health?vm={}", segment(vm)),
        None => "/v1/vms/health".to_owned(),
    };
    let request = Request::get(target).at_most(MAX_BYTES);
    let list: CheckList =
        json(&transport.agent, &transport.document(&request, &CancelToken::new())?)?;
    let clean = |check: HealthCheck| HealthCheck {
        name: words(&check.name),
        state: check.state,
        detail: words(&check.detail),
        mend: check.mend.as_deref().map(words),
    };
    Ok(list.checks.into_iter().take(MAX_CHECKS).map(clean).collect())
}

/// Has the agent remove what killed jobs left, and with `orphans` what carries our name and no job of its knows; an
/// older agent refuses that.
pub(crate) fn reap(transport: &Transport, orphans: bool) -> Result<ReapReport> {
    let target = if orphans { "/v1/vms/reap?orphans=true" } else { "/v1/vms/reap" };
    let request = Request::new(Method::POST, target);
    let mut report: ReapReport =
        json(&transport.agent, &transport.document(&request, &CancelToken::new())?)?;
    for line in report.removed.iter_mut().chain(&mut report.in_use).chain(&mut report.notes) {
        *line = words(line);
    }
    Ok(report)
}

/// Why a VM was not frozen.
pub(crate) enum FreezeFailed {
    /// The agent could not be asked, or refused the request.
    Agent(AgentError),
    /// The agent's platform said so.
    Platform(HypervisorError),
}

impl From<AgentError> for FreezeFailed {
    fn from(error: AgentError) -> Self {
        Self::Agent(error)
    }
}

/// Has the agent freeze a VM and waits until it is. A lost answer is asked for again under the same mark, so that
/// the VM is frozen once. Where this fails or is cancelled, the agent is told to give it up.
pub(crate) fn freeze(
    transport: &Transport,
    request: &FreezeRequest,
) -> Result<FreezeView, FreezeFailed> {
    let token = random_bytes::<16>().iter().map(|byte| format!("{byte:02x}")).collect();
    let document = FreezeDocument::new(request, token, TIME_TO_LIVE.as_secs());
    let post = Request::new(Method::POST, "/v1/vms/freezes")
        .body("application/json", to_json(&transport.agent, &document)?)
        .at_most(MAX_BYTES);
    let began: FreezeView = json(&transport.agent, &transport.document(&post, &request.cancel)?)?;
    let id = began.id.clone();
    let frozen = wait(transport, began, |state| state != FreezeState::Freezing, &request.cancel);
    match frozen {
        Ok(view) if view.state == FreezeState::Frozen => Ok(view),
        Ok(view) => {
            let error = view.error.map(vmtide_hypervisor::ErrorReport::into_error);
            Err(FreezeFailed::Platform(error.unwrap_or_else(|| {
                let notes = words(&view.notes.join("; "));
                HypervisorError::failed(format!("freezing {}", request.vm), notes)
            })))
        }
        Err(error) => {
            give_up(transport, &id);
            Err(error.into())
        }
    }
}

/// Asks how a freeze stands until it stands as wanted.
fn wait(
    transport: &Transport,
    mut view: FreezeView,
    is_wanted: impl Fn(FreezeState) -> bool,
    cancel: &CancelToken,
) -> Result<FreezeView> {
    let request = Request::get(freeze_target(&view.id)).at_most(MAX_BYTES);
    let mut pause = FIRST_WAIT;
    while !is_wanted(view.state) || view.state == FreezeState::Frozen && view.moment.is_none() {
        let until = Instant::now() + pause;
        while Instant::now() < until {
            cancel.check().map_err(|_| AgentError::Cancelled)?;
            std::thread::sleep(
                CANCEL_INTERVAL.min(until.saturating_duration_since(Instant::now())),
            );
        }
        pause = pause.saturating_mul(2).min(LONGEST_WAIT);
        view = json(&transport.agent, &transport.document(&request, cancel)?)?;
    }
    Ok(view)
}

/// What is next for a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Seal,
    Commit,
    Abort,
}

/// Takes a step of a freeze and waits until it is done.
pub(crate) fn take(transport: &Transport, id: &str, step: Step) -> Result<FreezeView> {
    let request = match step {
        Step::Seal => Request::new(Method::POST, format!("{}/seal", freeze_target(id))),
        Step::Commit => Request::new(Method::POST, format!("{}/commit", freeze_target(id))),
        Step::Abort => Request::new(Method::DELETE, freeze_target(id)),
    };
    // Whoever interrupts the job does not want a VM left frozen.
    let cancel = CancelToken::new();
    let began = json(&transport.agent, &transport.document(&request, &cancel)?)?;
    wait(transport, began, |state| !state.is_passing(), &cancel)
}

/// Tells the agent once that a freeze is not wanted any more; it gives it up by itself otherwise.
pub(crate) fn give_up(transport: &Transport, id: &str) {
    if let Err(error) = transport.once(&Request::new(Method::DELETE, freeze_target(id))) {
        tracing::debug!(%error, "a freeze of a VM is left to its expiry");
    }
}

pub(crate) fn renew_once(transport: &Transport, id: &str) -> Result<()> {
    let body = format!("{{\"ttl_seconds\":{}}}", TIME_TO_LIVE.as_secs());
    let request = Request::new(Method::PUT, freeze_target(id)).body("application/json", body);
    let view: FreezeView = json(&transport.agent, &transport.once(&request)?)?;
    match view.state {
        FreezeState::Frozen | FreezeState::Sealing | FreezeState::Sealed => Ok(()),
        state => Err(AgentError::NotFound {
            agent: transport.agent.clone(),
            code: "wrong_state".into(),
            detail: format!("the freeze is {state:?}"),
        }),
    }
}

pub(crate) fn check(transport: &Transport, id: &str, cancel: &CancelToken) -> Result<()> {
    let request = Request::get(format!("{}/check", freeze_target(id)));
    // What a moment has lost does not come back.
    let checked = transport.persist(cancel, |_| {
        transport.attempt(&request, cancel).map_err(|failure| match failure.error.code() {
            "moment_lost" => Failure::last(failure.error),
            _ => failure,
        })
    });
    checked.map(drop)
}
