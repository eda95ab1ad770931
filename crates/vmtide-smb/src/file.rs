//! A file on a share as a block device.
//!
//! A read or write is cut into pieces that are all under way at once, and many threads may read and write at the same
//! time over the one connection.
//!
//! A session whose Kerberos ticket expires is renewed, and the file stays open, for readers and writers.
//!
//! A connection that breaks under a reader is made again, within [`reconnect_for`](crate::SmbOptions::reconnect_for):
//! the file is opened anew, and must be the same one with the same size and time of writing, else the read fails. Under
//! a writer it is not, once something was written and not flushed: a server that was restarted may have lost what it
//! had acknowledged, and nobody would know.

use crate::client::SmbClient;
use crate::error::{Result, SmbError};
use crate::link::Ticket;
use crate::path::SharePath;
use crate::patience::Patience;
use crate::requests::{FileId, Purpose};
use crate::session::Session;
use crate::unflushed::Unflushed;
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vmtide_block::{BlockDevice, BlockError, ByteRange, WritableBlockDevice};

/// The most bytes of one request. Larger ones leave a single reader waiting for the end of each; smaller ones cost more
/// messages.
const PIECE_BYTES: u32 = 512 << 10;
/// The most bytes of one call that are under way at once.
const WINDOW_BYTES: usize = 8 << 20;
/// The most bytes that the server is asked to make zero in one request, so that it answers in time.
const ZERO_BYTES: u64 = 32 << 20;

/// An open file on a share.
pub struct SmbFile {
    client: Arc<SmbClient>,
    path: SharePath,
    name: String,
    purpose: Purpose,
    size_bytes: AtomicU64,
    open: RwLock<Open>,
    /// Held while the connection is made again.
    reopening: Mutex<()>,
    /// What was written that no flush has followed yet.
    unflushed: Unflushed,
    /// Why nothing may be written any more.
    lost_writes: AtomicBool,
    read_bytes: AtomicU64,
}

#[derive(Clone)]
struct Open {
    session: Arc<Session>,
    tree: u32,
    id: FileId,
    identity: Identity,
    /// How many times it was opened.
    generation: u64,
}

/// What must be the same when a file is opened again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    number: u64,
    size_bytes: u64,
    written_at: u64,
}

fn open(client: &SmbClient, path: &SharePath, purpose: Purpose, generation: u64) -> Result<Open> {
    let what = path.to_string();
    let (session, tree, opened) = client.open(path, purpose)?;
    // Nobody else can close it.
    let number = number(client, path, &session, (tree, opened.id))
        .inspect_err(|_| drop(session.close(tree, opened.id, &what)))?;
    let identity =
        Identity { number, size_bytes: opened.size_bytes, written_at: opened.written_at };
    Ok(Open { session, tree, id: opened.id, identity, generation })
}

/// The number of a file that was just opened. Where only the ticket has expired since, the handle is as good as before
/// once the session is renewed.
fn number(
    client: &SmbClient,
    path: &SharePath,
    session: &Arc<Session>,
    (tree, id): (u32, FileId),
) -> Result<u64> {
    let what = path.to_string();
    let renewals = session.link.renewals();
    match session.file_number(tree, id, &what) {
        Err(error) if session.link.has_expired_since(renewals) => {
            let now = client.session(&path.server)?;
            if !Arc::ptr_eq(&now, session) {
                return Err(error);
            }
            session.file_number(tree, id, &what)
        }
        asked => asked,
    }
}

impl SmbFile {
    /// Opens a file for reading; who would write it meanwhile is kept out, and whoever does write it keeps this out.
    ///
    /// # Errors
    /// [`SmbError::NotFound`], [`SmbError::Denied`], [`SmbError::InUse`] while somebody writes it, those of the login.
    pub fn open(client: &Arc<SmbClient>, path: &SharePath) -> Result<Self> {
        Self::with_purpose(client, path, Purpose::Read)
    }

    /// Opens a file for writing, alone.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`SmbError::InUse`] while anybody has it open.
    pub fn open_writable(client: &Arc<SmbClient>, path: &SharePath) -> Result<Self> {
        Self::with_purpose(client, path, Purpose::Write)
    }

    /// Makes a new, empty file.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`SmbError::Exists`].
    pub fn create(client: &Arc<SmbClient>, path: &SharePath) -> Result<Self> {
        Self::with_purpose(client, path, Purpose::Create)
    }

