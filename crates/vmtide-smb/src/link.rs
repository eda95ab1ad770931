//! One connection: requests go out from any thread, one thread of its own takes the answers in and hands each to who
//! waits for it.
//!
//! Credits (MS-SMB2 3.2.4.1.5) say how much may be under way: each 64 KiB of a request or its answer takes one, and
//! a request that finds none waits. So they also bound the memory: answers that nobody has fetched yet are at most what
//! was asked for, [`MAX_CREDITS`] times 64 KiB.

use crate::crypto::{Cipher, Signer, TRANSFORM, TRANSFORM_BYTES};
use crate::error::{Result, SmbError, status};
use crate::header::{
    Command, FLAG_ASYNC, FLAG_SIGNED, HEADER_BYTES, RequestHeader, ResponseHeader,
};
use crate::wire::Writer;
use parking_lot::{Condvar, Mutex};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// The bytes that one credit stands for.
const CREDIT_BYTES: u32 = 64 << 10;
/// The most credits that are asked for: 32 MiB under way fill 10 Gbit/s over 25 ms. More only takes memory.
const MAX_CREDITS: u32 = 512;
/// What each request asks for beyond what it takes, until there are [`MAX_CREDITS`].
const MORE_CREDITS: u16 = 64;
/// The longest message that is taken: the largest read, and more than any header.
const MAX_MESSAGE_BYTES: usize = (8 << 20) + (64 << 10);
/// Buffers of answers that are kept for later ones, so that not every megabyte is new, cold memory.
const MAX_SPARE_BUFFERS: usize = 16;
/// The message id of what a server says unasked (an oplock's end; none are taken here).
const UNASKED: u64 = u64::MAX;

/// What a logged-in session protects its messages with.
pub(crate) struct Security {
    pub(crate) session_id: u64,
    pub(crate) signer: Signer,
    /// None where the server has no encryption: then every message is signed.
    pub(crate) cipher: Option<Cipher>,
}

/// How many bytes went over a connection, headers and all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From the server.
    pub received_bytes: u64,
    /// To the server.
    pub sent_bytes: u64,
}

/// An open connection. Dropping it closes it.
pub(crate) struct Link {
    shared: Arc<Shared>,
}

struct Shared {
    peer: String,
    stream: TcpStream,
    /// Held while one message is written.
    sending: Mutex<TcpStream>,
    state: Mutex<State>,
    credits_came: Condvar,
    security: OnceLock<Security>,
    timeout: Duration,
    spare: Mutex<Vec<Vec<u8>>>,
    received_bytes: AtomicU64,
    sent_bytes: AtomicU64,
}

struct State {
    next_message_id: u64,
    /// Credits that may be used now.
    credits: u32,
    /// Credits of requests that are under way.
    in_flight: u32,
    waiting: HashMap<u64, Waiting>,
    /// Why nothing goes any more.
    broken: Option<SmbError>,
}

struct Waiting {
    answer: SyncSender<Result<Reply>>,
    charge: u32,
}

/// A request.
pub(crate) struct Request<'a> {
    pub(crate) command: Command,
    pub(crate) tree_id: u32,
    pub(crate) body: &'a [u8],
    /// Behind the body, for what is written.
    pub(crate) data: &'a [u8],
    /// The larger one of what is sent and what may come back, for the credits.
    pub(crate) payload_bytes: u32,
}

/// An answer.
pub(crate) struct Reply {
    frame: Vec<u8>,
    start: usize,
    pub(crate) header: ResponseHeader,
    /// The exact message that was sent, where that was asked for.
    is_encrypted: bool,
}

impl Reply {
    /// The whole message from its header on.
    pub(crate) fn message(&self) -> &[u8] {
        self.frame.get(self.start..).unwrap_or_default()
    }
}

/// An answer that is to come.
pub(crate) struct Ticket {
    answer: Receiver<Result<Reply>>,
    message_id: u64,
}

