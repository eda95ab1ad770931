//! A disk of an agent as a block device.

use crate::client::AgentClient;
use crate::url::readable;
use crate::v1::{self, Place};
use crate::{AgentError, contract};
use vmtide_block::{
    BlockDevice, BlockError, ByteRange, CancelToken, Extent, ExtentKind, is_zero, push_extent,
};

/// How much is read to see whether zeros lie ahead.
const PROBE_BYTES: usize = 64 << 10;

/// How much is called data at once where they do not. Smaller ones cost a request each, larger ones hide holes.
const DATA_BYTES: u64 = 64 << 20;

/// What is shorter is read as soon as asked about: jobs read 4 MiB at a time.
const PROBED_BYTES: u64 = 4 << 20;

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

    /// How many bytes from the beginning of `range` are zeros; 0 also where that cannot be told.
    fn zeros_ahead(&self, place: &Place, range: ByteRange) -> Result<u64, BlockError> {
        let mut beginning = [0; PROBE_BYTES];
        self.read_at(&mut beginning, range.offset)?;
        if !is_zero(&beginning) {
            return Ok(0);
        }
        let shared = self.client.shared();
        let _slot = shared.slot();
        match shared
            .transport
            .block_on(&self.cancel, v1::zeros_ahead(&shared.transport, place, range))
        {
            Some(Ok(zeros)) => Ok(zeros),
            // Reading will show what is wrong; until then it is data.
            Some(Err(failure)) => {
                tracing::debug!(error = %failure.error, "how much of a disk is zeros could not be asked");
                Ok(0)
            }
            None => Err(BlockError::Cancelled),
        }
    }

    /// A moment that is gone is no disk that never was.
    fn explained(&self, error: AgentError) -> AgentError {
        match (error, &self.place) {
            (
                AgentError::NotFound { agent, detail, .. },
                Some(Place::Frozen(..) | Place::FrozenVm(..)),
            ) => {
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

    /// Where the beginning is data, a stretch is called data without asking further. Where it is zeros, there are
    /// probably more: the agent then tells how many before it comes to data, and sends none of that data.
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, BlockError> {
        self.check_range(range)?;
        let data = ByteRange::new(range.offset, range.length.min(DATA_BYTES));
        let zeros = match &self.place {
            Some(place) if range.length > PROBED_BYTES => self.zeros_ahead(place, range)?,
            _ => 0,
        };
        let mut extents = Vec::new();
        push_extent(
            &mut extents,
            match zeros {
                0 => Extent { range: data, kind: ExtentKind::Data },
                zeros => {
                    Extent { range: ByteRange::new(range.offset, zeros), kind: ExtentKind::Zero }
                }
            },
        );
        Ok(extents)
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
