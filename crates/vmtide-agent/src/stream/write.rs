//! Write-back: the body of a request becomes the content of a disk.
//!
//! The connection's task hands parts of the body to one thread that checks and writes them. Few parts wait in
//! between, so a slow disk slows its client down. The thread learns in so many words when the body is over:
//! a connection that was lost looks like no end of any stream.

use super::frame::{Frame, FrameError, FrameReader, MAX_CONTENT_BYTES};
use crate::limits::Limits;
use crate::transfers::{Transfer, TransferCounter};
use bytes::Bytes;
use http_body::Body;
use http_body_util::BodyExt;
use serde::Serialize;
use std::io::{self, Read};
use std::sync::Arc;
use thiserror::Error;
use tokio::sync::mpsc;
use vmtide_block::{AlignedBuffer, BlockError, ByteRange, CancelToken, WritableBlockDevice};

/// How many parts of a body may wait for the disk; each is at most some 400 KiB.
const QUEUED_PARTS: usize = 4;

/// Zeros are written in steps of this, between which it is looked whether to go on.
const ZERO_STEP_BYTES: u64 = 1 << 30;

/// What the body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteKind {
    /// Bytes, from this offset on.
    Raw {
        /// Where the first byte goes.
        offset: u64,
    },
    /// [Frames](super::frame).
    Ranges,
}

/// What was written, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WriteSummary {
    /// Data.
    pub written_bytes: u64,
    /// Ranges made zero without data.
    pub zeroed_bytes: u64,
    /// All of it.
    pub position: u64,
}

/// Why not everything was written; a part may have been.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The frames are not sound.
    #[error("{0}")]
    Damaged(FrameError),
    /// The next part of the body did not come in time.
    #[error("the body of the request did not arrive in time")]
    Timeout,
    /// The body was cut off.
    #[error("the body of the request was cut off")]
    Cut,
    /// The disk refused.
    #[error("{0}")]
    Disk(#[from] BlockError),
    /// The thread that writes ended without saying why.
    #[error("the write ended abnormally; the log of the agent says more")]
    WriterLost,
}

/// Writes a body to `device` and flushes it. `claim` is dropped when nothing is written any more, which may be
/// after this future was: a thread in the middle of a write cannot be stopped.
///
/// # Errors
/// [`WriteError`]; the disk then holds some part of the body.
pub async fn write_body<B>(
    body: B,
    device: Arc<dyn WritableBlockDevice>,
    kind: WriteKind,
    limits: &Limits,
    claim: impl Send + 'static,
    transfer: &mut Transfer,
) -> Result<WriteSummary, WriteError>
where
    B: Body<Data = Bytes> + Unpin,
{
    let (sender, receiver) = mpsc::channel(QUEUED_PARTS);
    let writer = Writer {
        device,
        cancel: transfer.cancel_token(),
        counter: transfer.counter(),
        summary: WriteSummary::default(),
    };
    let counted = transfer.threads().enter();
    let written = tokio::task::spawn_blocking(move || {
        let _counted = counted;
        let written = writer.run(kind, PartReader { receiver, part: Bytes::new(), ended: false });
        drop(claim);
        written
    });
    let received = receive(body, sender, limits, transfer).await;
    let written = written.await.unwrap_or(Err(WriteError::WriterLost));
    match (received, written) {
        // What happened to the body is why the writer saw no end of it.
        (Err(error), Err(WriteError::Cut | WriteError::Damaged(FrameError::Receive(_)))) => {
            Err(error)
        }
        (_, written) => written,
    }
}

enum BodyPart {
    Bytes(Bytes),
    End,
}

