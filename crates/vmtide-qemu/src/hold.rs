//! Holding the guest still for a moment, and letting it go whatever happens.
//!
//! There are two holds: the guest agent freezes file systems, and the monitor pauses the
//! processors where several disks must show one moment. Both end when this value is dropped, and a
//! [`Guardian`] ends them when the process dies. The connection to the agent is closed while the
//! file systems are frozen, so that the guardian can reach it.

use crate::agent::{self, FreezeStatus, GuestAgent};
use crate::channel::Address;
use crate::guardian::Guardian;
use crate::qmp::{QmpClient, QmpError};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long one monitor command may take while the guest is held. A guest that stands still for
/// longer is noticed by its users and its cluster.
pub(crate) const MOMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// The file systems are thawed this long after freezing should have ended, even if the job hangs:
/// more than the moment can need.
const FREEZE_MARGIN: Duration = Duration::from_secs(30);

/// How long the job itself tries to thaw before it leaves that to the guardian.
const THAW_PATIENCE: Duration = Duration::from_secs(20);

/// The holds on one guest.
pub(crate) struct Hold {
    qmp: Arc<QmpClient>,
    agent: Option<Address>,
    guardian: Option<Guardian>,
    freeze_timeout: Duration,
    frozen: bool,
    paused_since: Option<Instant>,
}

impl Hold {
    /// Holds nothing yet. With `executable`, a guardian watches from now on; where it has to let the
    /// guest go after our end, it leaves `released_mark`.
    pub fn new(
        qmp: Arc<QmpClient>,
        agent: Option<Address>,
        executable: Option<&Path>,
        released_mark: &Path,
        freeze_timeout: Duration,
    ) -> Result<Self, String> {
        let guardian = match executable {
            Some(executable) => Some(Guardian::start(
                executable,
                qmp.address(),
                agent.as_ref(),
                released_mark,
                freeze_timeout + FREEZE_MARGIN,
            )?),
            None => None,
        };
        Ok(Self { qmp, agent, guardian, freeze_timeout, frozen: false, paused_since: None })
    }

    /// Whether there is an agent that answers and file systems that may be frozen; the error says
    /// what is in the way. Changes nothing.
    pub fn check_agent(&self) -> Result<(), String> {
        let address = self.agent.as_ref().ok_or(
            "the VM has no guest agent port: add a virtserialport named org.qemu.guest_agent.0, or give its socket",
        )?;
        let status = GuestAgent::connect(address, agent::SYNC_TIMEOUT)
            .and_then(|mut agent| agent.status())
            .map_err(|error| error.to_string())?;
        match status {
            FreezeStatus::Thawed => Ok(()),
            FreezeStatus::Frozen => {
                Err("the guest's file systems are already frozen by somebody else".into())
            }
        }
    }

    /// Freezes the guest's file systems; the error says why that was not possible, and then
    /// nothing is frozen as far as can be known.
    pub fn freeze(&mut self) -> Result<(), String> {
        let Some(address) = self.agent.clone() else {
            return self.check_agent();
        };
        self.tell("frozen")?;
        self.frozen = true;
        let outcome = GuestAgent::connect(&address, agent::SYNC_TIMEOUT)
            .and_then(|mut agent| agent.freeze(self.freeze_timeout));
        let outcome = match outcome {
            Ok(0) => Err("the guest agent froze no file system".to_owned()),
            Ok(count) => {
                tracing::debug!(count, "guest file systems frozen");
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        };
        if outcome.is_err() {
            // A freeze that failed or timed out may still have happened, in part or later.
            self.thaw()?;
        }
        outcome
    }

    /// Lets go of everything as well as can be done; answers whether all is let go.
    pub fn release(&mut self) -> bool {
        if let Err(error) = self.resume() {
            tracing::error!(%error, "the guest could not be resumed");
        }
        if let Err(error) = self.thaw() {
            tracing::error!(%error, "the guest could not be thawed");
        }
        self.paused_since.is_none() && !self.frozen
    }

    /// Whether the file systems are frozen now, for proof that they were during the moment.
    pub fn still_frozen(&self) -> Result<(), String> {
        let Some(address) = self.agent.as_ref().filter(|_| self.frozen) else {
            return Err("the file systems were not frozen".into());
        };
        let status = GuestAgent::connect(address, agent::SYNC_TIMEOUT)
            .and_then(|mut agent| agent.status())
            .map_err(|error| error.to_string())?;
        match status {
            FreezeStatus::Frozen => Ok(()),
            FreezeStatus::Thawed => Err("the guest ended its freeze too early".into()),
        }
    }

    /// Pauses the guest's processors. All writes it has sent are finished then.
    pub fn pause(&mut self) -> Result<(), QmpError> {
        // Without a guardian the pause still ends with this value.
        if let Err(error) = self.tell("paused") {
            tracing::warn!(%error, "pausing the guest without a guardian");
        }
        self.paused_since = Some(Instant::now());
        self.qmp.execute_within("stop", json!({}), MOMENT_TIMEOUT).map(drop)
    }

    /// Lets the processors run on; answers how long they stood still.
    pub fn resume(&mut self) -> Result<Option<Duration>, QmpError> {
        let Some(since) = self.paused_since else {
            return Ok(None);
        };
        self.qmp.execute_within("cont", json!({}), MOMENT_TIMEOUT)?;
        self.paused_since = None;
        if let Err(error) = self.tell("resumed") {
            tracing::warn!(%error, "after the pause");
        }
        Ok(Some(since.elapsed()))
    }

    /// Lets the file systems run on.
    pub fn thaw(&mut self) -> Result<(), String> {
        let Some(address) = self.agent.as_ref().filter(|_| self.frozen) else {
            return Ok(());
        };
        agent::thaw_with_patience(address, THAW_PATIENCE)
            .map_err(|error| format!("the guest's file systems may still be frozen: {error}"))?;
        self.frozen = false;
        self.tell("thawed")
    }

    /// Ends the guardian after everything was let go. An error where it had to step in, so that
    /// the moment cannot be trusted to have been held.
    pub fn finish(mut self) -> Result<(), String> {
        match self.guardian.take().map(Guardian::dismiss) {
            None | Some(Ok(false)) => Ok(()),
            Some(Ok(true)) => {
                Err("the freeze lasted too long and was ended by the guardian".into())
            }
            Some(Err(error)) => Err(error),
        }
    }

    fn tell(&mut self, word: &str) -> Result<(), String> {
        match &mut self.guardian {
            Some(guardian) => guardian.tell(word),
            None => Ok(()),
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let released = self.release();
        // A guardian that is still here sees its pipe end now and undoes what is left.
        if released
            && let Some(guardian) = self.guardian.take()
            && let Err(error) = guardian.dismiss()
        {
            tracing::debug!(error, "the guardian did not say goodbye");
        }
    }
}

/// Whether the guest runs, so that pausing or freezing it means anything.
pub(crate) fn is_running(qmp: &QmpClient) -> Result<bool, QmpError> {
    let status = qmp.query("query-status", Value::Object(serde_json::Map::new()))?;
    Ok(status["running"] == true)
}
