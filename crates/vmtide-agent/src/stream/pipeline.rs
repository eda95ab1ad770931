//! The readers of one stream, and the order in which they hand over.
//!
//! 1. A reader takes a buffer; where all are under way it waits, and that is the only brake there is.
//! 2. Under the lock of the plan it claims the next piece and queues the place where the piece will appear.
//!    So the queue has the pieces in their order, whoever reads them and however long that takes.
//! 3. Without any lock it reads, encodes, and puts the buffer into its place.
//!
//! A reader that waits in step 1 holds no lock, and one that holds the lock has its buffer: none waits for
//! another in a circle. The end of the plan, an error and a closed stream end all readers.

use super::buffers::{Buffers, FilledBuffer};
use super::encode::{Encoder, Encoding};
use super::error::StreamError;
use super::plan::Planner;
use crate::count::Count;
use parking_lot::Mutex;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use vmtide_block::BlockDevice;

/// How content is read ahead. Changing these changes memory and speed, and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOptions {
    /// The most content of one piece in bytes: one read of the disk, one buffer. From 4 KiB to 1 MiB, a multiple
    /// of 4 KiB. Above 1 MiB a framed piece could break the limit of a frame.
    pub piece_bytes: usize,
    /// The buffers of one stream. With fewer than three, reading and sending wait for each other.
    pub read_ahead: usize,
    /// The threads that read one stream: what keeps more than one request at the disk.
    pub readers: usize,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self { piece_bytes: 1 << 20, read_ahead: 3, readers: 2 }
    }
}

impl StreamOptions {
    /// The same, inside of what is possible.
    #[must_use]
    pub fn checked(self) -> Self {
        let piece_bytes = self.piece_bytes.clamp(4 << 10, super::frame::MAX_CONTENT_BYTES);
        Self {
            piece_bytes: piece_bytes - piece_bytes % 4096,
            read_ahead: self.read_ahead.clamp(1, 1024),
            readers: self.readers.clamp(1, 64),
        }
    }
}

/// A piece as it is sent.
pub(super) struct Ready {
    pub(super) bytes: FilledBuffer,
    pub(super) content_bytes: u64,
    pub(super) last: bool,
}

pub(super) type Place = oneshot::Receiver<Result<Ready, StreamError>>;

/// What the readers of a stream share.
pub(super) struct Pipeline {
    device: Arc<dyn BlockDevice>,
    encoding: Encoding,
    options: StreamOptions,
    buffers: Arc<Buffers>,
    plan: Mutex<Plan>,
}

struct Plan {
    planner: Planner,
    /// None once the plan is at its end: the queue closes when its only sender goes.
    queue: Option<mpsc::UnboundedSender<Place>>,
}

impl Pipeline {
    /// A pipeline, and the queue of its pieces. Nothing is read before [`start`](Self::start).
    pub(super) fn new(
        device: Arc<dyn BlockDevice>,
        planner: Planner,
        encoding: Encoding,
        options: StreamOptions,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Place>) {
        let options = options.checked();
        // The queue holds no more places than there are buffers.
        let (queue, pieces) = mpsc::unbounded_channel();
        let buffers = Buffers::new(options.read_ahead, encoding.buffer_bytes(options.piece_bytes));
        let plan = Mutex::new(Plan { planner, queue: Some(queue) });
        (Arc::new(Self { device, encoding, options, buffers, plan }), pieces)
    }

    /// Starts the readers, no more than there can be pieces; they are among `threads`. Inside of a tokio runtime.
    pub(super) fn start(self: &Arc<Self>, threads: &Count) {
        let left = self.plan.lock().planner.left_bytes();
        let pieces = left.div_ceil(self.options.piece_bytes as u64).max(1);
        let readers = self.options.readers.min(usize::try_from(pieces).unwrap_or(usize::MAX));
        for _ in 0..readers {
            let pipeline = Arc::clone(self);
            // Dropping the handle lets the thread go on.
            let counted = threads.enter();
            drop(tokio::task::spawn_blocking(move || {
                pipeline.read();
                drop(counted);
            }));
        }
    }

    /// Ends the readers, as soon as they have finished what they are reading.
    pub(super) fn close(&self) {
        self.buffers.close();
    }

    fn read(&self) {
        let mut encoder = Encoder::new(self.encoding, self.options.piece_bytes);
        while let Some(mut buffer) = self.buffers.take() {
            let Some((piece, place)) = self.claim() else {
                return;
            };
            let outcome = piece.and_then(|piece| {
                let filled = encoder.encode(&*self.device, &piece.parts, buffer.space())?;
                buffer.set_filled(filled);
                let (content_bytes, last) = (piece.content_bytes, piece.last);
                Ok(Ready { bytes: buffer, content_bytes, last })
            });
            let failed = outcome.is_err();
            // Nobody waits for it any more: the client has gone.
            let gone = place.send(outcome).is_err();
            if failed || gone {
                self.plan.lock().queue = None;
                return;
            }
        }
    }

    /// The next piece and the place for it; none at the end.
    #[allow(clippy::type_complexity, reason = "a pair of what was claimed and where it goes")]
    fn claim(
        &self,
    ) -> Option<(
        Result<super::plan::Piece, StreamError>,
        oneshot::Sender<Result<Ready, StreamError>>,
    )> {
        let mut plan = self.plan.lock();
        let queue = plan.queue.clone()?;
        let piece = match plan.planner.next_piece(&*self.device, self.options.piece_bytes as u64) {
            Ok(Some(piece)) => Ok(piece),
            Ok(None) => {
                plan.queue = None;
                return None;
            }
            Err(error) => Err(error),
        };
        if !piece.as_ref().is_ok_and(|piece| !piece.last) {
            plan.queue = None;
        }
        let (sender, place) = oneshot::channel();
        queue.send(place).ok()?;
        Some((piece, sender))
    }
}
