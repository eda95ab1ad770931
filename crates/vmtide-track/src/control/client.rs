//! The side that asks.

use super::protocol::{Answer, MAX_ANSWER_BYTES, MAX_ITEMS, Request, receive, send};
use super::remote::{HeldFreeze, RemoteDisk};
use super::socket::{connect, socket_path};
use crate::changes::ChangePage;
use crate::{Result, TrackError, TrackingState};
use parking_lot::Mutex;
use std::io::{self, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmtide_block::ByteRange;

/// How long an answer may take: sealing waits for writes under way and for the medium.
const PATIENCE: Duration = Duration::from_secs(120);

/// One connection to a host.
pub(super) struct Connection {
    stream: BufReader<UnixStream>,
    disk: String,
    /// Something failed in the middle of a message: what comes next is not known.
    broken: bool,
}

impl Connection {
    /// Connects to the host of the image at `path`; none where it has none.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let disk = path.display().to_string();
        let failed = |error| TrackError::io(format!("ask the process that hosts {disk}"), error);
        let Some(stream) = connect(&socket_path(path)).map_err(failed)? else {
            return Ok(None);
        };
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        Ok(Some(Self { stream: BufReader::new(stream), disk, broken: false }))
    }

    /// Asks, and waits for the answer.
    pub fn ask(&mut self, request: &Request) -> Result<Answer> {
        self.tell(request)?;
        self.next()
    }

    /// Asks without waiting.
    pub fn tell(&mut self, request: &Request) -> Result<()> {
        send(self.stream.get_mut(), request).map_err(|error| self.lost(error))
    }

    /// Waits for an answer.
    pub fn next(&mut self) -> Result<Answer> {
        let answer = receive(&mut self.stream, MAX_ANSWER_BYTES);
        let answer = answer.and_then(|answer: Option<Answer>| {
            answer.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        });
        answer.map_err(|error| self.lost(error))?.check(&self.disk)
    }

    /// The bytes behind an answer.
    pub fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.stream.read_exact(buffer).map_err(|error| self.lost(error))
    }

    /// Whether it must not be used any more.
    pub const fn is_broken(&self) -> bool {
        self.broken
    }

    fn lost(&mut self, error: io::Error) -> TrackError {
        self.broken = true;
        TrackError::io(format!("ask the process that hosts {}", self.disk), error)
    }

    /// The error for an answer to another question.
    pub fn confused(&mut self) -> TrackError {
        self.lost(io::Error::new(
            io::ErrorKind::InvalidData,
            "it gave another answer than was asked for",
        ))
    }
}

/// The process that hosts an image, over its socket. Calls take turns.
pub struct RemoteHost {
    path: PathBuf,
    connection: Mutex<Connection>,
}

impl RemoteHost {
    /// Connects to the host of the image at `path`; none where nobody hosts it.
    ///
    /// # Errors
    /// [`TrackError::Io`] where there is a host and it cannot be reached.
    pub fn connect(path: &Path) -> Result<Option<Self>> {
        let connection = Connection::open(path)?;
        Ok(connection
            .map(|connection| Self { path: path.to_owned(), connection: Mutex::new(connection) }))
    }

    /// As [`TrackedDisk::state`](crate::TrackedDisk::state).
    ///
    /// # Errors
    /// [`TrackError::Io`] where the host has gone.
    pub fn state(&self) -> Result<TrackingState> {
        let mut connection = self.connection.lock();
        match connection.ask(&Request::State)? {
            Answer::State(state) => Ok(state),
            _ => Err(connection.confused()),
        }
    }

    /// As [`TrackedDisk::checkpoint`](crate::TrackedDisk::checkpoint).
    ///
    /// # Errors
    /// As there.
    pub fn checkpoint(&self) -> Result<String> {
        let mut connection = self.connection.lock();
        match connection.ask(&Request::Checkpoint)? {
            Answer::Id(id) => Ok(id),
            _ => Err(connection.confused()),
        }
    }

    /// As [`TrackedDisk::changes_since`](crate::TrackedDisk::changes_since), with at most 16 Ki ranges.
    ///
    /// # Errors
    /// As there.
    pub fn changes_since(
        &self,
        id: &str,
        range: ByteRange,
        max_ranges: usize,
    ) -> Result<ChangePage> {
        let max_ranges = u32::try_from(max_ranges.clamp(1, MAX_ITEMS)).unwrap_or(1);
        if id.len() > crate::id::MAX_ID_CHARACTERS {
            return Err(TrackError::unknown_id(&self.path.display().to_string(), id));
        }
        let ByteRange { offset, length } = range;
        let request = Request::Changes { id: id.to_owned(), offset, length, max_ranges };
        let mut connection = self.connection.lock();
        let Answer::Changes { ranges, processed_bytes } = connection.ask(&request)? else {
            return Err(connection.confused());
        };
        let ranges: Vec<_> =
            ranges.into_iter().map(|(offset, length)| ByteRange::new(offset, length)).collect();
        let mut at = offset;
        let in_order = ranges.iter().all(|changed| {
            let sound = changed.offset >= at && changed.end() <= range.end() && !changed.is_empty();
            at = changed.end();
            sound
        });
        if !in_order || processed_bytes > length || (processed_bytes == 0 && length > 0) {
            return Err(connection.confused());
        }
        Ok(ChangePage { ranges, processed_bytes })
    }

    /// As [`TrackedDisk::enable`](crate::TrackedDisk::enable) and [`disable`](crate::TrackedDisk::disable).
    ///
    /// # Errors
    /// As there.
    pub fn set_enabled(&self, enabled: bool) -> Result<()> {
        let mut connection = self.connection.lock();
        match connection.ask(&Request::SetEnabled(enabled))? {
            Answer::Done => Ok(()),
            _ => Err(connection.confused()),
        }
    }

    /// The disk as it is at this moment.
    ///
    /// # Errors
    /// As [`TrackedDisk::freeze`](crate::TrackedDisk::freeze).
    pub fn freeze(self) -> Result<RemoteDisk> {
        let mut connection = self.connection.into_inner();
        let answer = connection.ask(&Request::Freeze { hold: false })?;
        RemoteDisk::of(&self.path, connection, answer)
    }

    /// As [`freeze`](Self::freeze), in two steps: writes are held when this returns, for 10 s at most.
    pub(crate) fn freeze_held(self) -> Result<HeldFreeze> {
        let mut connection = self.connection.into_inner();
        match connection.ask(&Request::Freeze { hold: true })? {
            Answer::Done => Ok(HeldFreeze::new(&self.path, connection)),
            _ => Err(connection.confused()),
        }
    }

    /// The disk as it changes, for reading.
    ///
    /// # Errors
    /// [`TrackError::Io`] where the host has gone.
    pub fn open(self) -> Result<RemoteDisk> {
        let mut connection = self.connection.into_inner();
        let answer = connection.ask(&Request::Open)?;
        RemoteDisk::of(&self.path, connection, answer)
    }
}
