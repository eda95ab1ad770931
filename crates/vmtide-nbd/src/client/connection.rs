//! One connection in the transmission phase, used by many callers at once.
//!
//! # Who reads the socket
//!
//! Replies come in any order, and each belongs into the buffer of the caller that asked. So the
//! callers read the socket themselves, in turns: the receiving half is a baton. A caller that
//! waits takes the baton, reads a header, and
//! * reads the data straight into its own buffer where the reply is its own,
//! * passes baton and header to the caller it belongs to where that one waits,
//! * keeps the data aside for a caller that is still sending.
//!
//! A caller with all its replies passes the baton on. No byte is copied twice but in the third
//! case, and no thread switches happen where replies come in the order of the requests.
//!
//! # Why it cannot lock up
//!
//! A server may stop taking requests until somebody takes its replies. Were all callers busy
//! sending payloads, nobody would. So a thread of the connection, the pump, takes the baton while
//! a caller sends a payload and no caller waits. Requests without payload are too short to fill a
//! socket's buffer on their own: whatever blocks them belongs to a caller that waits, and reads.
//!
//! A failure of any kind is final for the connection: it is recorded, the socket is shut down,
//! and every caller gets an error.

use super::receive::{Baton, Owned, Place};
use crate::proto::assembly::{Assembly, Expected, Statuses};
use crate::proto::constants::{cmd, cmd_flag};
use crate::proto::errno::ServerError;
use crate::proto::request::{HeaderStyle, RequestHeader};
use crate::transport::{ReadHalf, Stream, WriteHalf};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vmtide_block::{BlockError, ByteRange};

/// How much longer requests may take whose time grows with their range.
const SLOW_REQUEST_FACTOR: u32 = 10;

/// One request of a call.
#[derive(Clone, Debug)]
pub(super) struct Piece<'a> {
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) range: ByteRange,
    pub(super) payload: &'a [u8],
    pub(super) expected: Expected,
}

/// The reply to one request.
pub(super) type Outcome = Result<Statuses, ServerError>;

/// Why a connection is dead.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// Whether the peer broke the protocol, as opposed to went away.
    pub(super) damaged: bool,
    pub(super) detail: String,
}

impl Failure {
    pub(super) fn lost(detail: impl Into<String>) -> Self {
        Self { damaged: false, detail: detail.into() }
    }

    pub(super) fn into_block_error(self, context: String) -> BlockError {
        if self.damaged {
            BlockError::damaged(context, self.detail)
        } else {
            BlockError::disconnected(context, self.detail)
        }
    }
}

impl From<crate::proto::ProtocolError> for Failure {
    fn from(error: crate::proto::ProtocolError) -> Self {
        Self { damaged: true, detail: error.to_string() }
    }
}

/// A request that was sent and not answered in full.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) call: u64,
    pub(super) piece: usize,
    pub(super) assembly: Assembly,
}

/// A caller with requests under way.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) wake: Arc<Condvar>,
    pub(super) sending: bool,
    pub(super) waiting: bool,
    pub(super) turn: Option<Baton>,
    pub(super) remaining: usize,
    pub(super) outcomes: Vec<Option<Outcome>>,
    pub(super) kept: Vec<Owned>,
    pub(super) progress: Instant,
    pub(super) patience: Duration,
}

impl Call {
    pub(super) const fn may_take_turn(&self) -> bool {
        self.waiting && self.remaining > 0 && self.turn.is_none()
    }
}

#[derive(Debug)]
pub(super) struct State {
    next_id: u64,
    pub(super) parked: Option<ReadHalf>,
    pub(super) pending: HashMap<u64, Pending>,
    pub(super) calls: BTreeMap<u64, Call>,
    senders: usize,
    pub(super) failure: Option<Failure>,
    closed: bool,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) style: HeaderStyle,
    stream: Arc<Stream>,
    writer: Mutex<WriteHalf>,
    pub(super) state: Mutex<State>,
    pump_wanted: Condvar,
    patience: Duration,
    active: AtomicUsize,
}

/// A connection in the transmission phase.
#[derive(Debug)]
pub(super) struct Connection {
    shared: Arc<Shared>,
    pump: Option<std::thread::JoinHandle<()>>,
}

impl Connection {
    /// Takes over a connection whose handshake is done.
    pub(super) fn start(
        stream: Arc<Stream>,
        (read, write): (ReadHalf, WriteHalf),
        style: HeaderStyle,
        patience: Duration,
    ) -> io::Result<Self> {
        // Waking up now and then is what lets a reader notice a request without an answer.
        let tick = (patience / 4).clamp(Duration::from_millis(5), Duration::from_secs(1));
        stream.set_read_timeout(Some(tick))?;
        stream.set_write_timeout(Some(patience))?;
        let shared = Arc::new(Shared {
            style,
            stream,
            writer: Mutex::new(write),
            state: Mutex::new(State {
                next_id: 0,
                parked: Some(read),
                pending: HashMap::new(),
                calls: BTreeMap::new(),
                senders: 0,
                failure: None,
                closed: false,
            }),
            pump_wanted: Condvar::new(),
            patience,
            active: AtomicUsize::new(0),
        });
        let pump = Arc::clone(&shared);
        let pump =
            std::thread::Builder::new().name("nbd-pump".to_owned()).spawn(move || pump.pump())?;
        Ok(Self { shared, pump: Some(pump) })
    }

