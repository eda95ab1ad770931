//! Transfers under way: how many one client may have, how fast, and how they are watched and ended.
//!
//! Every stream of content, in either direction and over any interface, is a [`Transfer`] from before its first
//! byte to after its last. It holds a place among the limits of its client, so that a place is free again
//! whatever way a transfer ends: the value is dropped.

use crate::count::Count;
use crate::limits::Limits;
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::Serialize;
use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::num::NonZeroU64;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio::time::Instant;
use vmtide_block::CancelToken;

/// How many transfers that ended are remembered, so that a client can ask why.
const REMEMBERED: usize = 256;

/// The most characters of a disk's name that are kept: clients choose them.
const MAX_DISK_CHARS: usize = 1024;

/// What a client that was idle may send at once before its limit of bytes a second holds.
const BURST: Duration = Duration::from_millis(250);

/// The direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TransferKind {
    /// From a disk to the client.
    Read,
    /// From the client to a disk.
    Write,
}

/// How a transfer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TransferState {
    /// Under way.
    Running,
    /// All of it was handed to the connection, or written and flushed.
    Complete,
    /// An error ended it.
    Failed,
    /// Somebody asked for its end.
    Cancelled,
    /// The client went away.
    Aborted,
}

/// A transfer as it is told.
#[derive(Clone, Debug, Serialize)]
pub struct TransferView {
    /// Its id.
    pub id: String,
    /// The direction.
    pub kind: TransferKind,
    /// The disk as it was asked for.
    pub disk: String,
    /// How it stands.
    pub state: TransferState,
    /// Why it failed.
    pub error: Option<String>,
    /// Bytes of content, where they are known before.
    pub total_bytes: Option<u64>,
    /// Bytes of content that were moved.
    pub done_bytes: u64,
    /// Bytes that went over the connection for them.
    pub wire_bytes: u64,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
}

/// Why a transfer cannot begin now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Refused {
    /// This client has as many as it may.
    #[error("this key has {limit} transfers under way, as many as it may: wait for one to end")]
    Client {
        /// The limit.
        limit: usize,
    },
    /// All clients together have.
    #[error("the agent has {limit} transfers under way, as many as it does: ask again later")]
    Agent {
        /// The limit.
        limit: usize,
    },
}

#[derive(Debug)]
struct Job {
    id: String,
    client: Arc<str>,
    kind: TransferKind,
    disk: String,
    total_bytes: OnceLock<u64>,
    done_bytes: AtomicU64,
    wire_bytes: AtomicU64,
    started_at: Timestamp,
    end: Mutex<End>,
    cancel: CancelToken,
}

#[derive(Debug)]
struct End {
    state: TransferState,
    error: Option<String>,
    at: Option<Timestamp>,
    /// Wakes the transfer when it is cancelled.
    waker: Option<oneshot::Sender<()>>,
}

impl Job {
    fn view(&self) -> TransferView {
        let end = self.end.lock();
        TransferView {
            id: self.id.clone(),
            kind: self.kind,
            disk: self.disk.clone(),
            state: end.state,
            error: end.error.clone(),
            total_bytes: self.total_bytes.get().copied(),
            done_bytes: self.done_bytes.load(Ordering::Relaxed),
            wire_bytes: self.wire_bytes.load(Ordering::Relaxed),
            started_at: self.started_at,
            ended_at: end.at,
        }
    }

    /// Notes how it ended; only the first time counts.
    fn end(&self, state: TransferState, error: Option<String>) {
        let mut end = self.end.lock();
        if end.state == TransferState::Running {
            *end = End { state, error, at: Some(Timestamp::now()), waker: None };
        }
    }
}

/// All transfers of an agent.
#[derive(Debug)]
pub struct Transfers {
    /// The threads that read and write for them.
    threads: Count,
    per_client: usize,
    total: usize,
    bytes_per_second: Option<NonZeroU64>,
    state: Mutex<State>,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    running: Vec<Arc<Job>>,
    ended: VecDeque<Arc<Job>>,
    /// One for each name of a key that was ever used: few.
    paces: HashMap<Arc<str>, Arc<Pace>>,
}

