//! A freeze of an agent, kept alive until it is dropped.
//!
//! The agent ends a freeze that nobody uses, so that a client that died leaves nothing behind. A client that lives
//! but works elsewhere for a while, at a slow repository, renews it.

use crate::changes::Changes;
use crate::client::AgentClient;
use crate::device::AgentDisk;
use crate::keeper::Keeper;
use crate::resend::{TIME_TO_LIVE, WantedFreeze};
use crate::v1::{self, FreezeDisk, Place};
use crate::{AgentError, Result};
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
        let mut late = made.resent.then_some(wanted);
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
        keeper.start("agent-freeze", interval, move || {
            let transport = &client.shared().transport;
            let renewed = v1::renew_once(transport, &id, TIME_TO_LIVE);
            // Ends what a lost try made after all.
            if let Some(late) = late.take() {
                late.end_others(transport, &id, &CancelToken::new());
            }
            renewed
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
        if let Some(lost) = self.keeper.lost() {
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