/// Hands the body over, part by part, until it ends or the writer wants no more.
async fn receive<B>(
    mut body: B,
    sender: mpsc::Sender<BodyPart>,
    limits: &Limits,
    transfer: &mut Transfer,
) -> Result<(), WriteError>
where
    B: Body<Data = Bytes> + Unpin,
{
    loop {
        let frame = tokio::select! {
            frame = tokio::time::timeout(limits.body_part_timeout, body.frame()) => frame,
            () = sender.closed() => return Ok(()),
            () = std::future::poll_fn(|context| transfer.poll_cancelled(context)) => return Ok(()),
        };
        let part = match frame.map_err(|_| WriteError::Timeout)? {
            None => BodyPart::End,
            Some(Err(_)) => return Err(WriteError::Cut),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(bytes) => BodyPart::Bytes(bytes),
                Err(_) => continue,
            },
        };
        let (length, ended) = match &part {
            BodyPart::Bytes(bytes) => (bytes.len() as u64, false),
            BodyPart::End => (0, true),
        };
        if let Some(until) = transfer.wait_for_share(length) {
            tokio::time::sleep_until(until).await;
        }
        transfer.moved(0, length);
        if sender.send(part).await.is_err() || ended {
            return Ok(());
        }
    }
}

/// The parts of a body as a stream of bytes for the thread that writes.
struct PartReader {
    receiver: mpsc::Receiver<BodyPart>,
    part: Bytes,
    ended: bool,
}

impl Read for PartReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.part.is_empty() {
            if self.ended {
                return Ok(0);
            }
            match self.receiver.blocking_recv() {
                Some(BodyPart::Bytes(bytes)) => self.part = bytes,
                Some(BodyPart::End) => self.ended = true,
                None => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
        }
        let length = self.part.len().min(buffer.len());
        let part = self.part.split_to(length);
        if let Some(place) = buffer.get_mut(..length) {
            place.copy_from_slice(&part);
        }
        Ok(length)
    }
}

/// The thread that writes.
struct Writer {
    device: Arc<dyn WritableBlockDevice>,
    cancel: CancelToken,
    counter: TransferCounter,
    summary: WriteSummary,
}

impl Writer {
    fn run(mut self, kind: WriteKind, source: impl Read) -> Result<WriteSummary, WriteError> {
        self.device.expect_bulk_writes();
        match kind {
            WriteKind::Raw { offset } => self.write_raw(offset, source)?,
            WriteKind::Ranges => self.write_frames(source)?,
        }
        self.cancel.check()?;
        self.device.flush()?;
        Ok(self.summary)
    }

    fn write_frames(&mut self, source: impl Read) -> Result<(), WriteError> {
        let mut frames = FrameReader::new(source, 0).map_err(WriteError::Damaged)?;
        loop {
            self.cancel.check()?;
            match frames.next_frame().map_err(WriteError::Damaged)? {
                Frame::Data { offset, content } => self.write(content, offset)?,
                Frame::Zero(range) => self.zero(range)?,
                Frame::End(_) => break,
            }
        }
        frames.expect_nothing_more().map_err(WriteError::Damaged)
    }

    fn write_raw(&mut self, offset: u64, mut source: impl Read) -> Result<(), WriteError> {
        let mut buffer = AlignedBuffer::new(MAX_CONTENT_BYTES);
        let mut at = offset;
        loop {
            self.cancel.check()?;
            let length = fill(&mut source, &mut buffer).map_err(|_| WriteError::Cut)?;
            let content = buffer.get(..length).unwrap_or_default();
            if content.is_empty() {
                return Ok(());
            }
            self.write(content, at)?;
            at = at.saturating_add(length as u64);
        }
    }

    fn write(&mut self, content: &[u8], offset: u64) -> Result<(), WriteError> {
        let length = content.len() as u64;
        self.device.check_range(ByteRange::new(offset, length))?;
        self.device.write_at(content, offset)?;
        self.summary.written_bytes += length;
        self.moved(length);
        Ok(())
    }

    fn zero(&mut self, range: ByteRange) -> Result<(), WriteError> {
        self.device.check_range(range)?;
        let mut at = range.offset;
        while at < range.end() {
            self.cancel.check()?;
            let step =
                ByteRange::from_bounds(at, range.end().min(at.saturating_add(ZERO_STEP_BYTES)));
            self.device.write_zeroes(step)?;
            self.summary.zeroed_bytes += step.length;
            self.moved(step.length);
            at = step.end();
        }
        Ok(())
    }

    fn moved(&mut self, length: u64) {
        self.summary.position += length;
        self.counter.moved(length, 0);
    }
}

/// Fills `buffer` as far as the source goes.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match source.read(rest)? {
            0 => break,
            length => filled += length,
        }
    }
    Ok(filled)
}
