//! The conversation with the plugin: lines and data in, files, data and messages out.

use crate::frame::{HEADER_BYTES, Header, Kind, MAX_PAYLOAD_BYTES};
use crate::{BackendError, Result};
use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmtide_block::CancelToken;
use vmtide_memory_ffi::{Memory, Slot};

/// The version of the protocol.
pub const PROTOCOL: u32 = 2;

/// How often a backend that sends nothing else says that it is at work.
const ALIVE_EVERY: Duration = Duration::from_secs(2);

/// The longest line. A file name has 4,096 bytes at most.
const MAX_LINE_BYTES: usize = 64 << 10;

/// The longest message; the daemon cuts what is longer.
const MAX_MESSAGE_BYTES: usize = 1800;

/// What the plugin says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// A line.
    Line(String),
    /// Data, which are in the link's buffer.
    Data,
    /// The end of a block.
    End,
}

/// The pipe to the plugin, and the memory between both.
pub struct Link {
    input: Box<dyn Read + Send>,
    output: Box<dyn Write + Send>,
    buffer: Vec<u8>,
    last_sent: Instant,
    memory: Option<Memory>,
    /// What the plugin was told of and has not taken yet, the oldest first: a slot is here for each place in it.
    lent: VecDeque<Arc<Slot>>,
    /// How many slots that are.
    slots_lent: usize,
    /// Set when the job is given up.
    pub cancel: CancelToken,
}

impl Link {
    /// A conversation over these two ends.
    pub fn new(
        input: Box<dyn Read + Send>,
        output: Box<dyn Write + Send>,
        cancel: CancelToken,
    ) -> Self {
        Self {
            input,
            output,
            buffer: Vec::new(),
            last_sent: Instant::now(),
            memory: None,
            lent: VecDeque::new(),
            slots_lent: 0,
            cancel,
        }
    }

    /// Has data go through this memory, which the plugin gave for it.
    pub fn share(&mut self, memory: Memory) {
        self.memory = Some(memory);
    }

    /// The memory whose slots can be lent to the plugin, where there is any.
    pub const fn memory(&self) -> Option<&Memory> {
        self.memory.as_ref()
    }

    /// Answers the plugin's greeting.
    ///
    /// # Errors
    /// Where it speaks another version.
    pub fn greet(&mut self) -> Result<()> {
        let line = self.line()?;
        if !line.starts_with(&format!("Hello vmtide-bacula {PROTOCOL} ")) {
            return Err(BackendError::protocol(format!("{line:?} for a greeting")));
        }
        self.command(&format!("Hello vmtide-bacula {PROTOCOL} {}", env!("CARGO_PKG_VERSION")))
    }

    /// The next thing that the plugin says; data are in [`data`](Self::data) until the next call.
    ///
    /// # Errors
    /// [`BackendError::Gone`] where it has gone, [`BackendError::Protocol`] where it sends something else.
    pub fn hear(&mut self) -> Result<Said> {
        let header = loop {
            let header = self.header()?;
            if header.kind != Kind::Taken {
                break header;
            }
            self.taken()?;
        };
        match header.kind {
            Kind::End => Ok(Said::End),
            Kind::Command if header.length <= MAX_LINE_BYTES => {
                self.fill(header.length)?;
                let line = std::str::from_utf8(&self.buffer)
                    .map_err(|_| BackendError::protocol("a line that is no text"))?;
                Ok(Said::Line(line.to_owned()))
            }
            Kind::Data => {
                self.fill(header.length)?;
                Ok(Said::Data)
            }
            other => Err(BackendError::protocol(format!("{other:?} of {} bytes", header.length))),
        }
    }

    /// The data of the last frame.
    pub fn data(&self) -> &[u8] {
        &self.buffer
    }

