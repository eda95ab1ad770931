//! The side that hosts the disk.

use super::protocol::{
    Answer, MAX_ITEMS, MAX_READ_BYTES, MAX_REQUEST_BYTES, Request, receive, send,
};
use super::socket::{listen, socket_path};
use crate::id::Series;
use crate::view::FrozenView;
use crate::{Result, TrackError, TrackedDisk};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashMap;
use std::io::{self, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use vmtide_block::{BlockDevice, ByteRange};

/// The most callers at once; further ones are hung up on. Each has a thread and a few MiB.
const MAX_CALLERS: usize = 64;

/// How long writes are held for one who froze several disks and does not go on.
const HOLD_PATIENCE: Duration = Duration::from_secs(10);

/// How long one who does not take its answer is waited for.
const SEND_PATIENCE: Duration = Duration::from_secs(30);

/// How often it is looked whether to end.
const POLL_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What all callers share.
struct Shared {
    disk: Arc<TrackedDisk>,
    stopping: AtomicBool,
    callers: Mutex<HashMap<u64, UnixStream>>,
    /// Views by their token, for further connections.
    views: Mutex<HashMap<String, Weak<dyn BlockDevice>>>,
}

/// Answers those who ask about a disk. Dropping it ends that, and what they froze.
pub(crate) struct ControlServer {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
    socket: PathBuf,
}

impl ControlServer {
    /// Listens beside the image at `path`, whose lock the caller has.
    pub fn start(path: &Path, disk: &Arc<TrackedDisk>) -> Result<Self> {
        let socket = socket_path(path);
        let failed = |error| TrackError::io(format!("listen on {}", socket.display()), error);
        let listener = listen(&socket).map_err(failed)?;
        let shared = Arc::new(Shared {
            disk: Arc::clone(disk),
            stopping: AtomicBool::new(false),
            callers: Mutex::default(),
            views: Mutex::default(),
        });
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("track-control".to_owned());
        let thread = thread.spawn(move || accept(&listener, &for_thread)).map_err(failed)?;
        Ok(Self { shared, thread: Some(thread), socket })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        for stream in self.shared.callers.lock().values() {
            // It may have gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            // A panic in it was its own.
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    let mut threads = Vec::new();
    let mut next = 0u64;
    while !shared.stopping.load(Ordering::Acquire) {
        let mut ready = [PollFd::new(listener, PollFlags::IN)];
        if !matches!(poll(&mut ready, Some(&POLL_INTERVAL)), Ok(1..)) {
            continue;
        }
        let Ok((stream, _)) = listener.accept() else {
            continue;
        };
        threads.retain(|thread: &std::thread::JoinHandle<()>| !thread.is_finished());
        next += 1;
        match begin(stream, shared, next) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                tracing::debug!(%error, "one who asks about a tracked disk is hung up on")
            }
        }
    }
    for stream in shared.callers.lock().values() {
        let _ = stream.shutdown(Shutdown::Both);
    }
    for thread in threads {
        let _ = thread.join();
    }
}

fn begin(
    stream: UnixStream,
    shared: &Arc<Shared>,
    number: u64,
) -> io::Result<std::thread::JoinHandle<()>> {
    // On some systems what is accepted is as the listener is.
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(SEND_PATIENCE))?;
    {
        let mut callers = shared.callers.lock();
        if callers.len() >= MAX_CALLERS {
            return Err(io::Error::other("there are too many"));
        }
        callers.insert(number, stream.try_clone()?);
    }
    let for_thread = Arc::clone(shared);
    let run = move || {
        let ended = Caller::new(stream, &for_thread).and_then(Caller::serve);
        if let Err(error) = ended {
            tracing::debug!(%error, "one who asked about a tracked disk has gone");
        }
        for_thread.callers.lock().remove(&number);
    };
    let spawned = std::thread::Builder::new().name("track-caller".to_owned()).spawn(run);
    if spawned.is_err() {
        shared.callers.lock().remove(&number);
    }
    spawned
}

/// One connection.
struct Caller<'a> {
    shared: &'a Shared,
    input: BufReader<UnixStream>,
    output: UnixStream,
    /// What it reads from.
    device: Option<Arc<dyn BlockDevice>>,
}

impl<'a> Caller<'a> {
    fn new(stream: UnixStream, shared: &'a Shared) -> io::Result<Self> {
        let output = stream.try_clone()?;
        Ok(Self { shared, input: BufReader::new(stream), output, device: None })
    }

    fn serve(mut self) -> io::Result<()> {
        while !self.shared.stopping.load(Ordering::Acquire) {
            let Some(request) = receive(&mut self.input, MAX_REQUEST_BYTES)? else {
                return Ok(());
            };
            if let Err(error) = self.answer(request)? {
                send(&mut self.output, &Answer::of_error(&error))?;
            }
        }
        Ok(())
    }

