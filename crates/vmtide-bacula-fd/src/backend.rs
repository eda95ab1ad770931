//! The backend process, the pipe to it, and the memory that it may put a disk's bytes into.
//!
//! No call here waits for ever: both ends of the pipe are non-blocking and waited for in slices, between
//! which the wish to cancel is looked at; a backend that says nothing for too long is given up; one that
//! dies is seen at once, because its ends of the pipe close.

use crate::abi::message;
use crate::core::Core;
use crate::frame::{HEADER_BYTES, Header, Kind, MAX_PAYLOAD_BYTES};
use crate::memory::Memory;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The version of the protocol.
const PROTOCOL: u32 = 2;

/// How often the wish to cancel is looked at while waiting. Longer delays cancelling, shorter only costs.
const SLICE: Duration = Duration::from_millis(200);

/// How long the backend may say nothing, unless it asks for more: freezing a VM can take minutes.
const SILENCE: Duration = Duration::from_secs(1800);

/// How long the backend may take to greet.
const GREETING: Duration = Duration::from_secs(60);

/// How long a backend may take to release what it holds after it was told to stop. Then it is killed, and
/// the next job removes what it left, by its journal.
const RELEASE: Duration = Duration::from_secs(120);

/// How long a backend that has said its last word may take to end.
const EXIT: Duration = Duration::from_secs(10);

/// The size asked of the pipe. The default of 64 KiB has a switch of processes for every block.
const PIPE_BYTES: i32 = 1 << 20;

/// The size of the memory for a disk's bytes: a dozen pieces of a MiB, some being read and some on their way.
const MEMORY_BYTES: usize = 12 << 20;

/// The longest text that says where in the memory something is.
const MAX_PLACE_BYTES: usize = 40;

/// The most bytes of a line of a command.
const MAX_LINE_BYTES: usize = 64 << 10;

/// How large the backend's log may be before it is put aside.
const MAX_LOG_BYTES: u64 = 4 << 20;

/// Where the backend is looked for, after the plugin directory.
const PLACES: [&str; 3] = ["/usr/local/bin/vmtide", "/usr/bin/vmtide", "/opt/vmtide/bin/vmtide"];

/// Names another backend; for tests and unusual places. An absolute path.
const VARIABLE: &str = "VMTIDE_BACULA_BACKEND";

/// Why the job cannot go on: one line for its report.
#[derive(Debug)]
pub struct Failed(pub String);

impl Failed {
    fn with(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// The result of a conversation.
pub type Result<T> = std::result::Result<T, Failed>;

/// A frame that matters to the caller: messages were passed on already.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// A line.
    Command(String),
    /// Data of this many bytes follow, to be taken by [`Backend::data`].
    Data(usize),
    /// The end of a block.
    End,
}

/// A backend that runs.
pub struct Backend {
    child: Child,
    input: Option<ChildStdin>,
    output: ChildStdout,
    /// What the backend may put data into.
    memory: Option<Memory>,
    /// Bytes of the current data frame that were not taken yet.
    pending: usize,
    /// Where in the memory they are; none where they come on the pipe.
    place: Option<usize>,
    silence: Duration,
    cancelled: Arc<AtomicBool>,
    ended: bool,
    silent: bool,
}

impl Backend {
    /// Starts a backend and greets it. With `share` it may put its data into memory, where there is some to be had.
    ///
    /// # Errors
    /// Where there is none, or it is another program or version.
    pub fn start(
        core: Core,
        plugin_directory: &str,
        working_directory: &str,
        cancelled: Arc<AtomicBool>,
        share: bool,
    ) -> Result<Self> {
        let program = find(Path::new(plugin_directory))?;
        // Without it everything comes on the pipe, which takes longer and is as good.
        let memory = if share { Memory::create(MEMORY_BYTES).ok() } else { None };
        let mut command = Command::new(&program);
        command
            .args(["bacula-backend", "-v"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log_file(Path::new(working_directory)).map_or_else(Stdio::null, Stdio::from))
            .current_dir("/")
            // Signals for the daemon's group are not for the backend: it ends in order when told to.
            .process_group(0);
        if let Some(memory) = &memory {
            memory.hand_over(&mut command);
        }
        let mut child = command.spawn().map_err(|error| {
            Failed::with(format!("cannot start the backend {}: {error}", program.display()))
        })?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Failed::with("the backend was started without a pipe"));
        };
        for end in [input.as_fd(), output.as_fd()] {
            prepare(end).map_err(|error| Failed::with(format!("prepare the pipe: {error}")))?;
        }
        let mut this = Self {
            child,
            input: Some(input),
            output,
            memory,
            pending: 0,
            place: None,
            silence: GREETING,
            cancelled,
            ended: false,
            silent: false,
        };
        this.greet(core)?;
        this.silence = SILENCE;
        Ok(this)
    }

