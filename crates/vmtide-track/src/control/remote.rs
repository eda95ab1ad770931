//! A disk that another process of this host has open, for reading.

use super::client::Connection;
use super::protocol::{Answer, MAX_READ_BYTES, Request};
use crate::{Result, TrackError};
use parking_lot::{Condvar, Mutex};
use std::path::{Path, PathBuf};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Extent};

/// The most connections for reading one disk: as many as a host reads with at once.
const MAX_CONNECTIONS: usize = 4;

/// A disk whose writes are held by its host until the word is given.
pub(crate) struct HeldFreeze {
    path: PathBuf,
    connection: Connection,
}

impl HeldFreeze {
    pub(super) fn new(path: &Path, connection: Connection) -> Self {
        Self { path: path.to_owned(), connection }
    }

    /// Lets the writes go on.
    pub fn release(&mut self) -> Result<()> {
        self.connection.tell(&Request::Resume)
    }

    /// After [`release`](Self::release): the disk as it was while writes were held, once its id is durable.
    pub fn finish(mut self) -> Result<RemoteDisk> {
        let answer = self.connection.next()?;
        RemoteDisk::of(&self.path, self.connection, answer)
    }
}

/// A disk that another process of this host has open, for reading: at a moment, or as it changes. Dropping it
/// ends the moment.
///
/// Up to four reads are under way at once; further ones wait.
pub struct RemoteDisk {
    path: PathBuf,
    token: String,
    size_bytes: u64,
    block_size_bytes: u32,
    id: Option<String>,
    pool: Mutex<Pool>,
    returned: Condvar,
}

/// The connections. While there is any, the host keeps the view.
struct Pool {
    free: Vec<Connection>,
    made: usize,
}

impl RemoteDisk {
    pub(super) fn of(path: &Path, mut connection: Connection, answer: Answer) -> Result<Self> {
        let Answer::View { token, size_bytes, block_size_bytes, id } = answer else {
            return Err(connection.confused());
        };
        Ok(Self {
            path: path.to_owned(),
            token,
            size_bytes,
            block_size_bytes,
            id,
            pool: Mutex::new(Pool { free: vec![connection], made: 1 }),
            returned: Condvar::new(),
        })
    }

    /// The tracking id of the moment; none where the disk is not tracked, or was not frozen.
    pub fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// Does `work` with a connection that nobody else uses meanwhile. One that failed is not used again.
    fn with<T>(&self, work: impl FnOnce(&mut Connection) -> Result<T>) -> Result<T> {
        let mut connection = self.take()?;
        let done = work(&mut connection);
        let mut pool = self.pool.lock();
        // An error of the disk leaves the connection as it was; one of the connection does not.
        match &done {
            Err(TrackError::Io { .. }) if connection.is_broken() => pool.made -= 1,
            _ => pool.free.push(connection),
        }
        drop(pool);
        self.returned.notify_one();
        done
    }

    fn take(&self) -> Result<Connection> {
        let mut pool = self.pool.lock();
        loop {
            if let Some(connection) = pool.free.pop() {
                return Ok(connection);
            }
            if pool.made < MAX_CONNECTIONS {
                break;
            }
            self.returned.wait(&mut pool);
        }
        pool.made += 1;
        drop(pool);
        let opened = self.attach();
        if opened.is_err() {
            self.pool.lock().made -= 1;
            self.returned.notify_one();
        }
        opened
    }

    fn attach(&self) -> Result<Connection> {
        let gone = || {
            TrackError::io(
                format!("read {}", self.path.display()),
                std::io::Error::new(
                    std::io::ErrorKind::ConnectionAborted,
                    "the process that hosted it has ended",
                ),
            )
        };
        let mut connection = Connection::open(&self.path)?.ok_or_else(gone)?;
        match connection.ask(&Request::Attach { token: self.token.clone() })? {
            Answer::View { .. } => Ok(connection),
            _ => Err(connection.confused()),
        }
    }
}

impl BlockDevice for RemoteDisk {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn block_size_bytes(&self) -> u32 {
        self.block_size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        let mut at = offset;
        for piece in buffer.chunks_mut(usize::try_from(MAX_READ_BYTES).unwrap_or(usize::MAX)) {
            let length = u32::try_from(piece.len()).unwrap_or(MAX_READ_BYTES);
            self.with(|connection| {
                match connection.ask(&Request::Read { offset: at, length })? {
                    Answer::Data { length: got } if got == length => connection.fill(piece),
                    _ => Err(connection.confused()),
                }
            })?;
            at += u64::from(length);
        }
        Ok(())
    }

    fn extents(&self, range: ByteRange) -> vmtide_block::Result<Vec<Extent>> {
        self.check_range(range)?;
        let ByteRange { offset, length } = range;
        let answer = self.with(|connection| {
            match connection.ask(&Request::Extents { offset, length })? {
                Answer::Extents { extents } => Ok(extents),
                _ => Err(connection.confused()),
            }
        })?;
        let mut at = offset;
        let mut extents = Vec::with_capacity(answer.len());
        for (offset, length, kind) in answer {
            if offset != at || length == 0 || length > range.end() - at {
                return Err(BlockError::damaged(
                    self.name(),
                    "its host tells extents that do not join",
                ));
            }
            at += length;
            extents.push(Extent::new(offset, length, kind));
        }
        Ok(extents)
    }
}
