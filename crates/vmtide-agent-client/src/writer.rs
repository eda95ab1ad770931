//! A disk of an agent for writing: the target of a restore.
//!
//! An agent lets one client at a time write a disk, and puts every request on stable storage before it answers. So
//! writes are gathered: any number of threads fill a batch, and one of them sends it while the others fill the next.
//! A batch is kept until the agent has answered that it is on stable storage, so that one that was cut on the way is
//! sent again, as soon as the agent has let go of the try that was lost. Two batches are all the memory this takes.

use crate::AgentError;
use crate::device::{AgentDisk, in_context};
use crate::frames::FrameWriter;
use crate::resend;
use bytes::Bytes;
use parking_lot::{Condvar, Mutex, RwLock};
use vmtide_block::{BlockDevice, BlockError, ByteRange, Result, WritableBlockDevice};

/// The content of one batch. Every batch costs the agent a flush, which on a spinning disk takes as long as writing
/// some megabytes; two of them are held in memory.
const BATCH_BYTES: usize = 32 << 20;

/// The room that headers of frames and a last piece need beside the content.
const BATCH_CAPACITY: usize = BATCH_BYTES + (1 << 20);

/// The most frames of one batch, so that one of many small pieces is sent, too.
const BATCH_FRAMES: usize = 64 << 10;

/// A disk of an agent, for writing. What was written is on stable storage after a
/// [`flush`](WritableBlockDevice::flush); reading what was not flushed yet gives what was written.
pub struct WritableAgentDisk {
    disk: AgentDisk,
    state: Mutex<State>,
    /// A batch was sent, or failed for good.
    sent: Condvar,
    /// An agent need not let anybody read a disk that is being written. Taken for reading only with the state locked
    /// and nobody sending, so that no batch is between the two.
    reading: RwLock<()>,
}

#[derive(Default)]
struct State {
    filling: Option<Batch>,
    sending: bool,
    /// Why nothing can be written any more.
    failed: Option<String>,
}

struct Batch {
    frames: FrameWriter,
    touched: Vec<ByteRange>,
    position: u64,
}

impl Batch {
    fn new() -> Self {
        Self {
            frames: FrameWriter::with_capacity(BATCH_CAPACITY),
            touched: Vec::new(),
            position: 0,
        }
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.touched.is_empty()
            || self.frames.len() + bytes <= BATCH_BYTES && self.touched.len() < BATCH_FRAMES
    }
}

/// What is to be written.
#[derive(Clone, Copy)]
enum Piece<'a> {
    Data(&'a [u8]),
    Zeros,
}

impl WritableAgentDisk {
    pub(crate) fn new(disk: AgentDisk) -> Self {
        Self { disk, state: Mutex::default(), sent: Condvar::new(), reading: RwLock::new(()) }
    }

    fn add(&self, range: ByteRange, piece: Piece<'_>) -> Result<()> {
        self.check_range(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let bytes = if let Piece::Data(data) = piece { data.len() } else { 0 };
        let mut state = self.state.lock();
        loop {
            self.check_failed(&state)?;
            let batch = state.filling.get_or_insert_with(Batch::new);
            if batch.has_room(bytes) {
                match piece {
                    Piece::Data(data) => batch.frames.data(range.offset, data),
                    Piece::Zeros => batch.frames.zeros(range.offset, range.length),
                }
                batch.touched.push(range);
                batch.position = batch.position.saturating_add(range.length);
                return Ok(());
            }
            self.send(&mut state)?;
        }
    }

    fn check_failed(&self, state: &State) -> Result<()> {
        match &state.failed {
            None => Ok(()),
            Some(reason) => Err(BlockError::io(
                self.name(),
                std::io::Error::other(format!("an earlier write failed: {reason}")),
            )),
        }
    }

    /// Sends what is there, or waits for another thread that is sending. Afterwards there may be room.
    fn send(&self, state: &mut parking_lot::MutexGuard<'_, State>) -> Result<()> {
        if state.sending {
            self.sent.wait(state);
            return Ok(());
        }
        let Some(batch) = state.filling.take() else { return Ok(()) };
        state.sending = true;
        let sent = parking_lot::MutexGuard::unlocked(state, || {
            let frames = Bytes::from(batch.frames.finish());
            let _nobody_reads = self.reading.write();
            let shared = self.disk.client().shared();
            let _slot = shared.slot();
            resend::write(
                &shared.transport,
                self.disk.path(),
                frames,
                batch.position,
                self.disk.cancel(),
            )
        });
        state.sending = false;
        self.sent.notify_all();
        sent.map_err(|error: AgentError| {
            state.failed = Some(error.to_string());
            in_context(error, &self.name(), batch.touched.first().map_or(0, |range| range.offset))
        })
    }
}

impl BlockDevice for WritableAgentDisk {
    fn name(&self) -> String {
        self.disk.name()
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let wanted = ByteRange::new(offset, buffer.len() as u64);
        self.check_range(wanted)?;
        let mut state = self.state.lock();
        // Also a batch that another thread has taken and not sent yet is waited for.
        while state.sending
            || state.filling.as_ref().is_some_and(|batch| {
                batch.touched.iter().any(|range| !range.intersect(&wanted).is_empty())
            })
        {
            self.send(&mut state)?;
        }
        self.check_failed(&state)?;
        let nobody_writes = self.reading.read();
        drop(state);
        let _nobody_writes = nobody_writes;
        self.disk.read_at(buffer, offset)
    }
}

impl WritableBlockDevice for WritableAgentDisk {
    fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        let mut at = offset;
        self.check_range(ByteRange::new(offset, data.len() as u64))?;
        for piece in data.chunks(BATCH_BYTES / 8) {
            self.add(ByteRange::new(at, piece.len() as u64), Piece::Data(piece))?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.add(range, Piece::Zeros)
    }

    fn flush(&self) -> Result<()> {
        let mut state = self.state.lock();
        loop {
            self.check_failed(&state)?;
            if state.filling.is_none() && !state.sending {
                return Ok(());
            }
            self.send(&mut state)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AgentClient, AgentOptions, AgentUrl, Fingerprint};
    use std::time::Duration;
    use vmtide_block::CancelToken;

    /// A disk whose agent is not there.
    fn disk() -> WritableAgentDisk {
        let url = AgentUrl::parse("agent+https://127.0.0.1:1/x").unwrap();
        let options = AgentOptions {
            retry_time: Duration::ZERO,
            fingerprint: Some(Fingerprint([0; 32])),
            ..AgentOptions::default()
        };
        let client = AgentClient::new(&url, &options).unwrap();
        WritableAgentDisk::new(AgentDisk::new(client, "/x".into(), None, 4096, CancelToken::new()))
    }

    #[test]
    fn a_reader_waits_for_a_batch_that_was_taken_and_not_sent_yet() {
        let disk = disk();
        disk.state.lock().sending = true;
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| disk.read_at(&mut [0; 512], 0));
            // Time for a reader that does not wait to ask the agent.
            std::thread::sleep(Duration::from_millis(200));
            let mut state = disk.state.lock();
            state.sending = false;
            state.failed = Some("the disk is full".into());
            drop(state);
            disk.sent.notify_all();
            let error = reader.join().unwrap().unwrap_err().to_string();
            assert!(error.contains("the disk is full"), "{error}");
        });
    }
}