    /// The calls under way, for choosing the least busy connection.
    pub(super) fn active_calls(&self) -> usize {
        self.shared.active.load(Ordering::Relaxed)
    }

    /// Whether the connection failed.
    pub(super) fn is_dead(&self) -> bool {
        self.shared.state.lock().failure.is_some()
    }

    /// Sends the requests and waits for all their replies. Data of reads goes into `into`, whose
    /// first byte is the export's byte `base`. Any number of callers at once.
    pub(super) fn call(
        &self,
        pieces: &[Piece<'_>],
        into: &mut [u8],
        base: u64,
    ) -> Result<Vec<Outcome>, Failure> {
        self.shared.active.fetch_add(1, Ordering::Relaxed);
        let result = self.shared.call(pieces, Place { into, base });
        self.shared.active.fetch_sub(1, Ordering::Relaxed);
        if let Err(failure) = &result {
            self.shared.fail(failure);
        }
        result
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let shared = &self.shared;
        let alive = {
            let mut state = shared.state.lock();
            state.closed = true;
            shared.pump_wanted.notify_all();
            state.failure.is_none()
        };
        if alive {
            // A polite goodbye lets the server close files at once; it has no reply, and no
            // connection is worth waiting for longer than this.
            let _ = shared.stream.set_write_timeout(Some(Duration::from_secs(1)));
            let goodbye =
                RequestHeader { flags: 0, command: cmd::DISC, cookie: 0, offset: 0, length: 0 };
            let mut bytes = Vec::new();
            if goodbye.encode(shared.style, &mut bytes).is_ok() {
                let _ = shared.writer.lock().send(&bytes, &[]);
            }
        }
        shared.stream.shutdown();
        if let Some(pump) = self.pump.take() {
            // It ends by itself; a panic in it was its own.
            let _ = pump.join();
        }
    }
}

impl Shared {
    fn call(&self, pieces: &[Piece<'_>], mut place: Place<'_>) -> Result<Vec<Outcome>, Failure> {
        if pieces.is_empty() {
            return Ok(Vec::new());
        }
        let has_payload = pieces.iter().any(|piece| !piece.payload.is_empty());
        let (id, first_cookie) = self.register(pieces, has_payload)?;
        let sent = self.send(pieces, first_cookie);
        {
            let mut state = self.state.lock();
            if has_payload {
                state.senders -= 1;
            }
            if let Some(call) = state.calls.get_mut(&id) {
                call.sending = false;
                call.progress = Instant::now();
            }
            if sent.is_err() {
                state.calls.remove(&id);
            }
        }
        sent?;
        self.collect(id, &mut place)
    }

    /// Notes what is going to be asked, before any of it can be answered.
    fn register(&self, pieces: &[Piece<'_>], has_payload: bool) -> Result<(u64, u64), Failure> {
        let slow = pieces
            .iter()
            .any(|piece| matches!(piece.command, cmd::FLUSH | cmd::TRIM | cmd::WRITE_ZEROES));
        let patience =
            if slow { self.patience.saturating_mul(SLOW_REQUEST_FACTOR) } else { self.patience };
        let mut state = self.state.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone().after());
        }
        let (id, first_cookie) = (state.next_id, state.next_id + 1);
        state.next_id += 1 + pieces.len() as u64;
        for ((piece, wanted), cookie) in pieces.iter().enumerate().zip(first_cookie..) {
            let assembly = Assembly::new(wanted.range, wanted.expected.clone());
            let pending = Pending { call: id, piece, assembly };
            state.pending.insert(cookie, pending);
        }
        let call = Call {
            wake: Arc::new(Condvar::new()),
            sending: true,
            waiting: false,
            turn: None,
            remaining: pieces.len(),
            outcomes: vec![None; pieces.len()],
            kept: Vec::new(),
            progress: Instant::now(),
            patience,
        };
        state.calls.insert(id, call);
        if has_payload {
            state.senders += 1;
            self.call_pump(&state);
        }
        Ok((id, first_cookie))
    }

    fn send(&self, pieces: &[Piece<'_>], first_cookie: u64) -> Result<(), Failure> {
        let mut bytes = Vec::with_capacity(pieces.len() * 32);
        let mut writer = self.writer.lock();
        let lost = |error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                Failure::lost("the server takes no requests any more")
            }
            _ => Failure::lost(format!("sending a request: {error}")),
        };
        for (piece, cookie) in pieces.iter().zip(first_cookie..) {
            let with_payload = !piece.payload.is_empty();
            let extended = self.style == HeaderStyle::Extended;
            let header = RequestHeader {
                flags: if with_payload && extended {
                    piece.flags | cmd_flag::PAYLOAD_LEN
                } else {
                    piece.flags
                },
                command: piece.command,
                cookie,
                offset: piece.range.offset,
                length: if with_payload { piece.payload.len() as u64 } else { piece.range.length },
            };
            header.encode(self.style, &mut bytes)?;
            if with_payload {
                writer.send(&bytes, piece.payload).map_err(lost)?;
                bytes.clear();
            }
        }
        if bytes.is_empty() {
            return Ok(());
        }
        writer.send(&bytes, &[]).map_err(lost)
    }

