//! One connection: requests go out from any thread, one thread of its own takes the answers in and hands each to who
//! waits for it.
//!
//! Credits (MS-SMB2 3.2.4.1.5) say how much may be under way: each 64 KiB of a request or its answer takes one, and
//! a request that finds none waits. An answer that is larger than its credits allow ends the connection. Credits come
//! back when an answer arrives, so what bounds the memory of answers that nobody has fetched yet is who asks: each
//! thread at a file has a window of 8 MiB.
//!
//! A server may say that it is still at it (an interim answer, MS-SMB2 3.2.5.1.5): making gigabytes of zeros or flushing a
//! large cache takes minutes. Then the answer is waited for as long as the server shows that it lives, by answering an
//! `ECHO` whenever the time of a request has passed, up to [`MAX_PENDING`].
//!
//! While a session is told anew who we are ([`hold`](Link::hold)) nothing else is sent: a server refuses it meanwhile, with
//! a status of its own liking (MS-SMB2 3.3.5.2.9). Whoever sends has its place before it takes credits, so that what
//! waits does not keep the credits that the login needs; and it keeps that place for no longer than it takes to send.

use crate::crypto::{Cipher, Signer, TRANSFORM, TRANSFORM_BYTES};
use crate::error::{Result, SmbError, status};
use crate::header::{
    Command, FLAG_ASYNC, FLAG_SIGNED, HEADER_BYTES, RequestHeader, ResponseHeader,
};
use crate::wire::Writer;
use parking_lot::{Condvar, Mutex, RwLock, RwLockWriteGuard};
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
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
/// What an answer may have beyond the data that its credits stand for: headers, the fixed parts of answers.
const ANSWER_SLACK_BYTES: usize = 4 << 10;
/// Buffers of answers that are kept for later ones, so that not every megabyte is new, cold memory.
const MAX_SPARE_BUFFERS: usize = 16;
/// The largest buffer that is kept: a piece of a file with its headers has little more than half of it.
const MAX_SPARE_BYTES: usize = 1 << 20;
/// How long a request may be pending at a server that lives. The slowest known, filling 600 GB with zeros on one disk,
/// takes 20 minutes; a server that lives and never answers must end all the same.
const MAX_PENDING: Duration = Duration::from_secs(30 * 60);
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
    /// Read while a request is sent, written while the session is renewed.
    renewing: RwLock<()>,
    renewals: AtomicU64,
    /// Of the newest request that was refused for its ticket, the number of renewals when it was sent, and one.
    expired_at: AtomicU64,
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
    /// The server has said that it is at it.
    is_pending: bool,
}

impl Waiting {
    /// The longest answer that may come, its transform header counted.
    fn max_answer_bytes(&self) -> usize {
        let data = u64::from(self.charge) * u64::from(CREDIT_BYTES);
        usize::try_from(data).unwrap_or(usize::MAX).saturating_add(ANSWER_SLACK_BYTES)
    }
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
    /// How often the session was renewed when it was sent.
    renewals: u64,
}

/// How a request stands whose time has passed.
enum Overdue {
    /// Its answer is being handed over.
    Answered,
    /// The server has said that it is at it.
    Pending,
    /// The server has said nothing. The connection counts as broken from now on.
    Silent(SmbError),
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
            renewing: RwLock::new(()),
            renewals: AtomicU64::new(0),
            expired_at: AtomicU64::new(0),
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

    /// Whether the server asks to be told anew who we are; what is open stays open. What it refused before it was told
    /// the last time does not count.
    pub(crate) fn is_expired(&self) -> bool {
        self.shared.expired_at.load(Ordering::Acquire) > self.renewals()
    }

    /// How often it was told so.
    pub(crate) fn renewals(&self) -> u64 {
        self.shared.renewals.load(Ordering::Acquire)
    }

    /// Whether the connection lives and the ticket has expired, or had and there is another one since `renewals`.
    pub(crate) fn has_expired_since(&self, renewals: u64) -> bool {
        (self.is_expired() || self.renewals() != renewals) && !self.is_broken()
    }

    /// The server was told. To be called while the others are [held](Self::hold).
    pub(crate) fn renewed(&self) {
        self.shared.renewals.fetch_add(1, Ordering::AcqRel);
    }