    /// The next thing, which must be a line.
    ///
    /// # Errors
    /// As [`hear`](Self::hear).
    pub fn line(&mut self) -> Result<String> {
        match self.hear()? {
            Said::Line(line) => Ok(line),
            other => Err(BackendError::protocol(format!("{other:?} instead of a line"))),
        }
    }

    fn header(&mut self) -> Result<Header> {
        let mut header = [0u8; HEADER_BYTES];
        self.read(&mut header)?;
        Header::parse(header).ok_or_else(|| BackendError::protocol("what is no frame"))
    }

    fn fill(&mut self, length: usize) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(length, 0);
        let outcome = self.read(&mut buffer);
        self.buffer = buffer;
        outcome
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.input.read_exact(buffer).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => BackendError::Gone,
            _ => BackendError::io("read from the plugin", error),
        })
    }

    /// Sends a line.
    ///
    /// # Errors
    /// [`BackendError::Gone`] where the plugin has gone.
    pub fn command(&mut self, line: &str) -> Result<()> {
        self.send(Kind::Command, line.replace('\n', " ").as_bytes())
    }

    /// Sends data, in as many frames as it takes.
    ///
    /// # Errors
    /// As [`command`](Self::command).
    pub fn send_data(&mut self, data: &[u8]) -> Result<()> {
        data.chunks(MAX_PAYLOAD_BYTES).try_for_each(|piece| self.send(Kind::Data, piece))
    }

    /// Sends what lies in a part of a slot, which nobody writes to until the plugin has taken it. Waits for the
    /// plugin where it has half of all slots: the other half is for what is being read.
    ///
    /// # Errors
    /// As [`hear`](Self::hear).
    pub fn lend(&mut self, slot: &Arc<Slot>, part: Range<usize>) -> Result<()> {
        let place = format!("{} {}", slot.offset() + part.start, part.len());
        self.send(Kind::Place, place.as_bytes())?;
        if self.lent.back().is_none_or(|last| !Arc::ptr_eq(last, slot)) {
            self.slots_lent += 1;
        }
        self.lent.push_back(Arc::clone(slot));
        let most = self.memory.as_ref().map_or(1, |memory| memory.slots().div_ceil(2));
        while self.slots_lent > most {
            match self.header()?.kind {
                Kind::Taken => self.taken()?,
                other => return Err(BackendError::protocol(format!("{other:?} among data"))),
            }
        }
        Ok(())
    }

    /// The plugin has taken the oldest of what it was told of.
    fn taken(&mut self) -> Result<()> {
        let slot = self.lent.pop_front();
        let slot =
            slot.ok_or_else(|| BackendError::protocol("that it took what it was not given"))?;
        if self.lent.front().is_none_or(|next| !Arc::ptr_eq(next, &slot)) {
            self.slots_lent -= 1;
        }
        Ok(())
    }

    /// Sends the end of a block.
    ///
    /// # Errors
    /// As [`command`](Self::command).
    pub fn end(&mut self) -> Result<()> {
        self.send(Kind::End, &[])
    }

    /// Says that work goes on, where nothing was sent for a while. To be called in every long loop.
    ///
    /// # Errors
    /// As [`command`](Self::command), and where the job was cancelled.
    pub fn alive(&mut self) -> Result<()> {
        self.cancel.check()?;
        if self.last_sent.elapsed() < ALIVE_EVERY {
            return Ok(());
        }
        self.send(Kind::Alive, &[])
    }

    /// Writes to the job's report.
    ///
    /// # Errors
    /// As [`command`](Self::command).
    pub fn info(&mut self, text: &str) -> Result<()> {
        tracing::info!("{text}");
        self.message(Kind::Info, text)
    }

    /// Writes a warning to the job's report.
    ///
    /// # Errors
    /// As [`command`](Self::command).
    pub fn warn(&mut self, text: &str) -> Result<()> {
        tracing::warn!("{text}");
        self.message(Kind::Warning, text)
    }

    /// Ends the job with the reason.
    ///
    /// # Errors
    /// As [`command`](Self::command).
    pub fn abort(&mut self, text: &str) -> Result<()> {
        tracing::error!("{text}");
        self.message(Kind::Abort, text)
    }

    fn message(&mut self, kind: Kind, text: &str) -> Result<()> {
        let end =
            (0..=MAX_MESSAGE_BYTES.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
        self.send(kind, &text.as_bytes()[..end.unwrap_or(0)])
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<()> {
        let header = Header { kind, length: payload.len() }.bytes();
        let outcome = write_both(self.output.as_mut(), &header, payload);
        self.last_sent = Instant::now();
        outcome.map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe => BackendError::Gone,
            _ => BackendError::io("write to the plugin", error),
        })
    }
}