    fn with_purpose(client: &Arc<SmbClient>, path: &SharePath, purpose: Purpose) -> Result<Self> {
        let first = match open(client, path, purpose, 0) {
            // An idle connection that the server ended is noticed by the first who uses it.
            Err(error) if error.is_connection_lost() && purpose != Purpose::Create => {
                open(client, path, purpose, 0)?
            }
            other => other?,
        };
        Ok(Self {
            client: client.clone(),
            path: path.clone(),
            name: path.to_string(),
            purpose,
            size_bytes: AtomicU64::new(first.identity.size_bytes),
            open: RwLock::new(first),
            reopening: Mutex::new(()),
            unflushed: Unflushed::default(),
            lost_writes: AtomicBool::new(false),
            read_bytes: AtomicU64::new(0),
        })
    }

    /// The file's number on its volume, and the volume's server and share: the same for all names of one file.
    pub fn key(&self) -> String {
        let number = self.open.read().identity.number;
        format!(r"\\{}\{}#{number}", self.path.server, self.path.share).to_lowercase()
    }

    /// How many bytes were read of it so far.
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    /// Does `work` on the open file; where the connection breaks, on a new one.
    fn retry<T>(&self, mut work: impl FnMut(&Open) -> Result<T>) -> Result<T> {
        let mut patience = Patience::new(self.client.options().reconnect_for);
        loop {
            if self.lost_writes.load(Ordering::Acquire) {
                return Err(self.may_have_lost());
            }
            let open = self.open.read().clone();
            let renewals = open.session.link.renewals();
            let mut error = match work(&open) {
                Err(error) if error.is_connection_lost() => error,
                other => return other,
            };
            loop {
                match self.reopen(open.generation, renewals) {
                    Ok(()) => break,
                    Err(again) if again.is_connection_lost() || is_own_handle(&again) => {
                        error = again;
                    }
                    Err(other) => return Err(other),
                }
                if !patience.pause() {
                    return Err(error);
                }
            }
            if !patience.may_use_reopened() {
                return Err(error);
            }
        }
    }

    fn may_have_lost(&self) -> SmbError {
        SmbError::Disconnected {
            peer: self.path.server.clone(),
            detail: format!(
                "it broke while {} was written, and what the server had may be lost; write it anew",
                self.name
            ),
        }
    }

    /// Opens the file again, unless somebody did it since `generation`, or its session is renewed, or was since
    /// `renewals`.
    fn reopen(&self, generation: u64, renewals: u64) -> Result<()> {
        let _one_at_a_time = self.reopening.lock();
        let before = self.open.read().clone();
        if before.generation != generation {
            return Ok(());
        }
        let link = &before.session.link;
        if link.has_expired_since(renewals) {
            // The server has kept what is open, and what was written.
            let session = self.client.session(&self.path.server)?;
            if Arc::ptr_eq(&session, &before.session) {
                return Ok(());
            }
        }
        if self.unflushed.is_dirty() {
            self.lost_writes.store(true, Ordering::Release);
            return Err(SmbError::Refused { what: self.may_have_lost().to_string(), status: 0 });
        }
        let purpose = if self.purpose == Purpose::Read { Purpose::Read } else { Purpose::Write };
        let again = open(&self.client, &self.path, purpose, generation + 1)?;
        let is_same = if purpose == Purpose::Read {
            again.identity == before.identity
        } else {
            // What was flushed has changed its time.
            again.identity.number == before.identity.number
                && again.identity.size_bytes == self.size_bytes.load(Ordering::Acquire)
        };
        if !is_same {
            drop(again.session.close(again.tree, again.id, &self.name));
            return Err(SmbError::Refused {
                what: format!(
                    "{} was changed or replaced while the connection was broken",
                    self.name
                ),
                status: 0,
            });
        }
        tracing::info!(file = %self.name, "the SMB connection broke and was made again");
        *self.open.write() = again;
        Ok(())
    }

