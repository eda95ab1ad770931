//! Who did what to which disk: one JSON object per line and request.
//!
//! A line is written when an answer has ended, so that it tells how many bytes the client was given and whether it
//! got all of them. Fields, in this order: `time` (RFC 3339, UTC), `peer`, `key` (its name, or null), `method`,
//! `path` (without the query), `disk` (or null), `status`, `bytes`, `complete`, `duration_ms`. A line about a freeze
//! has its id as `freeze` after `disk`, one about a VM its name as `vm` before that, one about management objects what was asked as
//! `call` after `vm` (and, of a method, a line with the status 0 before it is run), and that of its making, or of the attempt, the list `disks` after that: all
//! disks as they were asked for. Requests without a good key are written, too. Lines are written by a thread of its own: a slow disk under the log must not stop
//! the answers; what it cannot keep up with is counted and told in the log itself.

use crate::error::{AgentError, Result};
use crate::server::Peer;
use crate::state::Shared;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use serde::Serialize;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Lines that wait to be written. Past that they are counted instead: memory is bounded.
const QUEUE_LINES: usize = 8192;
/// About the bytes of the lines that wait: one that makes a freeze may name many disks.
const QUEUE_BYTES: usize = 64 << 20;
/// The most characters of a path in a line: clients choose them.
const MAX_PATH_CHARS: usize = 1024;
/// How often it is looked whether the file was moved away, as programs that rotate logs do.
const REOPEN_INTERVAL: Duration = Duration::from_secs(1);

/// What a handler tells of its request, as an extension of its response.
#[derive(Clone, Debug, Default)]
pub struct Note {
    /// Whose key it was.
    pub key: Option<Arc<str>>,
    /// The disk, as the client named it.
    pub disk: Option<String>,
    /// The VM, as the client named it.
    pub vm: Option<String>,
    /// What was asked of the host's management objects.
    pub call: Option<String>,
    /// The freeze that was made or used.
    pub freeze: Option<String>,
    /// The disks of a freeze that was to be made, as the client named them.
    pub disks: Vec<String>,
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Record {
    /// When it came, in UTC.
    pub time: jiff::Timestamp,
    /// Who sent it, `ADDRESS:PORT`.
    pub peer: Option<String>,
    /// The name of the key.
    pub key: Option<String>,
    /// The method.
    pub method: String,
    /// The path without the query.
    pub path: String,
    /// The disk, as the client named it.
    pub disk: Option<String>,
    /// The VM, as the client named it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// What was asked of the host's management objects: a method as `CLASS.METHOD`, or what was looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub call: Option<String>,
    /// The freeze that was made or used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub freeze: Option<String>,
    /// The disks of a freeze that was to be made, as the client named them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<String>,
    /// The answer's status; 0 in the line that a method is about to be run.
    pub status: u16,
    /// The bytes of the answer's body that were taken.
    pub bytes: u64,
    /// Whether that were all of them.
    pub complete: bool,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
}

impl Record {
    fn new(peer: Option<Peer>, method: &str, path: &str) -> Self {
        Self {
            time: jiff::Timestamp::now(),
            peer: peer.map(|peer| peer.0.to_string()),
            key: None,
            method: method.into(),
            path: path.chars().take(MAX_PATH_CHARS).collect(),
            disk: None,
            vm: None,
            call: None,
            freeze: None,
            disks: Vec::new(),
            status: 0,
            bytes: 0,
            complete: false,
            duration_ms: 0,
        }
    }

    /// That something is about to be done that goes on whatever becomes of the request: a line before the one with
    /// the answer, which there may never be.
    pub fn begun(peer: Option<Peer>, note: Note, method: &str, path: &str) -> Self {
        let mut record = Self::new(peer, method, path);
        record.take(note);
        record
    }

    fn take(&mut self, note: Note) {
        let shortened = |name: String| name.chars().take(MAX_PATH_CHARS).collect();
        self.key = note.key.map(|key| key.to_string());
        self.disk = note.disk.map(shortened);
        self.vm = note.vm.map(shortened);
        self.call = note.call.map(shortened);
        self.freeze = note.freeze;
        self.disks = note.disks.into_iter().map(shortened).collect();
    }