    /// Keeps all others from sending, but for logins and `ECHO`, until what it gives is dropped. What is being sent is sent
    /// before. Whoever holds it must send nothing else.
    pub(crate) fn hold(&self) -> RwLockWriteGuard<'_, ()> {
        self.shared.renewing.write()
    }

    /// Ends the connection for all who use it.
    pub(crate) fn end(&self, why: &str) {
        self.shared.break_off(self.shared.lost(why));
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

    /// Waits for an answer. A server that does not answer in time counts as gone, unless it said that it is at it and
    /// shows that it lives.
    pub(crate) fn wait(&self, ticket: Ticket) -> Result<Reply> {
        let deadline = Instant::now() + MAX_PENDING;
        let reply = loop {
            match self.answer(&ticket, Instant::now() + self.shared.timeout < deadline)? {
                Some(reply) => break reply,
                None => self.echo()?,
            }
        };
        if let Err(error) = self.shared.check(&reply, ticket.message_id) {
            self.shared.break_off(error.clone());
            return Err(error);
        }
        if reply.header.status == status::NETWORK_SESSION_EXPIRED {
            self.shared.expired_at.fetch_max(ticket.renewals + 1, Ordering::AcqRel);
        }
        Ok(reply)
    }

    /// Waits for an answer for the time of a request; none where the server has said that it is at it, if it `may_pend`.
    fn answer(&self, ticket: &Ticket, may_pend: bool) -> Result<Option<Reply>> {
        loop {
            match ticket.answer.recv_timeout(self.shared.timeout) {
                Ok(reply) => return reply.map(Some),
                Err(RecvTimeoutError::Disconnected) => return Err(self.shared.why_broken()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            match self.shared.overdue(ticket.message_id, may_pend) {
                // Whoever has taken it out of those that wait sends it, or drops the sender.
                Overdue::Answered => {}
                Overdue::Pending => return Ok(None),
                Overdue::Silent(error) => {
                    self.shared.break_off(error.clone());
                    return Err(error);
                }
            }
        }
    }

    /// Succeeds where the server lives.
    fn echo(&self) -> Result<()> {
        // Its structure's size, and nothing (MS-SMB2 2.2.28).
        let body = [4, 0, 0, 0];
        let request = Request {
            command: Command::Echo,
            tree_id: 0,
            body: &body,
            data: &[],
            payload_bytes: 0,
        };
        let (ticket, _) = self.submit(&request, 0)?;
        let answer = self.answer(&ticket, false)?.ok_or_else(|| self.shared.timed_out());
        let checked = answer.and_then(|reply| self.shared.check(&reply, ticket.message_id));
        checked.inspect_err(|error| self.shared.break_off(error.clone()))
    }

    /// Gives back the buffer of an answer that was read.
    pub(crate) fn recycle(&self, reply: Reply) {
        let mut spare = self.shared.spare.lock();
        if spare.len() < MAX_SPARE_BUFFERS && reply.frame.capacity() <= MAX_SPARE_BYTES {
            spare.push(reply.frame);
        }
    }

    fn submit(&self, request: &Request<'_>, session_id: u64) -> Result<(Ticket, Vec<u8>)> {
        // Who renews sends logins, and while it waits for their answers asks whether the server lives.
        let may_be_held = !matches!(request.command, Command::SessionSetup | Command::Echo);
        let _sending = may_be_held.then(|| self.shared.renewing.read());
        let renewals = self.renewals();
        let charge = request.payload_bytes.max(1).div_ceil(CREDIT_BYTES);
        let (sender, answer) = sync_channel(1);
        // Whether the server lives is asked to find out, not to wait for.
        let is_patient = request.command != Command::Echo;
        let (message_id, more) = self.shared.admit(charge, sender, is_patient)?;
        let sent = self.shared.transmit(request, message_id, session_id, charge, more);
        match sent {
            Ok(message) => Ok((Ticket { answer, message_id, renewals }, message)),
            Err(error) => {
                // The other side may have half a message, and waits for this id for ever.
                self.shared.break_off(error.clone());
                Err(error)
            }
        }
    }
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
    /// how many credits the request shall ask for. `is_patient`: as long as what has the credits is pending.
    fn admit(
        &self,
        charge: u32,
        answer: SyncSender<Result<Reply>>,
        is_patient: bool,
    ) -> Result<(u64, u16)> {
        let begun = Instant::now();
        let mut deadline = begun + self.timeout;
        let mut state = self.state.lock();
        loop {
            if let Some(error) = &state.broken {
                return Err(error.clone());
            }
            if state.credits >= charge {
                break;
            }
            if self.credits_came.wait_until(&mut state, deadline).timed_out() {
                // What is pending has the credits; whoever waits for it asks whether the server lives.
                let is_pending = state.waiting.values().any(|waiting| waiting.is_pending);
                if is_patient && is_pending && begun.elapsed() < MAX_PENDING {
                    deadline = Instant::now() + self.timeout;
                    continue;
                }
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
        state.waiting.insert(message_id, Waiting { answer, charge, is_pending: false });
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
        self.write(&frame)?;
        self.sent_bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        // Only a login looks at it.
        Ok(if security.is_none() { frame.split_off(start) } else { Vec::new() })
    }

    /// Sends a message, all of it within the time of a request: a server that takes a byte now and then would else hold
    /// whoever has something to send.
    fn write(&self, frame: &[u8]) -> Result<()> {
        let deadline = Instant::now() + self.timeout;
        let mut stream = self.sending.try_lock_until(deadline).ok_or_else(|| self.timed_out())?;
        let mut rest = frame;
        while !rest.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.timed_out());
            }
            stream.set_write_timeout(Some(left)).map_err(|error| self.lost(error))?;
            match stream.write(rest) {
                Ok(0) => return Err(self.lost("it takes nothing any more")),
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    return Err(self.timed_out());
                }
                Err(error) => return Err(self.lost(error)),
            }
        }
        Ok(())
    }

    /// How a request stands whose time has passed. It is decided in one moment with [`dispatch`](Self::dispatch): an answer
    /// that comes just now is one.
    fn overdue(&self, message_id: u64, may_pend: bool) -> Overdue {
        let mut state = self.state.lock();
        match state.waiting.get(&message_id) {
            None => Overdue::Answered,
            Some(waiting) if waiting.is_pending && may_pend => Overdue::Pending,
            Some(_) => {
                let error = self.timed_out();
                state.broken.get_or_insert_with(|| error.clone());
                Overdue::Silent(error)
            }
        }
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
            ErrorKind::UnexpectedEof => self.lost("the server closed it"),
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
        let encrypts = self.security.get().is_some_and(|security| security.cipher.is_some());
        if is_interim && encrypts && !is_encrypted {
            return Err(SmbError::protocol("a plain answer in an encrypted session"));
        }
        let waiting = {
            let mut state = self.state.lock();
            state.credits = (state.credits + u32::from(header.credits)).min(2 * MAX_CREDITS);
            if is_interim {
                let waiting = state.waiting.get_mut(&header.message_id);
                waiting.map(|waiting| {
                    waiting.is_pending = true;
                    None
                })
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
            Some(Some(waiting)) if frame.len() > waiting.max_answer_bytes() => {
                let text = format!("an answer of {} bytes to a request for less", frame.len());
                let error = SmbError::protocol(text);
                // Who waits for it, and is told last, finds the connection broken when it hears of it.
                self.break_off(error.clone());
                drop(waiting.answer.try_send(Err(error.clone())));
                Err(error)
            }
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
        let protected = check_protection(security, reply, message_id);
        match reply.header.status {
            // Whoever comes next needs another session, also where this was encrypted. Where the server has no key any
            // more it is plain; whoever forges that could as well cut the line.
            status::USER_SESSION_DELETED => Err(self.lost("the server has ended the session")),
            status::NETWORK_SESSION_EXPIRED if protected.is_err() => {
                Err(self.lost("the session has ended: its Kerberos ticket has expired"))
            }
            _ => protected,
        }
    }
}

fn check_protection(security: &Security, reply: &Reply, message_id: u64) -> Result<()> {
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

#[cfg(test)]
pub(crate) mod standin;
#[cfg(test)]
mod tests;