    fn read(&self, open: &Open, buffer: &mut [u8], offset: u64) -> Result<()> {
        let piece = usize::try_from(open.session.negotiated.max_read_bytes.min(PIECE_BYTES))
            .unwrap_or(1 << 16);
        let mut at = offset;
        for window in buffer.chunks_mut(WINDOW_BYTES) {
            let mut tickets = Vec::with_capacity(window.len().div_ceil(piece));
            let mut failed = None;
            let mut ask = at;
            for part in window.chunks(piece) {
                let length = u32::try_from(part.len()).unwrap_or(PIECE_BYTES);
                match open.session.begin_read(open.tree, open.id, ask, length) {
                    Ok(ticket) => tickets.push(ticket),
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
                ask += u64::from(length);
            }
            for (part, ticket) in window.chunks_mut(piece).zip(tickets) {
                if failed.is_some() {
                    // What is under way counts in the window until its answer has come.
                    drop(open.session.link.wait(ticket));
                    continue;
                }
                failed = self.read_piece(open, ticket, part, at).err();
                at += part.len() as u64;
            }
            if let Some(error) = failed {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes in what was asked for by `ticket`, and asks for the rest of it where less comes.
    fn read_piece(&self, open: &Open, ticket: Ticket, part: &mut [u8], at: u64) -> Result<()> {
        let mut done = open.session.finish_read(ticket, part, &self.name)?;
        // Servers may answer with less, where storage is slow.
        while let Some(rest) = part.get_mut(done..).filter(|rest| !rest.is_empty()) {
            if done == 0 {
                return Err(SmbError::protocol(format!("{}: an empty read", self.name)));
            }
            let length = u32::try_from(rest.len()).unwrap_or(PIECE_BYTES);
            let from = at + done as u64;
            let ticket = open.session.begin_read(open.tree, open.id, from, length)?;
            match open.session.finish_read(ticket, rest, &self.name)? {
                0 => return Err(SmbError::protocol(format!("{}: an empty read", self.name))),
                more => done += more,
            }
        }
        Ok(())
    }

    fn write(&self, open: &Open, data: &[u8], offset: u64) -> Result<()> {
        let piece = usize::try_from(open.session.negotiated.max_write_bytes.min(PIECE_BYTES))
            .unwrap_or(1 << 16);
        let mut at = offset;
        for window in data.chunks(WINDOW_BYTES) {
            let mut tickets = Vec::with_capacity(window.len().div_ceil(piece));
            let mut failed = None;
            for part in window.chunks(piece) {
                match open.session.begin_write(open.tree, open.id, at, part) {
                    Ok(ticket) => tickets.push((ticket, part.len())),
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
                at += part.len() as u64;
            }
            // All of them, also behind one that failed: what is under way could else be written after what comes next.
            for (ticket, length) in tickets {
                if let Err(error) = open.session.finish_write(ticket, length, &self.name) {
                    failed.get_or_insert(error);
                }
            }
            if let Some(error) = failed {
                return Err(error);
            }
        }
        Ok(())
    }

    fn check_write(&self, range: ByteRange) -> vmtide_block::Result<()> {
        if self.purpose == Purpose::Read {
            return Err(BlockError::ReadOnly { device: self.name() });
        }
        self.check_range(range)
    }

    fn write_some(&self, data: &[u8], offset: u64) -> vmtide_block::Result<()> {
        let _write = self.unflushed.write();
        Ok(self.retry(|open| self.write(open, data, offset))?)
    }
}

/// Whether the server may still hold our own handle of the connection that broke.
const fn is_own_handle(error: &SmbError) -> bool {
    matches!(error, SmbError::InUse { .. })
}

impl BlockDevice for SmbFile {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> vmtide_block::Result<()> {
        self.check_range(ByteRange::new(offset, buffer.len() as u64))?;
        self.retry(|open| self.read(open, buffer, offset))?;
        self.read_bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl WritableBlockDevice for SmbFile {
    fn write_at(&self, data: &[u8], offset: u64) -> vmtide_block::Result<()> {
        self.check_write(ByteRange::new(offset, data.len() as u64))?;
        self.write_some(data, offset)
    }

    fn write_zeroes(&self, range: ByteRange) -> vmtide_block::Result<()> {
        self.check_write(range)?;
        let _write = self.unflushed.write();
        let mut at = range.offset;
        while at < range.end() {
            let length = ZERO_BYTES.min(range.end() - at);
            let piece = ByteRange::new(at, length);
            match self.retry(|open| open.session.zero(open.tree, open.id, piece, &self.name)) {
                Ok(()) => {}
                // A server without this: zeros are data like any other.
                Err(SmbError::Unsupported { .. } | SmbError::Refused { .. }) => {
                    let zeros = vec![0; usize::try_from(length).unwrap_or(1 << 20)];
                    self.write_some(&zeros, at)?;
                }
                Err(error) => return Err(error.into()),
            }
            at += length;
        }
        Ok(())
    }

    fn flush(&self) -> vmtide_block::Result<()> {
        if self.purpose == Purpose::Read {
            return Ok(());
        }
        let mark = self.unflushed.mark();
        self.retry(|open| open.session.flush(open.tree, open.id, &self.name))?;
        self.unflushed.flushed(mark);
        Ok(())
    }

    fn resize(&self, size_bytes: u64) -> vmtide_block::Result<()> {
        if self.purpose == Purpose::Read {
            return Err(BlockError::ReadOnly { device: self.name() });
        }
        let _write = self.unflushed.write();
        self.retry(|open| open.session.set_size(open.tree, open.id, size_bytes, &self.name))?;
        self.size_bytes.store(size_bytes, Ordering::Release);
        Ok(())
    }
}

impl Drop for SmbFile {
    /// Waits until the server has closed it: what is done next at the host may need that.
    fn drop(&mut self) {
        let open = self.open.get_mut();
        if let Err(error) = open.session.close(open.tree, open.id, &self.name) {
            tracing::debug!(file = %self.name, %error, "not closed");
        }
    }
}