    /// About how much memory it takes.
    fn weight(&self) -> usize {
        let names = self.disks.iter().chain(&self.disk).chain(&self.vm).chain(&self.call);
        let names = names.chain([&self.path]);
        names.map(|name| name.len() + size_of::<String>()).sum::<usize>() + size_of::<Self>()
    }
}

/// The log. Lines that are not written yet are written when the last of its clones is dropped.
#[derive(Clone)]
pub struct AuditLog(Option<Arc<Writer>>);

struct Writer {
    queue: Mutex<Option<SyncSender<Record>>>,
    queued_bytes: Arc<AtomicUsize>,
    lost: Arc<AtomicU64>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl AuditLog {
    /// Keeps nothing. For tests.
    pub const fn none() -> Self {
        Self(None)
    }

    /// Appends to the file at `path`, which only the agent's account can read if it is made here.
    ///
    /// # Errors
    /// Where it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let failed =
            |error| AgentError::io(format!("open the audit log {}", path.display()), error);
        let file = LogFile::open(path).map_err(failed)?;
        let (queue, lines) = sync_channel(QUEUE_LINES);
        let lost = Arc::new(AtomicU64::new(0));
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let lines = Lines { lines, queued_bytes: Arc::clone(&queued_bytes) };
        let counted = Arc::clone(&lost);
        let thread = std::thread::Builder::new()
            .name("audit-log".into())
            .spawn(move || write_lines(file, &lines, &counted))
            .map_err(failed)?;
        Ok(Self(Some(Arc::new(Writer {
            queue: Mutex::new(Some(queue)),
            queued_bytes,
            lost,
            thread: Mutex::new(Some(thread)),
        }))))
    }

    /// Has a line written. Does not wait.
    pub fn write(&self, record: Record) {
        let Some(writer) = &self.0 else { return };
        let weight = record.weight();
        let before = writer.queued_bytes.fetch_add(weight, Ordering::Relaxed);
        let has_room = before.saturating_add(weight) <= QUEUE_BYTES;
        let queue = writer.queue.lock();
        let queued = has_room && queue.as_ref().is_some_and(|queue| queue.try_send(record).is_ok());
        if !queued {
            writer.queued_bytes.fetch_sub(weight, Ordering::Relaxed);
            writer.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The thread ends when the queue has no sender any more.
        self.queue.lock().take();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the audit log ended early");
        }
    }
}

/// The lines that wait.
struct Lines {
    lines: Receiver<Record>,
    queued_bytes: Arc<AtomicUsize>,
}

impl Lines {
    /// The next one, waited for; none once there will be no more.
    fn next(&self) -> Option<Record> {
        self.taken(self.lines.recv().ok())
    }

    /// The next one, where it is there already.
    fn next_now(&self) -> Option<Record> {
        self.taken(self.lines.try_recv().ok())
    }