    /// Answers one request; the inner error is the answer.
    fn answer(&mut self, request: Request) -> io::Result<Result<()>> {
        let disk = &self.shared.disk;
        let answered = match request {
            Request::State => Ok(Answer::State(disk.state())),
            Request::Checkpoint => disk.checkpoint().map(|id| Answer::Id(id.to_string())),
            Request::Changes { id, offset, length, max_ranges } => {
                let most = usize::try_from(max_ranges).unwrap_or(MAX_ITEMS).min(MAX_ITEMS);
                disk.changes_since(&id, ByteRange::new(offset, length), most).map(|page| {
                    let ranges =
                        page.ranges.iter().map(|range| (range.offset, range.length)).collect();
                    Answer::Changes { ranges, processed_bytes: page.processed_bytes }
                })
            }
            Request::SetEnabled(true) => disk.enable().map(|()| Answer::Done),
            Request::SetEnabled(false) => disk.disable().map(|()| Answer::Done),
            // One that comes too late: the writes went on already.
            Request::Resume => Ok(Answer::Done),
            Request::Freeze { hold } => return self.freeze(hold),
            Request::Open => self.keep(Arc::clone(disk) as Arc<dyn BlockDevice>, None),
            Request::Attach { token } => self.attach(&token),
            Request::Read { offset, length } => return self.read(offset, length),
            Request::Extents { offset, length } => self.extents(ByteRange::new(offset, length)),
        };
        match answered {
            Ok(answer) => send(&mut self.output, &answer).map(Ok),
            Err(error) => Ok(Err(error)),
        }
    }

    fn freeze(&mut self, hold: bool) -> io::Result<Result<()>> {
        let disk = Arc::clone(&self.shared.disk);
        if !hold {
            return match disk.freeze().and_then(|view| self.keep_view(view)) {
                Ok(answer) => send(&mut self.output, &answer).map(Ok),
                Err(error) => Ok(Err(error)),
            };
        }
        // "Done" says that writes are held; the view is told when it is saved, after they go on.
        let frozen = disk.freeze_while(|| {
            send(&mut self.output, &Answer::Done)?;
            self.wait_for_resume()
        });
        match frozen {
            Ok((view, Ok(()))) => match self.keep_view(view) {
                Ok(answer) => send(&mut self.output, &answer).map(Ok),
                Err(error) => Ok(Err(error)),
            },
            Ok((_, Err(error))) => Err(error),
            Err(error) => Ok(Err(error)),
        }
    }

    /// Waits for the word that writes may go on, within limits.
    fn wait_for_resume(&mut self) -> io::Result<()> {
        let begun = Instant::now();
        self.input.get_ref().set_read_timeout(Some(HOLD_PATIENCE))?;
        let request = receive::<Request>(&mut self.input, MAX_REQUEST_BYTES);
        self.input.get_ref().set_read_timeout(None)?;
        match request? {
            Some(Request::Resume) => Ok(()),
            other => Err(io::Error::other(format!(
                "{other:?} instead of the word to go on, after {} ms",
                begun.elapsed().as_millis()
            ))),
        }
    }

    fn keep_view(&mut self, view: FrozenView) -> Result<Answer> {
        let id = view.id().map(|id| id.to_string());
        self.keep(Arc::new(view), id)
    }

    /// Reads come from `device` from now on; further connections may attach to it.
    fn keep(&mut self, device: Arc<dyn BlockDevice>, id: Option<String>) -> Result<Answer> {
        let random = Series::random().map_err(|error| TrackError::io("make a token", error))?;
        let token: String = random.0.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut views = self.shared.views.lock();
        views.retain(|_, view| view.strong_count() > 0);
        views.insert(token.clone(), Arc::downgrade(&device));
        let answer = view_answer(token, &*device, id);
        self.device = Some(device);
        Ok(answer)
    }

    fn attach(&mut self, token: &str) -> Result<Answer> {
        let found = self.shared.views.lock().get(token).and_then(Weak::upgrade);
        let device = found.ok_or_else(|| {
            TrackError::unsupported(self.shared.disk.name(), "there is no such view any more")
        })?;
        let answer = view_answer(token.to_owned(), &*device, None);
        self.device = Some(device);
        Ok(answer)
    }

    fn device(&self) -> Result<&Arc<dyn BlockDevice>> {
        let none =
            || TrackError::unsupported(self.shared.disk.name(), "nothing was opened to be read");
        self.device.as_ref().ok_or_else(none)
    }

    fn read(&mut self, offset: u64, length: u32) -> io::Result<Result<()>> {
        let mut buffer = vec![0; usize::try_from(length.min(MAX_READ_BYTES)).unwrap_or(0)];
        let read = self.device().and_then(|device| Ok(device.read_at(&mut buffer, offset)?));
        if let Err(error) = read {
            return Ok(Err(error));
        }
        send(&mut self.output, &Answer::Data { length: length.min(MAX_READ_BYTES) })?;
        self.output.write_all(&buffer).map(Ok)
    }

    fn extents(&self, range: ByteRange) -> Result<Answer> {
        let mut extents = self.device()?.extents(range)?;
        extents.truncate(MAX_ITEMS);
        let plain =
            extents.iter().map(|extent| (extent.range.offset, extent.range.length, extent.kind));
        Ok(Answer::Extents { extents: plain.collect() })
    }
}

fn view_answer(token: String, device: &dyn BlockDevice, id: Option<String>) -> Answer {
    Answer::View {
        token,
        size_bytes: device.size_bytes(),
        block_size_bytes: device.block_size_bytes(),
        id,
    }
}