impl Link {
    /// Takes over a connected socket.
    pub(crate) fn start(stream: TcpStream, peer: String, timeout: Duration) -> Result<Self> {
        let failed = |error: std::io::Error| SmbError::Unreachable {
            peer: peer.clone(),
            detail: error.to_string(),
        };
        stream.set_nodelay(true).map_err(failed)?;
        stream.set_write_timeout(Some(timeout)).map_err(failed)?;
        let sending = Mutex::new(stream.try_clone().map_err(failed)?);
        let receiving = stream.try_clone().map_err(failed)?;
        let shared = Arc::new(Shared {
            peer: peer.clone(),
            stream,
            sending,
            // The first request needs one.
            state: Mutex::new(State {
                next_message_id: 0,
                credits: 1,
                in_flight: 0,
                waiting: HashMap::new(),
                broken: None,
            }),
            credits_came: Condvar::new(),
            security: OnceLock::new(),
            timeout,
            spare: Mutex::new(Vec::new()),
            received_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
        });
        let reader = shared.clone();
        std::thread::Builder::new()
            .name("smb-receive".into())
            .spawn(move || reader.receive_all(receiving))
            .map_err(failed)?;
        Ok(Self { shared })
    }

    /// Protects all messages from now on.
    pub(crate) fn secure(&self, security: Security) {
        // There is one login on each connection.
        drop(self.shared.security.set(security));
    }

    /// Whether nothing goes any more.
    pub(crate) fn is_broken(&self) -> bool {
        self.shared.state.lock().broken.is_some()
    }

    pub(crate) fn traffic(&self) -> Traffic {
        Traffic {
            received_bytes: self.shared.received_bytes.load(Ordering::Relaxed),
            sent_bytes: self.shared.sent_bytes.load(Ordering::Relaxed),
        }
    }

    /// Sends a request, and waits for its answer.
    pub(crate) fn call(&self, request: &Request<'_>) -> Result<Reply> {
        let (ticket, _) = self.submit(request, 0)?;
        self.wait(ticket)
    }

    /// Sends a request of a login that is under way, as `session_id`; answers with the message as it was sent, too.
    pub(crate) fn call_login(
        &self,
        request: &Request<'_>,
        session_id: u64,
    ) -> Result<(Vec<u8>, Reply)> {
        let (ticket, sent) = self.submit(request, session_id)?;
        Ok((sent, self.wait(ticket)?))
    }

    /// Sends a request whose answer is fetched later by [`wait`](Self::wait).
    pub(crate) fn send(&self, request: &Request<'_>) -> Result<Ticket> {
        Ok(self.submit(request, 0)?.0)
    }

    /// Waits for an answer. A server that does not answer in time counts as gone.
    pub(crate) fn wait(&self, ticket: Ticket) -> Result<Reply> {
        let reply = match ticket.answer.recv_timeout(self.shared.timeout) {
            Ok(reply) => reply?,
            Err(RecvTimeoutError::Timeout) => {
                let error = self.shared.timed_out();
                self.shared.break_off(error.clone());
                return Err(error);
            }
            Err(RecvTimeoutError::Disconnected) => return Err(self.shared.why_broken()),
        };
        if let Err(error) = self.shared.check(&reply, ticket.message_id) {
            self.shared.break_off(error.clone());
            return Err(error);
        }
        Ok(reply)
    }

    /// Gives back the buffer of an answer that was read.
    pub(crate) fn recycle(&self, reply: Reply) {
        let mut spare = self.shared.spare.lock();
        if spare.len() < MAX_SPARE_BUFFERS {
            spare.push(reply.frame);
        }
    }

    fn submit(&self, request: &Request<'_>, session_id: u64) -> Result<(Ticket, Vec<u8>)> {
        let charge = request.payload_bytes.max(1).div_ceil(CREDIT_BYTES);
        let (sender, answer) = sync_channel(1);
        let (message_id, more) = self.shared.admit(charge, sender)?;
        let sent = self.shared.transmit(request, message_id, session_id, charge, more);
        match sent {
            Ok(message) => Ok((Ticket { answer, message_id }, message)),
            Err(error) => {
                // The other side may have half a message, and waits for this id for ever.
                self.shared.break_off(error.clone());
                Err(error)
            }
        }
    }
}