/// Writes two pieces with one call where the pipe has room.
fn write_both(output: &mut dyn Write, first: &[u8], second: &[u8]) -> std::io::Result<()> {
    let written = loop {
        match output.write_vectored(&[IoSlice::new(first), IoSlice::new(second)]) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    if let Some(rest) = first.get(written..) {
        output.write_all(rest)?;
    }
    if let Some(rest) = second.get(written.saturating_sub(first.len())..) {
        output.write_all(rest)?;
    }
    output.flush()
}

/// Memory as a plugin gives it, for tests: what it is for the plugin, and what it is here.
#[cfg(test)]
#[cfg(target_os = "linux")]
pub(crate) mod testing {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use vmtide_memory_ffi::Memory;

    /// A plugin's file of `slots` slots, and the memory in it.
    pub(crate) fn memory(slots: usize, slot_bytes: usize) -> (File, Memory) {
        let file = memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, (slots * slot_bytes) as u64).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let length = slots * slot_bytes;
        let memory = Memory::inherited(file.as_raw_fd(), length, slot_bytes).unwrap();
        (File::from(file), memory)
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn link(said: &str, memory: &Memory) -> Link {
        let said = Cursor::new(said.as_bytes().to_vec());
        let mut link = Link::new(Box::new(said), Box::new(std::io::sink()), CancelToken::new());
        link.share(memory.clone());
        link
    }

    #[test]
    fn half_of_all_slots_are_lent_and_come_back_in_their_order() {
        let (_file, memory) = testing::memory(4, 100);
        let mut link = link("R000000\nR000000\nR000000\nC000004\nNext", &memory);
        let [one, two, three, four] = [0; 4].map(|_| Arc::new(memory.wait()));
        for part in [0..10, 20..30] {
            link.lend(&one, part).unwrap();
        }
        link.lend(&two, 0..100).unwrap();
        assert_eq!(link.lent.len(), 3);
        // The first one has to be taken twice.
        link.lend(&three, 5..6).unwrap();
        assert_eq!((link.lent.len(), link.slots_lent), (2, 2));
        let offset = one.offset();
        drop((one, two, four));
        drop(memory.wait());
        assert!(link.lent.iter().all(|slot| slot.offset() != offset));
        assert_eq!(link.line().unwrap(), "Next");
        assert_eq!((link.lent.len(), link.slots_lent), (1, 1));
    }

    #[test]
    fn a_plugin_that_takes_what_it_was_not_given_is_refused() {
        let (_file, memory) = testing::memory(4, 100);
        let mut nothing = link("R000000\n", &memory);
        assert!(matches!(nothing.hear(), Err(BackendError::Protocol(_))));
        let mut talks = link("C000004\nNext", &memory);
        let slots = [0; 3].map(|_| Arc::new(memory.wait()));
        let outcome = slots.iter().try_for_each(|slot| talks.lend(slot, 0..1));
        assert!(matches!(outcome, Err(BackendError::Protocol(_))));
        let mut gone = link("", &memory);
        let outcome = slots.iter().try_for_each(|slot| gone.lend(slot, 0..1));
        assert!(matches!(outcome, Err(BackendError::Gone)));
    }
}