    fn taken(&self, record: Option<Record>) -> Option<Record> {
        let record = record?;
        self.queued_bytes.fetch_sub(record.weight(), Ordering::Relaxed);
        Some(record)
    }
}

fn write_lines(mut file: LogFile, lines: &Lines, lost: &AtomicU64) {
    let mut failed = false;
    while let Some(record) = lines.next() {
        let mut text = Vec::new();
        add_lost(&mut text, lost);
        add_line(&mut text, &record);
        // What is there already goes with it, in one write.
        while text.len() < (64 << 10)
            && let Some(record) = lines.next_now()
        {
            add_line(&mut text, &record);
        }
        let written = file.reopen_if_moved().and_then(|()| file.file.write_all(&text));
        if let Err(error) = written {
            if !failed {
                tracing::error!(%error, "the audit log {} cannot be written", file.path.display());
            }
            lost.fetch_add(1, Ordering::Relaxed);
            failed = true;
        } else {
            failed = false;
        }
    }
    if let Err(error) = file.file.sync_data() {
        tracing::error!(%error, "the audit log {} cannot be written", file.path.display());
    }
}

fn add_line(text: &mut Vec<u8>, record: &Record) {
    match serde_json::to_writer(&mut *text, record) {
        Ok(()) => text.push(b'\n'),
        Err(error) => tracing::error!(%error, "a line of the audit log"),
    }
}

fn add_lost(text: &mut Vec<u8>, lost: &AtomicU64) {
    let lost = lost.swap(0, Ordering::Relaxed);
    if lost > 0 {
        let line = serde_json::json!({ "time": jiff::Timestamp::now(), "lost_lines": lost });
        text.extend_from_slice(line.to_string().as_bytes());
        text.push(b'\n');
    }
}

/// The file, which somebody may move away while it is written.
struct LogFile {
    path: PathBuf,
    file: File,
    looked: Instant,
}

impl LogFile {
    fn open(path: &Path) -> std::io::Result<Self> {
        let mut options = File::options();
        options.append(true).create(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        Ok(Self { path: path.to_path_buf(), file: options.open(path)?, looked: Instant::now() })
    }

    fn reopen_if_moved(&mut self) -> std::io::Result<()> {
        if self.looked.elapsed() < REOPEN_INTERVAL {
            return Ok(());
        }
        self.looked = Instant::now();
        if !self.is_at_path() {
            self.file = Self::open(&self.path)?.file;
        }
        Ok(())
    }

    #[cfg(unix)]
    fn is_at_path(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let number = |metadata: &std::fs::Metadata| (metadata.dev(), metadata.ino());
        let (there, here) = (std::fs::metadata(&self.path), self.file.metadata());
        matches!((&there, &here), (Ok(there), Ok(here)) if number(there) == number(here))
    }

    /// Windows does not let anybody move a file that is open.
    #[cfg(not(unix))]
    fn is_at_path(&self) -> bool {
        true
    }
}

/// The layer around all handlers that has the lines written.
pub async fn record(State(state): State<Shared>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let peer = request.extensions().get::<Peer>().copied();
    let mut record = Record::new(peer, request.method().as_str(), request.uri().path());
    let is_head = request.method() == http::Method::HEAD;
    let mut response = next.run(request).await;
    if let Some(note) = response.extensions_mut().remove::<Note>() {
        record.take(note);
    }
    record.status = response.status().as_u16();
    // Nobody takes the body of an answer to HEAD.
    record.complete = is_head;
    let log = state.audit.clone();
    response.map(|inner| Body::new(AuditedBody { inner, log, began, record: Some(record) }))
}

/// A body that is counted, and noted when it is dropped.
struct AuditedBody {
    inner: Body,
    log: AuditLog,
    began: Instant,
    record: Option<Record>,
}

impl http_body::Body for AuditedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        let ended = http_body::Body::is_end_stream(&self.inner);
        if let Some(record) = &mut self.record {
            match &polled {
                Poll::Ready(Some(Ok(frame))) => {
                    let bytes = frame.data_ref().map_or(0, Bytes::len);
                    record.bytes = record.bytes.saturating_add(bytes as u64);
                    record.complete |= ended;
                }
                Poll::Ready(None) => record.complete = true,
                Poll::Ready(Some(Err(_))) | Poll::Pending => {}
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        http_body::Body::is_end_stream(&self.inner)
    }

    fn size_hint(&self) -> SizeHint {
        http_body::Body::size_hint(&self.inner)
    }
}

impl Drop for AuditedBody {
    fn drop(&mut self) {
        if let Some(mut record) = self.record.take() {
            // A body without bytes is never asked for them.
            record.complete |= record.bytes == 0 && http_body::Body::is_end_stream(&self.inner);
            let took = self.began.elapsed().as_millis();
            record.duration_ms = u64::try_from(took).unwrap_or(u64::MAX);
            self.log.write(record);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(bytes: u64) -> Record {
        Record {
            time: "2026-11-21T03:00:00Z".parse().unwrap(),
            peer: Some("10.0.0.1:5000".into()),
            key: Some("reader".into()),
            method: "GET".into(),
            path: "/vdisk/a\"/info".into(),
            disk: Some("/srv/a\"".into()),
            vm: None,
            call: None,
            freeze: None,
            disks: Vec::new(),
            status: 200,
            bytes,
            complete: true,
            duration_ms: 3,
        }
    }

    #[test]
    fn lines_are_json_and_all_there_when_the_log_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.log");
        let log = AuditLog::open(&path).unwrap();
        for bytes in 0..100 {
            log.write(example(bytes));
        }
        drop(log);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 100);
        assert_eq!(
            text.lines().next().unwrap(),
            "{\"time\":\"2026-11-21T03:00:00Z\",\"peer\":\"10.0.0.1:5000\",\"key\":\"reader\",\
             \"method\":\"GET\",\"path\":\"/vdisk/a\\\"/info\",\"disk\":\"/srv/a\\\"\",\"status\":200,\
             \"bytes\":0,\"complete\":true,\"duration_ms\":3}"
        );
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_log_that_was_moved_away_is_begun_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.log");
        let mut file = LogFile::open(&path).unwrap();
        std::fs::rename(&path, directory.path().join("audit.log.1")).unwrap();
        file.looked = Instant::now().checked_sub(REOPEN_INTERVAL).unwrap();
        file.reopen_if_moved().unwrap();
        file.file.write_all(b"x").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"x");
    }

    #[test]
    fn lines_that_wait_take_no_more_memory_than_they_may() {
        let (queue, lines) = sync_channel(QUEUE_LINES);
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let lost = Arc::new(AtomicU64::new(0));
        let writer = Writer {
            queue: Mutex::new(Some(queue)),
            queued_bytes: Arc::clone(&queued_bytes),
            lost: Arc::clone(&lost),
            thread: Mutex::new(None),
        };
        let log = AuditLog(Some(Arc::new(writer)));
        let large = Record { disks: vec!["x".repeat(1 << 20)], ..example(0) };
        for _ in 0..80 {
            log.write(large.clone());
        }
        assert!(queued_bytes.load(Ordering::Relaxed) <= QUEUE_BYTES);
        let lines = Lines { lines, queued_bytes };
        let written = std::iter::from_fn(|| lines.next_now()).count() as u64;
        assert!(written >= 60 && written + lost.load(Ordering::Relaxed) == 80, "{written}");
        assert_eq!(lines.queued_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn lines_that_were_lost_are_told() {
        let mut text = Vec::new();
        let lost = AtomicU64::new(7);
        add_lost(&mut text, &lost);
        add_lost(&mut text, &lost);
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("\"lost_lines\":7") && text.lines().count() == 1);
    }
}