    fn greet(&mut self, core: Core) -> Result<()> {
        let version = env!("CARGO_PKG_VERSION");
        self.command(&format!("Hello vmtide-bacula {PROTOCOL} {version}"))?;
        let expected = format!("Hello vmtide-bacula {PROTOCOL} ");
        match self.frame(core)? {
            Frame::Command(line) if line.starts_with(&expected) => Ok(()),
            Frame::Command(line) => Err(Failed::with(format!(
                "the backend answered {line:?}: install the vmtide that this plugin came with"
            ))),
            _ => Err(Failed::with("the backend does not greet")),
        }
    }

    /// How the job's description says what memory there is.
    pub fn memory_line(&self) -> Option<String> {
        let memory = self.memory.as_ref()?;
        Some(format!("Memory={} {}", memory.descriptor(), memory.length()))
    }

    /// Has the backend's silence allowed for as long as it asks, within an hour and a day.
    pub fn allow_silence(&mut self, seconds: u64) {
        self.silence = Duration::from_secs(seconds.clamp(1, 86_400));
    }

    /// Sends a line.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    pub fn command(&mut self, line: &str) -> Result<()> {
        self.send(Kind::Command, line.as_bytes())
    }

    /// Sends the end of a block.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    pub fn end(&mut self) -> Result<()> {
        self.send(Kind::End, &[])
    }

    /// Sends data, in as many frames as it takes.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    pub fn send_data(&mut self, data: &[u8]) -> Result<()> {
        data.chunks(MAX_PAYLOAD_BYTES).try_for_each(|piece| self.send(Kind::Data, piece))
    }

    /// Waits for the next frame that matters; writes messages to the job's report.
    ///
    /// # Errors
    /// As [`data`](Self::data); where the backend gives up, with its reason.
    pub fn frame(&mut self, core: Core) -> Result<Frame> {
        if self.pending > 0 {
            return Err(Failed::with("data of the backend was left behind"));
        }
        loop {
            let mut header = [0u8; HEADER_BYTES];
            self.read(&mut header)?;
            let Some(header) = Header::parse(header) else {
                return Err(Failed::with("the backend sends what is no frame"));
            };
            match header.kind {
                Kind::Data => {
                    self.pending = header.length;
                    self.place = None;
                    return Ok(Frame::Data(header.length));
                }
                Kind::Place => {
                    let (offset, length) = self.read_place(header.length)?;
                    self.pending = length;
                    self.place = Some(offset);
                    return Ok(Frame::Data(length));
                }
                Kind::Taken => return Err(Failed::with("the backend sends what is the plugin's")),
                Kind::End => return Ok(Frame::End),
                Kind::Alive => {}
                Kind::Command => return Ok(Frame::Command(self.line(header.length)?)),
                Kind::Info => core.message(message::INFO, &self.line(header.length)?),
                Kind::Warning => core.message(message::WARNING, &self.line(header.length)?),
                Kind::Error => core.message(message::ERROR, &self.line(header.length)?),
                Kind::Abort => return Err(Failed(self.line(header.length)?)),
            }
        }
    }

    /// Takes bytes of the current data frame into `buffer`: all of it or as much as fits. 0 where the frame
    /// has no more.
    ///
    /// # Errors
    /// Where the job was cancelled, or the backend died or is silent for too long.
    pub fn data(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let length = self.pending.min(buffer.len());
        let buffer = &mut buffer[..length];
        let Some(offset) = self.place else {
            self.read(buffer)?;
            self.pending -= length;
            return Ok(length);
        };
        self.check_cancelled()?;
        if !self.memory.as_ref().is_some_and(|memory| memory.copy(offset, buffer)) {
            return Err(Failed::with("the backend's data lie outside of the memory"));
        }
        self.place = Some(offset + length);
        self.pending -= length;
        if self.pending == 0 {
            self.place = None;
            self.send(Kind::Taken, &[])?;
        }
        Ok(length)
    }

    /// Reads where data are, which must lie in the memory.
    fn read_place(&mut self, length: usize) -> Result<(usize, usize)> {
        if length > MAX_PLACE_BYTES {
            return Err(Failed::with(format!("the backend describes a place in {length} bytes")));
        }
        let line = self.line(length)?;
        let place = parse_place(&line).filter(|(offset, length)| {
            let end = offset.checked_add(*length);
            let size = self.memory.as_ref().map_or(0, Memory::length);
            *length > 0 && end.is_some_and(|end| end <= size)
        });
        place.ok_or_else(|| {
            Failed::with(format!("the backend's data lie outside of the memory ({line:?})"))
        })
    }

    /// Whether bytes of the current data frame are left.
    pub const fn has_pending(&self) -> bool {
        self.pending > 0
    }

    /// Ends the backend's work, well or not; after it the process is gone.
    ///
    /// # Errors
    /// Where a good end is not confirmed.
    pub fn finish(&mut self, core: Core, good: bool) -> Result<()> {
        if self.ended {
            return Ok(());
        }
        self.ended = true;
        let outcome = if good { self.say_good_bye(core) } else { Ok(()) };
        let in_order = good && outcome.is_ok();
        // Without its input the backend knows that nothing more comes.
        self.input = None;
        if in_order {
            self.wait(EXIT);
        } else {
            self.signal(libc::SIGTERM);
            // Who has stopped answering is not waited for as long as who has something to release.
            let patience = if self.silent { EXIT } else { RELEASE };
            self.drain(core, Instant::now() + patience);
            self.wait(Duration::ZERO);
        }
        outcome
    }

    fn say_good_bye(&mut self, core: Core) -> Result<()> {
        self.command("End ok")?;
        match self.frame(core)? {
            Frame::End => Ok(()),
            other => Err(Failed::with(format!("the backend ends with {other:?}"))),
        }
    }

    /// Takes what the backend still says, until it closes the pipe: it may wait for room in it, and it may
    /// have to say what it could not release.
    fn drain(&mut self, core: Core, deadline: Instant) {
        let mut rest = std::mem::take(&mut self.pending);
        if self.place.take().is_some() {
            rest = 0;
        }
        let mut buffer = vec![0u8; 64 << 10];
        loop {
            while rest > 0 {
                let length = rest.min(buffer.len());
                let Ok(count) = self.read_until(&mut buffer[..length], deadline) else { return };
                rest -= count;
            }
            let mut header = [0u8; HEADER_BYTES];
            let mut filled = 0;
            while filled < HEADER_BYTES {
                match self.read_until(&mut header[filled..], deadline) {
                    Ok(count) => filled += count,
                    Err(_) => return,
                }
            }
            let Some(header) = Header::parse(header) else { return };
            let kind = match header.kind {
                Kind::Info => message::INFO,
                // The job has ended already; what is left to tell is no second failure of it.
                Kind::Warning | Kind::Error | Kind::Abort => message::WARNING,
                _ => {
                    rest = header.length;
                    continue;
                }
            };
            let mut text = vec![0u8; header.length];
            let mut filled = 0;
            while filled < text.len() {
                match self.read_until(&mut text[filled..], deadline) {
                    Ok(count) => filled += count,
                    Err(_) => return,
                }
            }
            core.message(kind, &String::from_utf8_lossy(&text));
        }
    }

    /// Waits for the process's end, and kills it after the time given.
    fn wait(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Ok(Some(_)) | Err(_) => return,
                Ok(None) => break,
            }
        }
        // It may have ended just now, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn signal(&self, signal: i32) {
        if let Ok(process) = i32::try_from(self.child.id()) {
            // SAFETY: the process was started here and not waited for yet, so its number is still its own.
            unsafe { libc::kill(process, signal) };
        }
    }

    fn line(&mut self, length: usize) -> Result<String> {
        if length > MAX_LINE_BYTES {
            return Err(Failed::with(format!("the backend sends a line of {length} bytes")));
        }
        let mut bytes = vec![0u8; length];
        self.read(&mut bytes)?;
        String::from_utf8(bytes)
            .map_err(|_| Failed::with("the backend sends a line that is no text"))
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) && !self.ended {
            return Err(Failed::with("cancelled"));
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        let mut deadline = Instant::now() + self.silence;
        while filled < buffer.len() {
            self.check_cancelled()?;
            let count = self.read_until(&mut buffer[filled..], deadline)?;
            filled += count;
            deadline = Instant::now() + self.silence;
        }
        Ok(())
    }

    /// Reads at least one byte.
    fn read_until(&mut self, buffer: &mut [u8], deadline: Instant) -> Result<usize> {
        loop {
            match self.output.read(buffer) {
                Ok(0) => return Err(self.death()),
                Ok(count) => return Ok(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.check_cancelled()?;
                    self.check_deadline(deadline)?;
                    poll(self.output.as_fd(), libc::POLLIN);
                }
                Err(error) => return Err(Failed::with(format!("read from the backend: {error}"))),
            }
        }
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<()> {
        let header = Header { kind, length: payload.len() }.bytes();
        if payload.len() <= MAX_LINE_BYTES && kind == Kind::Command {
            let mut whole = header.to_vec();
            whole.extend_from_slice(payload);
            return self.write(&whole);
        }
        self.write(&header)?;
        self.write(payload)
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        let mut deadline = Instant::now() + self.silence;
        while !bytes.is_empty() {
            self.check_cancelled()?;
            let Some(input) = self.input.as_mut() else {
                return Err(Failed::with("the backend's input is closed"));
            };
            match input.write(bytes) {
                Ok(count) => {
                    bytes = bytes.get(count..).unwrap_or_default();
                    deadline = Instant::now() + self.silence;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    poll(input.as_fd(), libc::POLLOUT);
                    self.check_deadline(deadline)?;
                }
                Err(_) => return Err(self.death()),
            }
        }
        Ok(())
    }

    fn check_deadline(&mut self, deadline: Instant) -> Result<()> {
        if Instant::now() < deadline {
            return Ok(());
        }
        self.silent = true;
        let seconds = self.silence.as_secs();
        Err(Failed::with(format!("the backend has said nothing for {seconds} s and is given up")))
    }

    /// The error for a closed pipe. A backend that gives up says why before it goes, which is looked for
    /// where the pipe broke on the way to it.
    fn death(&mut self) -> Failed {
        let how = match self.child.try_wait() {
            Ok(Some(status)) => format!("{status}"),
            _ => "its pipe is closed".into(),
        };
        Failed::with(format!(
            "the backend ended before its work was done ({how}); see vmtide-backend.log in the daemon's \
             working directory"
        ))
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if !self.ended {
            self.input = None;
            self.signal(libc::SIGTERM);
            self.wait(EXIT);
        }
    }
}

