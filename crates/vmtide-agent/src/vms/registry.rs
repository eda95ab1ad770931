//! All freezes of VMs of an agent: begun, found, ended, and given up when nobody asks for them any more.

use super::Admission;
use super::freeze::{Step, VmDiskUse, VmFreeze};
use crate::limits::Limits;
use crate::transfers::random_id;
use parking_lot::Mutex;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use thiserror::Error;
use vmtide_block::{CancelToken, RangeSet};
use vmtide_hypervisor::remote::{FreezeDocument, FreezeState, FreezeView};
use vmtide_hypervisor::{FreezeRequest, FrozenVm, Hypervisor, HypervisorError, Result, VmConfig};

/// How often it is looked which freezes have expired.
const REAP_INTERVAL: Duration = Duration::from_secs(1);
/// How many freezes that ended are remembered, so that a client whose answer was lost can ask again.
const REMEMBERED: usize = 256;

/// Why no freeze was begun.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BeginError {
    /// The request is none.
    #[error("{0}")]
    Request(String),
    /// Another request with this mark was there.
    #[error("client_token: this one was used for another freeze")]
    TokenUsed,
    /// This client has as many as it may.
    #[error("this key holds {limit} freezes of VMs, as many as it may: end one")]
    Client {
        /// The limit.
        limit: usize,
    },
    /// All clients together have.
    #[error("the agent holds {limit} freezes of VMs, as many as it does: ask again later")]
    Agent {
        /// The limit.
        limit: usize,
    },
}

/// Why a freeze is not ended as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EndError {
    /// There is none.
    #[error("there is no such freeze")]
    Unknown,
    /// It is in a state that does not go with this end.
    #[error("the freeze is {0:?}")]
    State(FreezeState),
}

/// All freezes of VMs of an agent.
pub struct VmFreezes {
    hypervisor: Arc<dyn Hypervisor>,
    per_client: usize,
    total: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The oldest first, ended ones among them.
    freezes: Vec<Arc<VmFreeze>>,
    reaper_runs: bool,
}