impl Transfers {
    /// None yet.
    pub fn new(limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            threads: Count::default(),
            per_client: limits.streams_per_client,
            total: limits.streams_total,
            bytes_per_second: limits.bytes_per_second_per_client,
            state: Mutex::default(),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
        })
    }

    /// Begins a transfer of a client, if it may have one more.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn begin(
        self: &Arc<Self>,
        client: &Arc<str>,
        kind: TransferKind,
        disk: &str,
    ) -> Result<Transfer, Refused> {
        let mut state = self.state.lock();
        if state.running.len() >= self.total {
            return Err(Refused::Agent { limit: self.total });
        }
        let own = state.running.iter().filter(|job| job.client == *client).count();
        if own >= self.per_client {
            return Err(Refused::Client { limit: self.per_client });
        }
        let (waker, cancelled) = oneshot::channel();
        let job = Arc::new(Job {
            id: random_id(),
            client: Arc::clone(client),
            kind,
            disk: disk.chars().take(MAX_DISK_CHARS).collect(),
            total_bytes: OnceLock::new(),
            done_bytes: AtomicU64::new(0),
            wire_bytes: AtomicU64::new(0),
            started_at: Timestamp::now(),
            end: Mutex::new(End {
                state: TransferState::Running,
                error: None,
                at: None,
                waker: Some(waker),
            }),
            cancel: CancelToken::new(),
        });
        state.running.push(Arc::clone(&job));
        let pace = self.bytes_per_second.map(|bytes_per_second| {
            let pace = state.paces.entry(Arc::clone(client));
            Arc::clone(pace.or_insert_with(|| Arc::new(Pace::new(bytes_per_second))))
        });
        Ok(Transfer { registry: Arc::clone(self), job, cancelled: Some(cancelled), pace })
    }

    /// The transfers of a client: running ones, then those that ended, the last one first.
    pub fn of_client(&self, client: &str) -> Vec<TransferView> {
        let state = self.state.lock();
        let all = state.running.iter().chain(state.ended.iter().rev());
        all.filter(|job| &*job.client == client).map(|job| job.view()).collect()
    }

    /// One transfer of a client.
    pub fn find(&self, client: &str, id: &str) -> Option<TransferView> {
        self.of_client(client).into_iter().find(|view| view.id == id)
    }

    /// Asks a transfer of a client to end; false where there is none, true also where it ended already.
    pub fn cancel(&self, client: &str, id: &str) -> bool {
        let state = self.state.lock();
        let mut all = state.running.iter().chain(state.ended.iter());
        let Some(job) = all.find(|job| &*job.client == client && job.id == id) else {
            return false;
        };
        job.cancel.cancel();
        let waker = job.end.lock().waker.take();
        job.end(TransferState::Cancelled, None);
        if let Some(waker) = waker {
            // The transfer may have ended just now.
            let _ = waker.send(());
        }
        true
    }

    /// How many are running.
    pub fn running(&self) -> usize {
        self.state.lock().running.len()
    }

    /// The threads that read and write for transfers now.
    pub const fn threads(&self) -> &Count {
        &self.threads
    }

    /// What was moved since the start: content read and written, bytes sent and received for it.
    pub fn totals(&self) -> TransferTotals {
        TransferTotals {
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
            received_bytes: self.received_bytes.load(Ordering::Relaxed),
        }
    }

    fn forget(&self, job: &Arc<Job>) {
        let mut state = self.state.lock();
        state.running.retain(|other| !Arc::ptr_eq(other, job));
        if state.ended.len() >= REMEMBERED {
            state.ended.pop_front();
        }
        state.ended.push_back(Arc::clone(job));
    }
}

/// Sums over all transfers since the start, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransferTotals {
    /// Content read from disks.
    pub read_bytes: u64,
    /// Content written to disks.
    pub written_bytes: u64,
    /// What was sent for it.
    pub sent_bytes: u64,
    /// What was received for it.
    pub received_bytes: u64,
}

/// One transfer. Dropping it ends it: as aborted, unless it was said how.
#[derive(Debug)]
pub struct Transfer {
    registry: Arc<Transfers>,
    job: Arc<Job>,
    cancelled: Option<oneshot::Receiver<()>>,
    pace: Option<Arc<Pace>>,
}

impl Transfer {
    /// Its id, for the header of the answer.
    pub fn id(&self) -> &str {
        &self.job.id
    }

    /// Says how many bytes of content it has; only the first time counts.
    pub fn set_total_bytes(&self, bytes: u64) {
        let _ = self.job.total_bytes.set(bytes);
    }

    /// A flag for work on threads that block.
    pub fn cancel_token(&self) -> CancelToken {
        self.job.cancel.clone()
    }