/// Whether a status says that the session is no more.
const fn has_ended(status: u32) -> bool {
    matches!(status, status::USER_SESSION_DELETED | status::NETWORK_SESSION_EXPIRED)
}

impl Drop for Link {
    fn drop(&mut self) {
        let error = SmbError::Disconnected {
            peer: self.shared.peer.clone(),
            detail: "it was closed".into(),
        };
        self.shared.break_off(error);
    }
}

impl Shared {
    fn timed_out(&self) -> SmbError {
        let timeout_ms = u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX);
        SmbError::Timeout { peer: self.peer.clone(), timeout_ms }
    }

    fn lost(&self, detail: impl std::fmt::Display) -> SmbError {
        SmbError::Disconnected { peer: self.peer.clone(), detail: detail.to_string() }
    }

    fn why_broken(&self) -> SmbError {
        self.state.lock().broken.clone().unwrap_or_else(|| self.lost("it was closed"))
    }

    /// Ends the connection. The first reason counts.
    fn break_off(&self, error: SmbError) {
        let waiting = {
            let mut state = self.state.lock();
            let reason = state.broken.get_or_insert(error).clone();
            let waiting = std::mem::take(&mut state.waiting);
            (reason, waiting)
        };
        for waiting_one in waiting.1.into_values() {
            drop(waiting_one.answer.try_send(Err(waiting.0.clone())));
        }
        self.credits_came.notify_all();
        drop(self.stream.shutdown(Shutdown::Both));
    }

    /// Takes credits for a request, waiting for them, and a message id with a place for its answer. Answers also with
    /// how many credits the request shall ask for.
    fn admit(&self, charge: u32, answer: SyncSender<Result<Reply>>) -> Result<(u64, u16)> {
        let deadline = Instant::now() + self.timeout;
        let mut state = self.state.lock();
        loop {
            if let Some(error) = &state.broken {
                return Err(error.clone());
            }
            if state.credits >= charge {
                break;
            }
            if self.credits_came.wait_until(&mut state, deadline).timed_out() {
                drop(state);
                let error = self.timed_out();
                self.break_off(error.clone());
                return Err(error);
            }
        }
        state.credits -= charge;
        state.in_flight += charge;
        let message_id = state.next_message_id;
        state.next_message_id += u64::from(charge);
        state.waiting.insert(message_id, Waiting { answer, charge });
        let own = u16::try_from(charge).unwrap_or(u16::MAX);
        let has_all = state.credits + state.in_flight >= MAX_CREDITS;
        Ok((message_id, if has_all { own } else { own.saturating_add(MORE_CREDITS) }))
    }

    /// Builds, protects and sends a message. Answers with the message itself where nothing protects it yet.
    fn transmit(
        &self,
        request: &Request<'_>,
        message_id: u64,
        login_session: u64,
        charge: u32,
        credit_request: u16,
    ) -> Result<Vec<u8>> {
        let security = self.security.get();
        let cipher = security.and_then(|security| security.cipher.as_ref());
        let start = 4 + if cipher.is_some() { TRANSFORM_BYTES } else { 0 };
        let length = start + HEADER_BYTES + request.body.len() + request.data.len();
        let mut writer = Writer(Vec::with_capacity(length));
        writer.zeros(start);
        let session_id = security.map_or(login_session, |security| security.session_id);
        let header = RequestHeader {
            command: request.command,
            credit_charge: u16::try_from(charge).unwrap_or(u16::MAX),
            credit_request,
            flags: if security.is_some() && cipher.is_none() { FLAG_SIGNED } else { 0 },
            message_id,
            tree_id: request.tree_id,
            session_id,
        };
        header.encode(&mut writer);
        writer.bytes(request.body).bytes(request.data);
        let mut frame = writer.0;
        match (security, cipher) {
            (_, Some(cipher)) => cipher.seal(&mut frame, start, session_id)?,
            (Some(security), None) => {
                let message = frame.get_mut(start..).unwrap_or_default();
                security.signer.sign(message, message_id)?;
            }
            (None, None) => {}
        }
        let size = u32::try_from(length - 4).unwrap_or(u32::MAX);
        if let Some(head) = frame.get_mut(..4) {
            head.copy_from_slice(&size.to_be_bytes());
        }
        self.sending.lock().write_all(&frame).map_err(|error| self.lost(error))?;
        self.sent_bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        // Only a login looks at it.
        Ok(if security.is_none() { frame.split_off(start) } else { Vec::new() })
    }

    /// Takes answers in until the connection ends.
    fn receive_all(&self, mut stream: TcpStream) {
        loop {
            let taken = self.receive(&mut stream).and_then(|frame| self.dispatch(frame));
            if let Err(error) = taken {
                self.break_off(error);
                return;
            }
        }
    }

    fn receive(&self, stream: &mut TcpStream) -> Result<Vec<u8>> {
        let closed = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => self.lost("the server closed it"),
            _ => self.lost(error),
        };
        let mut head = [0; 4];
        stream.read_exact(&mut head).map_err(closed)?;
        let [kind, rest @ ..] = head;
        let length = rest.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        if kind != 0 || !(HEADER_BYTES..=MAX_MESSAGE_BYTES).contains(&length) {
            return Err(SmbError::protocol(format!(
                "a message of the kind {kind} with {length} bytes"
            )));
        }
        let mut frame = self.spare.lock().pop().unwrap_or_default();
        frame.resize(length, 0);
        stream.read_exact(&mut frame).map_err(closed)?;
        self.received_bytes.fetch_add(length as u64 + 4, Ordering::Relaxed);
        Ok(frame)
    }

    /// Hands a message to who waits for it.
    fn dispatch(&self, mut frame: Vec<u8>) -> Result<()> {
        let is_encrypted = frame.starts_with(&TRANSFORM);
        let start = if is_encrypted { TRANSFORM_BYTES } else { 0 };
        if is_encrypted {
            let security = self.security.get();
            let (Some(security), Some(cipher)) =
                (security, security.and_then(|security| security.cipher.as_ref()))
            else {
                return Err(SmbError::protocol("an encrypted message before the login"));
            };
            cipher.open(&mut frame, security.session_id)?;
        }
        let header = ResponseHeader::decode(frame.get(start..).unwrap_or_default())?;
        if header.message_id == UNASKED {
            return Ok(());
        }
        let is_interim = header.status == status::PENDING && header.flags & FLAG_ASYNC != 0;
        let waiting = {
            let mut state = self.state.lock();
            state.credits = (state.credits + u32::from(header.credits)).min(2 * MAX_CREDITS);
            if is_interim {
                state.waiting.contains_key(&header.message_id).then_some(None)
            } else {
                let waiting = state.waiting.remove(&header.message_id);
                let charge = waiting.as_ref().map_or(0, |waiting| waiting.charge);
                state.in_flight = state.in_flight.saturating_sub(charge);
                waiting.map(Some)
            }
        };
        self.credits_came.notify_all();
        match waiting {
            None => Err(SmbError::protocol("an answer that nobody asked for")),
            Some(None) => Ok(()),
            Some(Some(waiting)) => {
                let reply = Reply { frame, start, header, is_encrypted };
                // Nobody waits any more: the connection is ending.
                drop(waiting.answer.try_send(Ok(reply)));
                Ok(())
            }
        }
    }

    /// Succeeds for an answer that is protected as the session's must be.
    fn check(&self, reply: &Reply, message_id: u64) -> Result<()> {
        let Some(security) = self.security.get() else { return Ok(()) };
        if has_ended(reply.header.status) {
            // Also an encrypted one: whoever comes next needs another session. Where the server has no key any more it
            // is plain, and whoever forges that could as well cut the line.
            return Err(self.lost("the server has ended the session"));
        }
        if reply.is_encrypted {
            return Ok(());
        }
        if security.cipher.is_some() {
            return Err(SmbError::protocol("a plain answer in an encrypted session"));
        }
        if reply.header.session_id != security.session_id {
            return Err(SmbError::protocol("an answer of another session"));
        }
        security.signer.verify(reply.message(), reply.header.flags, message_id)
    }
}
