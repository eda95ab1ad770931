//! A client of the QEMU guest agent: asks the guest to bring its file systems to rest.
//!
//! The agent sits behind a serial port, so there is no connection to it and old answers may still
//! be in the pipe: every conversation begins with `guest-sync-delimited`, whose answer is marked
//! by a byte that cannot occur in JSON (QEMU, `docs/interop/qemu-ga-ref`, "guest-sync-delimited").
//! A guest without a running agent swallows commands silently, which shows as a timeout.

use crate::channel::{Address, ChannelError, LineChannel};
use crate::qmp::{milliseconds, one_line, shorten};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How long the agent may take to show that it is there.
pub const SYNC_TIMEOUT: Duration = Duration::from_secs(5);

/// How long freezing may take; file systems are flushed and freeze hooks run in it.
pub const FREEZE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long one try to thaw may take.
pub const THAW_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the guest agent could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The socket cannot be used.
    #[error("guest agent socket {address}: {detail}")]
    Connection {
        /// The socket.
        address: String,
        /// What was seen.
        detail: String,
    },
    /// The guest did not answer.
    #[error(
        "the guest agent behind {address} did not answer {command} within {timeout_ms} ms: is qemu-guest-agent installed and running in the guest?"
    )]
    Timeout {
        /// The socket.
        address: String,
        /// What was asked.
        command: String,
        /// How long was waited, in milliseconds.
        timeout_ms: u64,
    },
    /// The guest answered nonsense.
    #[error("the guest agent behind {address} answered unexpectedly: {detail}")]
    Protocol {
        /// The socket.
        address: String,
        /// What came.
        detail: String,
    },
    /// The agent refused.
    #[error("the guest agent refused {command}: {description}")]
    Refused {
        /// What was asked.
        command: String,
        /// The agent's text.
        description: String,
    },
}

/// The state of the guest's file systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezeStatus {
    /// Running.
    Thawed,
    /// At rest.
    Frozen,
}

/// A synchronised conversation with a guest agent.
pub struct GuestAgent {
    address: Address,
    channel: LineChannel,
}

impl GuestAgent {
    /// Connects and synchronises within `timeout`.
    ///
    /// # Errors
    /// [`AgentError::Connection`] where nobody listens, [`AgentError::Timeout`] where the guest
    /// does not answer.
    pub fn connect(address: &Address, timeout: Duration) -> Result<Self, AgentError> {
        let deadline = Instant::now() + timeout;
        let channel = LineChannel::connect(address, deadline).map_err(|error| {
            let detail = match error {
                ChannelError::Timeout => "it is held by another program".into(),
                other => other.to_string(),
            };
            AgentError::Connection { address: address.to_string(), detail }
        })?;
        let mut agent = Self { address: address.clone(), channel };
        agent.synchronise(deadline, timeout)?;
        Ok(agent)
    }

    fn synchronise(&mut self, deadline: Instant, timeout: Duration) -> Result<(), AgentError> {
        const SYNC: &str = "guest-sync-delimited";
        // Any number that an earlier conversation is unlikely to have used.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let id = now.map_or(7, |now| u64::from(now.subsec_nanos())) + 1;
        let mut request = vec![0xff];
        request.extend_from_slice(
            json!({"execute": SYNC, "arguments": {"id": id}}).to_string().as_bytes(),
        );
        request.push(b'\n');
        let fail = |error| channel_failure(&self.address, SYNC, timeout, error);
        self.channel.send(&request, deadline).map_err(fail)?;
        loop {
            self.channel.skip_past(0xff, deadline).map_err(fail)?;
            let line = self.channel.read_line(deadline).map_err(fail)?;
            let answer = serde_json::from_slice::<Value>(&line).unwrap_or_default();
            if answer["return"].as_u64() == Some(id) {
                return Ok(());
            }
        }
    }

    /// Whether the guest's file systems are frozen.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub fn status(&mut self) -> Result<FreezeStatus, AgentError> {
        let answer = self.call("guest-fsfreeze-status", SYNC_TIMEOUT)?;
        match answer.as_str() {
            Some("frozen") => Ok(FreezeStatus::Frozen),
            Some("thawed") => Ok(FreezeStatus::Thawed),
            _ => Err(self.unexpected(&answer)),
        }
    }

    /// Flushes and freezes the guest's file systems; answers with how many.
    ///
    /// # Errors
    /// Any [`AgentError`]. After any error the guest may still be or become frozen: thaw.
    pub fn freeze(&mut self, timeout: Duration) -> Result<u64, AgentError> {
        let answer = self.call("guest-fsfreeze-freeze", timeout)?;
        answer.as_u64().ok_or_else(|| self.unexpected(&answer))
    }

    /// Lets the guest's file systems run on; answers with how many were thawed. Harmless where
    /// none is frozen.
    ///
    /// # Errors
    /// Any [`AgentError`].
    pub fn thaw(&mut self) -> Result<u64, AgentError> {
        let answer = self.call("guest-fsfreeze-thaw", THAW_TIMEOUT)?;
        answer.as_u64().ok_or_else(|| self.unexpected(&answer))
    }

    fn call(&mut self, command: &str, timeout: Duration) -> Result<Value, AgentError> {
        let deadline = Instant::now() + timeout;
        let line = format!("{}\n", json!({"execute": command}));
        let fail = |error| channel_failure(&self.address, command, timeout, error);
        self.channel.send(line.as_bytes(), deadline).map_err(fail)?;
        let line = self.channel.read_line(deadline).map_err(fail)?;
        let mut answer: Value =
            serde_json::from_slice(&line).map_err(|_| AgentError::Protocol {
                address: self.address.to_string(),
                detail: shorten(&String::from_utf8_lossy(&line)),
            })?;
        if let Some(error) = answer.get("error") {
            return Err(AgentError::Refused {
                command: command.into(),
                description: one_line(error["desc"].as_str().unwrap_or("unknown error")),
            });
        }
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(self.unexpected(&answer)),
        }
    }

    fn unexpected(&self, answer: &Value) -> AgentError {
        AgentError::Protocol {
            address: self.address.to_string(),
            detail: shorten(&answer.to_string()),
        }
    }
}

fn channel_failure(
    address: &Address,
    command: &str,
    timeout: Duration,
    error: ChannelError,
) -> AgentError {
    match error {
        ChannelError::Timeout => AgentError::Timeout {
            address: address.to_string(),
            command: command.into(),
            timeout_ms: milliseconds(timeout),
        },
        other => AgentError::Connection { address: address.to_string(), detail: other.to_string() },
    }
}

/// Thaws the guest behind `address` in a conversation of its own, trying until it works or
/// `patience` is over.
///
/// # Errors
/// The last [`AgentError`].
pub(crate) fn thaw_with_patience(address: &Address, patience: Duration) -> Result<u64, AgentError> {
    let deadline = Instant::now() + patience;
    loop {
        let error = match GuestAgent::connect(address, SYNC_TIMEOUT).and_then(|mut a| a.thaw()) {
            Ok(count) => return Ok(count),
            Err(error) => error,
        };
        if Instant::now() >= deadline {
            return Err(error);
        }
        tracing::warn!(%error, "cannot thaw yet, trying again");
        std::thread::sleep(Duration::from_millis(200));
    }
}
