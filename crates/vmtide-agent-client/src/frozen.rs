//! A freeze of an agent, kept alive until it is dropped.
//!
//! The agent ends a freeze that nobody uses, so that a client that died leaves nothing behind. A client that lives
//! but works elsewhere for a while, at a slow repository, renews it.

use crate::changes::Changes;
use crate::client::AgentClient;
use crate::device::AgentDisk;
use crate::resend::{TIME_TO_LIVE, WantedFreeze};
use crate::v1::{self, FreezeDisk, Place};
use crate::{AgentError, Result};
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::time::Duration;
use vmtide_block::{BlockDevice, CancelToken};

/// Disks of an agent at one moment, which dropping it ends.
pub struct FrozenDisks {
    client: AgentClient,
    id: String,
    disks: Vec<FreezeDisk>,
    keeper: Arc<Keeper>,
    cancel: CancelToken,
}

#[derive(Default)]
struct Keeper {
    state: Mutex<KeeperState>,
    woken: Condvar,
}

#[derive(Default)]
struct KeeperState {
    ended: bool,
    lost: Option<String>,
}

impl FrozenDisks {
    pub(crate) fn new(
        client: &AgentClient,
        paths: &[String],
        cancel: &CancelToken,
    ) -> Result<Self> {
        let wanted = WantedFreeze::new(paths);
        let made = wanted.make(&client.shared().transport, cancel)?;
        let freeze = made.freeze;
        // A try that was lost may be working still.
        let late = made.resent.then_some(wanted);
        let keeper = Arc::new(Keeper::default());
        let interval = Duration::from_secs(freeze.ttl_seconds.clamp(6, TIME_TO_LIVE.as_secs()) / 6);
        let frozen = Self {
            client: client.clone(),
            id: freeze.id,
            disks: freeze.disks,
            keeper: Arc::clone(&keeper),
            cancel: cancel.clone(),
        };
        let (client, id) = (client.clone(), frozen.id.clone());
        // It ends by itself, at the latest when the request that it makes at the moment does: nobody waits for it.
        std::thread::Builder::new()
            .name("agent-freeze".into())
            .spawn(move || keeper.keep(&client, &id, interval, late))
            .map_err(|source| AgentError::Io {
                context: "start the thread that keeps a freeze".into(),
                source,
            })?;
        Ok(frozen)
    }

    /// The disks, in the order asked for.
    pub fn disks(&self) -> &[FreezeDisk] {
        &self.disks
    }

    /// The content of one, by its number.
    pub fn open(&self, number: usize) -> Option<Arc<dyn BlockDevice>> {
        let disk = self.disks.get(number)?;
        let place = Place::Frozen(self.id.clone(), number);
        let (path, cancel) = (disk.path.clone(), self.cancel.clone());
        Some(Arc::new(AgentDisk::new(
            self.client.clone(),
            path,
            Some(place),
            disk.size_bytes,
            cancel,
        )))
    }

    /// The ranges of one that changed from `id` to the moment, or why that is not known. It may name more.
    ///
    /// # Errors
    /// As [`AgentClient::changes`]; [`AgentError::NotFound`] where there is no such disk.
    pub fn changes(&self, number: usize, id: &str) -> Result<Changes> {
        let Some(disk) = self.disks.get(number) else {
            return Err(AgentError::NotFound {
                agent: self.client.agent().into(),
                code: String::new(),
                detail: format!("disk {number} of a freeze of {}", self.disks.len()),
            });
        };
        let place = Place::Frozen(self.id.clone(), number);
        v1::changes(&self.client.shared().transport, &place, id, disk.size_bytes, &self.cancel)
    }

    /// Whether the moment still stands.
    ///
    /// # Errors
    /// Where the agent ended it or cannot be asked.
    pub fn check(&self) -> Result<()> {
        if let Some(lost) = self.keeper.state.lock().lost.clone() {
            return Err(AgentError::Unreachable {
                agent: self.client.agent().into(),
                detail: lost,
            });
        }
        v1::renew(&self.client.shared().transport, &self.id, TIME_TO_LIVE, &self.cancel)
    }

    /// Ends the moment.
    ///
    /// # Errors
    /// Where the agent could not be told; it ends the freeze by itself then, some minutes later.
    pub fn end(self) -> Result<()> {
        if self.keeper.stop() {
            v1::end_freeze(&self.client.shared().transport, &self.id)
        } else {
            Ok(())
        }
    }
}

impl Drop for FrozenDisks {
    fn drop(&mut self) {
        if self.keeper.stop()
            && let Err(error) = v1::end_freeze(&self.client.shared().transport, &self.id)
        {
            tracing::debug!(%error, "a freeze is left to its expiry");
        }
    }
}

impl Keeper {
    /// Whether this was the call that stopped it.
    fn stop(&self) -> bool {
        let first = !std::mem::replace(&mut self.state.lock().ended, true);
        self.woken.notify_all();
        first
    }

    /// Renews the freeze `id`, and ends what a lost try of `late` made after all.
    fn keep(
        &self,
        client: &AgentClient,
        id: &str,
        interval: Duration,
        mut late: Option<WantedFreeze>,
    ) {
        let mut state = self.state.lock();
        while !state.ended {
            if !self.woken.wait_for(&mut state, interval).timed_out() {
                continue;
            }
            drop(state);
            let transport = &client.shared().transport;
            let renewed = v1::renew_once(transport, id, TIME_TO_LIVE);
            if let Some(late) = late.take() {
                late.end_others(transport, id, &CancelToken::new());
            }
            state = self.state.lock();
            match renewed {
                Ok(()) => {}
                Err(AgentError::NotFound { .. }) => {
                    state.lost = Some("the agent ended the freeze while it was read".into());
                    return;
                }
                // The next time is soon enough; readers notice for themselves when the agent is gone for good.
                Err(error) => tracing::debug!(%error, "a freeze could not be renewed"),
            }
        }
    }
}