impl VmFreezes {
    /// None yet.
    pub fn new(hypervisor: Arc<dyn Hypervisor>, limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            hypervisor,
            per_client: limits.freezes_per_client,
            total: limits.freezes_total,
            state: Mutex::default(),
        })
    }

    /// How many have not ended.
    pub fn held(&self) -> usize {
        self.state.lock().freezes.iter().filter(|freeze| !freeze.state().is_final()).count()
    }

    /// Begins a freeze, on a thread of its own. The same request again, by its mark, answers with the freeze that it
    /// began the first time, however that stands. The second part says whether it is a new one. Inside of a tokio
    /// runtime, where the reaper runs.
    ///
    /// # Errors
    /// [`BeginError`].
    pub fn begin(
        self: &Arc<Self>,
        client: &Arc<str>,
        document: FreezeDocument,
        ttl_seconds: u64,
        admission: Admission,
    ) -> Result<(FreezeView, bool), BeginError> {
        let cancel = CancelToken::new();
        let request = document.request(cancel.clone()).map_err(BeginError::Request)?;
        let mut state = self.state.lock();
        let is_known = |freeze: &&Arc<VmFreeze>| {
            freeze.client == *client && freeze.document.client_token == document.client_token
        };
        if let Some(known) = state.freezes.iter().find(is_known) {
            if known.document != document {
                return Err(BeginError::TokenUsed);
            }
            known.touch(None);
            return Ok((known.view(true), false));
        }
        self.check_limits(&state, client)?;
        let freeze = VmFreeze::new(random_id(), Arc::clone(client), document, ttl_seconds, cancel);
        let freeze = Arc::new(freeze);
        state.freezes.push(Arc::clone(&freeze));
        forget_oldest(&mut state);
        if !std::mem::replace(&mut state.reaper_runs, true) {
            drop(tokio::spawn(reap(Arc::downgrade(self))));
        }
        drop(state);
        self.start(&freeze, request, admission);
        Ok((freeze.view(false), true))
    }

    fn check_limits(&self, state: &State, client: &Arc<str>) -> Result<(), BeginError> {
        let held = state.freezes.iter().filter(|freeze| !freeze.state().is_final());
        let clients: Vec<_> = held.map(|freeze| &freeze.client).collect();
        if clients.len() >= self.total {
            return Err(BeginError::Agent { limit: self.total });
        }
        if clients.iter().filter(|other| **other == client).count() >= self.per_client {
            return Err(BeginError::Client { limit: self.per_client });
        }
        Ok(())
    }

    fn start(&self, freeze: &Arc<VmFreeze>, request: FreezeRequest, admission: Admission) {
        let hypervisor = Arc::clone(&self.hypervisor);
        let made = Arc::clone(freeze);
        let work = move || {
            let freezing = AssertUnwindSafe(|| freeze_vm(&*hypervisor, &request, &admission));
            made.made(catch_unwind(freezing).unwrap_or_else(|_| Err(failed_inside())));
        };
        if let Err(error) = std::thread::Builder::new().name("vm-freeze".into()).spawn(work) {
            freeze.made(Err(HypervisorError::io("start a thread", error)));
        }
    }

    fn get(&self, client: &str, id: &str) -> Option<Arc<VmFreeze>> {
        let state = self.state.lock();
        let is_it = |freeze: &&Arc<VmFreeze>| freeze.id == id && &*freeze.client == client;
        state.freezes.iter().find(is_it).map(Arc::clone)
    }

    /// Those of a client, the oldest first, with those that ended and are remembered.
    pub fn of_client(&self, client: &str) -> Vec<FreezeView> {
        let state = self.state.lock();
        let own = state.freezes.iter().filter(|freeze| &*freeze.client == client);
        own.map(|freeze| freeze.view(false)).collect()
    }

    /// One of a client; that it is asked for keeps it alive.
    pub fn find(&self, client: &str, id: &str) -> Option<FreezeView> {
        let freeze = self.get(client, id)?;
        freeze.touch(None);
        Some(freeze.view(true))
    }

    /// Begins the life of a freeze of a client anew, with another time to live where one is given.
    pub fn renew(&self, client: &str, id: &str, ttl_seconds: Option<u64>) -> Option<FreezeView> {
        let freeze = self.get(client, id)?;
        freeze.touch(ttl_seconds);
        Some(freeze.view(false))
    }

    /// Has the platform name the moment of a freeze of a client for good: all was read. Again, it answers with how that
    /// stands.
    ///
    /// # Errors
    /// [`EndError`].
    pub fn seal(&self, client: &str, id: &str) -> Result<FreezeView, EndError> {
        self.step(client, id, Step::Seal)
    }

    /// Commits a freeze of a client: its restore point is safe. Again, it answers with how that stands.
    ///
    /// # Errors
    /// [`EndError`].
    pub fn commit(&self, client: &str, id: &str) -> Result<FreezeView, EndError> {
        self.step(client, id, Step::Commit)
    }

    /// Gives up a freeze of a client, also one that is being made. Again, it answers with how that stands.
    ///
    /// # Errors
    /// [`EndError`].
    pub fn abort(&self, client: &str, id: &str) -> Result<FreezeView, EndError> {
        self.step(client, id, Step::Abort)
    }

    fn step(&self, client: &str, id: &str, step: Step) -> Result<FreezeView, EndError> {
        let freeze = self.get(client, id).ok_or(EndError::Unknown)?;
        take_step(&freeze, step).map_err(EndError::State)?;
        Ok(freeze.view(false))
    }

    /// Whether the disks of a freeze of a client have shown the one moment up to now; none where it is not frozen.
    /// Blocks.
    pub fn check(&self, client: &str, id: &str) -> Option<Result<()>> {
        self.get(client, id)?.check()
    }

    /// Uses a disk of a freeze of a client.
    pub fn use_disk(&self, client: &str, id: &str, index: usize) -> Option<VmDiskUse> {
        self.get(client, id)?.use_disk(index)
    }

    /// What may differ from the base on a disk of a freeze of a client, and the disk's size; the inner none for
    /// everything.
    pub fn changes(
        &self,
        client: &str,
        id: &str,
        index: usize,
    ) -> Option<(Option<Arc<RangeSet>>, u64)> {
        self.get(client, id)?.changes(index)
    }

    /// Gives up what has expired. Answers how many have not ended.
    fn reap(&self) -> usize {
        let now = Instant::now();
        let mut state = self.state.lock();
        let expired: Vec<_> =
            state.freezes.iter().filter(|freeze| freeze.has_expired(now)).map(Arc::clone).collect();
        let held = state.freezes.iter().filter(|freeze| !freeze.state().is_final()).count();
        if held == 0 {
            state.reaper_runs = false;
        }
        drop(state);
        for freeze in expired {
            tracing::info!(freeze = freeze.id, client = %freeze.client, "a freeze of a VM has expired");
            freeze
                .note("it was given up by the agent, because nobody asked for it any more".into());
            // Whoever was faster has ended it.
            let _ = take_step(&freeze, Step::Abort);
        }
        held
    }
}