/// `OFFSET LENGTH`, both decimal.
fn parse_place(line: &str) -> Option<(usize, usize)> {
    let (offset, length) = line.split_once(' ')?;
    let is_decimal = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_decimal(offset) || !is_decimal(length) {
        return None;
    }
    Some((offset.parse().ok()?, length.parse().ok()?))
}

/// The backend's program.
fn find(plugin_directory: &Path) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE).map(PathBuf::from) {
        return if path.is_absolute() && path.is_file() {
            Ok(path)
        } else {
            Err(Failed::with(format!("{VARIABLE} names no program: {}", path.display())))
        };
    }
    let beside = plugin_directory.join("vmtide");
    std::iter::once(beside.clone())
        .chain(PLACES.iter().map(PathBuf::from))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            Failed::with(format!(
                "the backend is not installed: put vmtide at {} or {}",
                PLACES.join(", "),
                beside.display()
            ))
        })
}

/// The backend's own log, put aside when it is large. None where it cannot be written.
fn log_file(working_directory: &Path) -> Option<File> {
    let path = working_directory.join("vmtide-backend.log");
    let is_large = std::fs::metadata(&path).is_ok_and(|file| file.len() > MAX_LOG_BYTES);
    if is_large {
        // Where it cannot be put aside it goes on growing, which is no reason to stop a backup.
        let _ = std::fs::rename(&path, working_directory.join("vmtide-backend.log.old"));
    }
    OpenOptions::new().append(true).create(true).open(path).ok()
}

/// Makes one end of the pipe non-blocking, and the pipe large where that is allowed.
fn prepare(end: BorrowedFd<'_>) -> std::io::Result<()> {
    // SAFETY: the descriptor is open; the calls take and give flags only.
    unsafe {
        let flags = libc::fcntl(end.as_raw_fd(), libc::F_GETFL);
        if flags < 0 || libc::fcntl(end.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
            return Err(std::io::Error::last_os_error());
        }
        #[cfg(target_os = "linux")]
        libc::fcntl(end.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_BYTES);
    }
    Ok(())
}

/// Waits until the end is ready, for one slice of time at most.
fn poll(end: BorrowedFd<'_>, events: i16) {
    let mut poll = libc::pollfd { fd: end.as_raw_fd(), events, revents: 0 };
    let slice = i32::try_from(SLICE.as_millis()).unwrap_or(200);
    // SAFETY: one structure that lives through the call. Errors end the slice, and the next try tells.
    unsafe { libc::poll(&raw mut poll, 1, slice) };
}