    /// Ready once somebody asked for its end.
    pub fn poll_cancelled(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.job.cancel.is_cancelled() {
            return Poll::Ready(());
        }
        let Some(cancelled) = &mut self.cancelled else {
            return Poll::Pending;
        };
        match Pin::new(cancelled).poll(context) {
            Poll::Ready(Ok(())) => Poll::Ready(()),
            // It ended; nobody can cancel it any more.
            Poll::Ready(Err(_)) => {
                self.cancelled = None;
                Poll::Pending
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// Until when `bytes` have to wait, because of the limit of this client; none where they may go at once.
    /// They are counted in any case.
    pub fn wait_for_share(&self, bytes: u64) -> Option<Instant> {
        self.pace.as_ref()?.reserve(bytes, Instant::now())
    }

    /// Counts what was moved: content, and the bytes on the connection for it.
    pub fn moved(&self, content_bytes: u64, wire_bytes: u64) {
        self.counter().moved(content_bytes, wire_bytes);
    }

    /// What counts for it on another thread.
    pub fn counter(&self) -> TransferCounter {
        TransferCounter { registry: Arc::clone(&self.registry), job: Arc::clone(&self.job) }
    }

    /// The threads that read and write for transfers, this one and others.
    pub fn threads(&self) -> &Count {
        &self.registry.threads
    }

    /// It is whole.
    pub fn complete(&self) {
        self.job.end(TransferState::Complete, None);
    }

    /// It failed.
    pub fn fail(&self, reason: &str) {
        self.job.end(TransferState::Failed, Some(reason.to_owned()));
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.job.end(TransferState::Aborted, None);
        // A thread that still works for it may stop.
        self.job.cancel.cancel();
        self.registry.forget(&self.job);
    }
}

/// Counts for a transfer from another thread.
#[derive(Clone, Debug)]
pub struct TransferCounter {
    registry: Arc<Transfers>,
    job: Arc<Job>,
}

impl TransferCounter {
    /// Counts what was moved: content, and the bytes on the connection for it.
    pub fn moved(&self, content_bytes: u64, wire_bytes: u64) {
        self.job.done_bytes.fetch_add(content_bytes, Ordering::Relaxed);
        self.job.wire_bytes.fetch_add(wire_bytes, Ordering::Relaxed);
        let (content, wire) = match self.job.kind {
            TransferKind::Read => (&self.registry.read_bytes, &self.registry.sent_bytes),
            TransferKind::Write => (&self.registry.written_bytes, &self.registry.received_bytes),
        };
        content.fetch_add(content_bytes, Ordering::Relaxed);
        wire.fetch_add(wire_bytes, Ordering::Relaxed);
    }
}

/// The share of one client: each piece of its transfers begins where the one before it ends.
#[derive(Debug)]
struct Pace {
    bytes_per_second: NonZeroU64,
    /// When everything that was let through is over, at the given rate.
    busy_until: Mutex<Option<Instant>>,
}

impl Pace {
    const fn new(bytes_per_second: NonZeroU64) -> Self {
        Self { bytes_per_second, busy_until: Mutex::new(None) }
    }

    fn reserve(&self, bytes: u64, now: Instant) -> Option<Instant> {
        let nanoseconds =
            u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.get());
        let lasts = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let mut busy_until = self.busy_until.lock();
        let begins = busy_until.map_or(earliest, |busy| busy.max(earliest));
        *busy_until = Some(begins.checked_add(lasts).unwrap_or(begins));
        (begins > now).then_some(begins)
    }
}

/// An id that nobody guesses. Without a source of randomness it is still one of its own.
pub(crate) fn random_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut bytes = [0u8; 16];
    if getrandom::fill(&mut bytes).is_err() {
        bytes[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes());
    }
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfers(per_client: usize, total: usize) -> Arc<Transfers> {
        let limits =
            Limits { streams_per_client: per_client, streams_total: total, ..Limits::default() };
        Transfers::new(&limits)
    }

    #[test]
    fn places_are_limited_and_come_back() {
        let transfers = transfers(2, 3);
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let begin = |client| transfers.begin(client, TransferKind::Read, "disk");
        let first = begin(&a).unwrap();
        let _second = begin(&a).unwrap();
        assert_eq!(begin(&a).unwrap_err(), Refused::Client { limit: 2 });
        let _third = begin(&b).unwrap();
        assert_eq!(begin(&b).unwrap_err(), Refused::Agent { limit: 3 });
        drop(first);
        assert!(begin(&b).is_ok());
        assert_eq!(transfers.running(), 2);
    }

    #[test]
    fn only_the_own_transfers_are_seen_and_cancelled() {
        let transfers = transfers(4, 4);
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let transfer = transfers.begin(&a, TransferKind::Write, "disk").unwrap();
        let id = transfer.id().to_owned();
        assert!(transfers.find(&b, &id).is_none() && !transfers.cancel(&b, &id));
        assert!(transfers.cancel(&a, &id) && transfer.cancel_token().is_cancelled());
        transfer.moved(3, 4);
        transfer.complete();
        drop(transfer);
        let view = transfers.find(&a, &id).unwrap();
        assert_eq!((view.state, view.done_bytes), (TransferState::Cancelled, 3));
        assert_eq!(transfers.totals().received_bytes, 4);
        for _ in 0..2 * REMEMBERED {
            drop(transfers.begin(&a, TransferKind::Read, "disk"));
        }
        assert_eq!(transfers.of_client(&a).len(), REMEMBERED);
    }

    #[test]
    fn a_share_is_kept_whatever_the_pieces() {
        let pace = Pace::new(NonZeroU64::new(1000).unwrap());
        let start = Instant::now();
        let mut now = start;
        for _ in 0..100 {
            if let Some(until) = pace.reserve(100, now) {
                now = until;
            }
        }
        // 10,000 bytes at 1000 a second, less the burst of the beginning and the last piece.
        let took = now - start;
        assert!(
            took >= Duration::from_millis(9600) && took <= Duration::from_millis(9900),
            "{took:?}"
        );
    }
}
