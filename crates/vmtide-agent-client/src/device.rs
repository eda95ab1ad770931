//! A disk of an agent as a block device.

use crate::client::AgentClient;
use crate::url::readable;
use crate::v1::{self, Place};
use crate::{AgentError, contract};
use vmtide_block::{BlockDevice, BlockError, ByteRange, CancelToken};

/// A disk of an agent, for reading. Every reader has a connection of its own, up to a bound; what is lost on the way
/// is asked for again from where it broke off.
pub struct AgentDisk {
    client: AgentClient,
    path: String,
    /// Where `/v1` has the content; none where only the contract has it.
    place: Option<Place>,
    size_bytes: u64,
    cancel: CancelToken,
}

impl AgentDisk {
    pub(crate) fn new(
        client: AgentClient,
        path: String,
        place: Option<Place>,
        size_bytes: u64,
        cancel: CancelToken,
    ) -> Self {
        Self { client, path, place, size_bytes, cancel }
    }

    /// The disk's path on its host.
    pub fn path(&self) -> &str {
        &self.path
    }

    pub(crate) const fn client(&self) -> &AgentClient {
        &self.client
    }

    pub(crate) const fn cancel(&self) -> &CancelToken {
        &self.cancel
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), AgentError> {
        let shared = self.client.shared();
        let transport = &shared.transport;
        let _slot = shared.slot();
        let mut tries = transport.tries();
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            self.cancel.check().map_err(|_| AgentError::Cancelled)?;
            let at = offset + done as u64;
            let tried = transport.block_on(&self.cancel, async {
                match &self.place {
                    Some(place) => v1::read(transport, place, shared.compress, rest, at).await,
                    None => contract::read(transport, &self.path, rest, at).await,
                }
            });
            let Some((read, outcome)) = tried else { return Err(AgentError::Cancelled) };
            if read > 0 {
                // It goes on: patience begins anew.
                tries = transport.tries();
                done += read;
            }
            if let Err(failure) = outcome {
                transport
                    .again(&mut tries, failure, &self.cancel)
                    .map_err(|error| self.explained(error))?;
            }
        }
        Ok(())
    }

    /// A moment that is gone is no disk that never was.
    fn explained(&self, error: AgentError) -> AgentError {
        match (error, &self.place) {
            (AgentError::NotFound { agent, detail, .. }, Some(Place::Frozen(..))) => {
                let detail = format!(
                    "the moment that was read is gone, because the agent was started anew or it ended: {detail}"
                );
                AgentError::Unreachable { agent, detail }
            }
            (error, _) => error,
        }
    }
}

impl BlockDevice for AgentDisk {
    fn name(&self) -> String {
        let path = readable(&self.path);
        format!("{}/{}", self.client.agent(), path.strip_prefix('/').unwrap_or(&path))
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), BlockError> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        self.read(buffer, offset).map_err(|error| in_context(error, &self.name(), offset))
    }
}

/// The error with the place where it happened.
pub(crate) fn in_context(error: AgentError, name: &str, offset: u64) -> BlockError {
    match BlockError::from(error) {
        BlockError::Io { source, .. } => BlockError::io(format!("{name} at byte {offset}"), source),
        other => other,
    }
}
