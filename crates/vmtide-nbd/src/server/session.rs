//! One client, from its first byte to its last.

use super::budget::Budget;
use super::export::Export;
use super::handshake::{Agreed, Ended, Negotiation, greet};
use super::options::ServerOptions;
use super::requests::{ReadBuffer, Replies, Service, demand};
use crate::proto::constants::cmd;
use crate::proto::request::RequestHeader;
use crate::transport::{ReadHalf, Stream, TimedStream, WriteHalf, server_handshake, split};
use parking_lot::Mutex;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// The requests that wait for a worker. With the budget of memory this bounds what a client can
/// pile up.
const QUEUED_REQUESTS: usize = 32;

/// What all sessions of a server share.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) exports: Vec<Export>,
    pub(super) options: ServerOptions,
    pub(super) tls: Option<Arc<rustls::ServerConfig>>,
    pub(super) stopping: AtomicBool,
}

struct Job {
    header: RequestHeader,
    payload: Vec<u8>,
    memory_bytes: u64,
}

struct Writer<'a> {
    half: &'a Mutex<WriteHalf>,
}

impl Replies for Writer<'_> {
    fn send(&self, header: &[u8], payload: &[u8]) -> io::Result<()> {
        self.half.lock().send(header, payload)
    }
}

/// Serves a client until it leaves.
///
/// # Errors
/// Why it was hung up on.
pub(super) fn serve(common: &Common, stream: &Arc<Stream>) -> io::Result<()> {
    let mut timed = TimedStream::new(stream, common.options.handshake_timeout());
    let no_zeroes = greet(&mut timed)?;
    let new = |secure| Negotiation::new(&common.exports, &common.options, no_zeroes, secure);
    let (ended, tls) = match (new(false).run(&mut timed)?, &common.tls) {
        (Ended::StartTls, Some(config)) => {
            let mut tls = server_handshake(config, &mut timed)?;
            let mut secure = rustls::Stream::new(&mut tls, &mut timed);
            (new(true).run(&mut secure)?, Some(tls))
        }
        (ended, _) => (ended, None),
    };
    let Ended::Chosen(agreed) = ended else {
        return Ok(());
    };
    let stall = common.options.stall_timeout();
    stream.set_read_timeout(Some(stall))?;
    stream.set_write_timeout(Some(stall))?;
    let (read, write) = split(Arc::clone(stream), tls.map(Into::into));
    transmit(common, stream, &agreed, read, write)
}

fn transmit(
    common: &Common,
    stream: &Stream,
    agreed: &Agreed,
    mut read: ReadHalf,
    write: WriteHalf,
) -> io::Result<()> {
    let Some(export) = common.exports.get(agreed.export) else {
        return Ok(());
    };
    let write = Mutex::new(write);
    let budget = Budget::new(common.options.connection_bytes);
    let (sender, receiver) = sync_channel(QUEUED_REQUESTS);
    let receiver = Mutex::new(receiver);
    let broken = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..common.options.workers {
            let service = Service {
                export,
                agreed,
                max_payload_bytes: common.options.max_payload_bytes,
                replies: Writer { half: &write },
            };
            let (receiver, budget, broken) = (&receiver, &budget, &broken);
            std::thread::Builder::new().name("nbd-worker".to_owned()).spawn_scoped(
                scope,
                move || {
                    work(&service, receiver, budget, broken, stream);
                },
            )?;
        }
        let result = take_requests(common, agreed, &mut read, &sender, &budget);
        // Workers finish what is queued, answer it, and end.
        drop(sender);
        result
    })
}

fn work(
    service: &Service<'_, Writer<'_>>,
    receiver: &Mutex<Receiver<Job>>,
    budget: &Budget,
    broken: &AtomicBool,
    stream: &Stream,
) {
    let mut buffer = ReadBuffer::default();
    loop {
        let job = receiver.lock().recv();
        let Ok(job) = job else { return };
        // After a torn reply nothing more can be said; the queue is emptied for the budget's sake.
        if !broken.load(Ordering::Relaxed)
            && let Err(error) = service.serve(&job.header, &job.payload, &mut buffer)
        {
            tracing::debug!(%error, "NBD client takes no replies");
            broken.store(true, Ordering::Relaxed);
            stream.shutdown();
        }
        drop(job.payload);
        budget.give_back(job.memory_bytes);
    }
}

fn take_requests(
    common: &Common,
    agreed: &Agreed,
    read: &mut ReadHalf,
    sender: &SyncSender<Job>,
    budget: &Budget,
) -> io::Result<()> {
    let mut bytes = vec![0; agreed.style.request_header_bytes()];
    loop {
        if !fill(read, &mut bytes, Some(&common.stopping))? {
            return Ok(());
        }
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let header = RequestHeader::decode(agreed.style, &bytes).map_err(invalid)?;
        if header.command == cmd::DISC || common.stopping.load(Ordering::Relaxed) {
            return Ok(());
        }
        let demand =
            demand(agreed.style, &header, common.options.max_payload_bytes).map_err(invalid)?;
        budget.take(demand.memory_bytes);
        // Bounded by the largest payload, and by the budget.
        let mut payload = vec![0; usize::try_from(demand.payload_bytes).unwrap_or(0)];
        let whole = fill(read, &mut payload, None);
        if !matches!(whole, Ok(true)) {
            budget.give_back(demand.memory_bytes);
            return whole.map(drop);
        }
        let job = Job { header, payload, memory_bytes: demand.memory_bytes };
        if sender.send(job).is_err() {
            return Ok(());
        }
    }
}

/// Fills `buffer`; false where the client left before the first byte of a message. With
/// `resting` it may wait for ever for that one, unless the flag is set.
fn fill(
    read: &mut ReadHalf,
    mut buffer: &mut [u8],
    resting: Option<&AtomicBool>,
) -> io::Result<bool> {
    let mut started = resting.is_none();
    while !buffer.is_empty() {
        match read.read(buffer) {
            Ok(0) if !started => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                started = true;
                buffer = &mut buffer[count..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                let waits =
                    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
                let stopping = resting.is_none_or(|flag| flag.load(Ordering::Relaxed));
                if !waits || started || stopping {
                    return Err(error);
                }
            }
        }
    }
    Ok(true)
}