    /// Waits until all replies of the call are there, reading the socket when it is its turn.
    fn collect(&self, id: u64, place: &mut Place<'_>) -> Result<Vec<Outcome>, Failure> {
        loop {
            let baton = {
                let mut state = self.state.lock();
                match self.wait_for_turn(&mut state, id)? {
                    Ok(baton) => baton,
                    Err(call) => {
                        drop(state);
                        return finish(call, place);
                    }
                }
            };
            if let Err(failure) = self.receive(Some(id), baton, place) {
                self.state.lock().calls.remove(&id);
                return Err(failure);
            }
        }
    }

    /// The baton, or the finished call.
    fn wait_for_turn(
        &self,
        state: &mut MutexGuard<'_, State>,
        id: u64,
    ) -> Result<Result<Baton, Call>, Failure> {
        loop {
            if let Some(failure) = state.failure.clone() {
                state.calls.remove(&id);
                return Err(failure.after());
            }
            let inner = &mut **state;
            let Some(call) = inner.calls.get_mut(&id) else {
                return Err(Failure::lost("the call was given up"));
            };
            call.waiting = false;
            if let Some(baton) = call.turn.take() {
                return Ok(Ok(baton));
            }
            if call.remaining == 0 {
                return match inner.calls.remove(&id) {
                    Some(call) => Ok(Err(call)),
                    None => Err(Failure::lost("the call was given up")),
                };
            }
            if let Some(half) = inner.parked.take() {
                return Ok(Ok(Baton { half, header: None }));
            }
            call.waiting = true;
            let wake = Arc::clone(&call.wake);
            wake.wait(state);
        }
    }

    /// Passes the baton on: to the caller that has waited longest, or to where the next one, or
    /// the pump, finds it.
    pub(super) fn release(&self, state: &mut State, half: ReadHalf) {
        let waiting = state.calls.values_mut().find(|call| call.may_take_turn());
        if let Some(call) = waiting {
            call.turn = Some(Baton { half, header: None });
            call.wake.notify_one();
        } else {
            state.parked = Some(half);
            self.call_pump(state);
        }
    }

    fn call_pump(&self, state: &State) {
        if state.senders > 0 && state.parked.is_some() && !state.pending.is_empty() {
            self.pump_wanted.notify_one();
        }
    }

    /// Takes replies while callers send and none waits. Ends with the connection.
    fn pump(&self) {
        loop {
            let half = {
                let mut state = self.state.lock();
                loop {
                    if state.closed || state.failure.is_some() {
                        return;
                    }
                    if state.senders > 0
                        && !state.pending.is_empty()
                        && let Some(half) = state.parked.take()
                    {
                        break half;
                    }
                    self.pump_wanted.wait(&mut state);
                }
            };
            let baton = Baton { half, header: None };
            let mut nowhere = Place { into: &mut [], base: 0 };
            if let Err(failure) = self.receive(None, baton, &mut nowhere) {
                self.fail(&failure);
                return;
            }
        }
    }

    /// Fails where a call has waited too long for any part of a reply.
    pub(super) fn check_patience(&self) -> Result<(), Failure> {
        let state = self.state.lock();
        if let Some(failure) = &state.failure {
            return Err(failure.clone().after());
        }
        let now = Instant::now();
        let stuck = state.calls.values().find(|call| {
            !call.sending
                && call.remaining > 0
                && now.saturating_duration_since(call.progress) > call.patience
        });
        match stuck {
            Some(call) => Err(Failure::lost(format!(
                "no answer from the server for {} ms",
                call.patience.as_millis()
            ))),
            None => Ok(()),
        }
    }

    /// Gives the connection up and wakes everybody. The first failure stays.
    fn fail(&self, failure: &Failure) {
        let mut state = self.state.lock();
        if state.failure.is_none() {
            tracing::debug!(detail = %failure.detail, "NBD connection failed");
            state.failure = Some(failure.clone());
        }
        for call in state.calls.values() {
            call.wake.notify_one();
        }
        self.pump_wanted.notify_all();
        self.stream.shutdown();
    }
}

impl Failure {
    /// What a caller sees that did not find the failure itself.
    fn after(self) -> Self {
        Self { damaged: false, ..self }
    }
}

/// Puts what was kept aside where it belongs, and unwraps the outcomes.
fn finish(call: Call, place: &mut Place<'_>) -> Result<Vec<Outcome>, Failure> {
    for kept in call.kept {
        place.put(&kept)?;
    }
    call.outcomes
        .into_iter()
        .map(|outcome| outcome.ok_or_else(|| Failure::lost("a reply is missing")))
        .collect()
}