/// Freezes a VM that may be frozen.
fn freeze_vm(
    hypervisor: &dyn Hypervisor,
    request: &FreezeRequest,
    admission: &Admission,
) -> Result<Box<dyn FrozenVm>> {
    let admit = |config: &VmConfig| {
        let admitted = match admission(config, &request.exclude) {
            // A file that is gone may be one of a checkpoint that was merged meanwhile: what is there now counts.
            Err(HypervisorError::NotFound { .. }) => {
                admission(&hypervisor.describe(&request.vm)?, &request.exclude)
            }
            admitted => admitted,
        };
        admitted.map_err(|error| match error {
            HypervisorError::NotFound { what, detail } => HypervisorError::Denied { what, detail },
            error => error,
        })
    };
    // Before anything is made there, and again for what was made: a VM may be given other disks meanwhile.
    admit(&hypervisor.describe(&request.vm)?)?;
    let frozen = hypervisor.freeze(request)?;
    match admit(frozen.config()) {
        Ok(()) => Ok(frozen),
        Err(refused) => {
            if let Err(error) = frozen.abort() {
                tracing::warn!(vm = request.vm, %error, "a freeze that was refused left something");
            }
            Err(refused)
        }
    }
}

fn take_step(freeze: &Arc<VmFreeze>, step: Step) -> Result<(), FreezeState> {
    if !freeze.begin_step(step)? {
        return Ok(());
    }
    let finished = Arc::clone(freeze);
    let work = move || {
        if catch_unwind(AssertUnwindSafe(|| finished.finish(step))).is_err() {
            finished.failed(step, failed_inside());
        }
    };
    if let Err(error) = std::thread::Builder::new().name("vm-freeze-end".into()).spawn(work) {
        freeze.failed(step, HypervisorError::io("start a thread", error));
    }
    Ok(())
}

fn failed_inside() -> HypervisorError {
    HypervisorError::failed("the request", "it failed inside the agent; its log says more")
}

/// Keeps the memory of ended freezes bounded.
fn forget_oldest(state: &mut State) {
    let ended = state.freezes.iter().filter(|freeze| freeze.state().is_final()).count();
    for _ in REMEMBERED..ended {
        if let Some(at) = state.freezes.iter().position(|freeze| freeze.state().is_final()) {
            drop(state.freezes.remove(at));
        }
    }
}

async fn reap(freezes: Weak<VmFreezes>) {
    loop {
        tokio::time::sleep(REAP_INTERVAL).await;
        match freezes.upgrade() {
            Some(freezes) if freezes.reap() > 0 => {}
            _ => return,
        }
    }
}
