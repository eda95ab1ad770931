//! Long calls: the work is done on a thread of its own, the caller's thread runs the callbacks.
//!
//! So a caller's callbacks are called where it expects them, one at a time, and none is called after
//! the call has ended.

use crate::args::Structure;
use crate::handle;
use crate::status::{Failure, Result, Status};
use std::ffi::{CString, c_char, c_void};
use std::io::{Read, Write};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::time::Duration;
use vmtide_block::{CancelToken, Progress};
use vmtide_engine::{Event, JobContext, Observer};

/// How often progress is told.
const INTERVAL: Duration = Duration::from_millis(100);

/// The most that a read callback is asked for at once, in bytes.
const READ_BYTES: usize = 1 << 20;

/// `vmtide_watch`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Watch {
    /// The size of the structure in bytes.
    pub struct_size: u64,
    /// What the callbacks are given.
    pub context: *mut c_void,
    /// Told how far the work is; anything but 0 cancels.
    pub progress: Option<unsafe extern "C" fn(*mut c_void, u64, u64, u64) -> i32>,
    /// Told of steps and warnings.
    pub message: Option<unsafe extern "C" fn(*mut c_void, *const c_char)>,
    /// 0, or a cancel flag.
    pub cancel: u64,
}

// SAFETY: `repr(C)`, begins with its size, and numbers and pointers may be zero.
unsafe impl Structure for Watch {}

/// `vmtide_write_callback`.
pub type WriteCallback = Option<unsafe extern "C" fn(*mut c_void, *const c_void, u64) -> i32>;

/// `vmtide_read_callback`.
pub type ReadCallback = Option<unsafe extern "C" fn(*mut c_void, *mut c_void, u64) -> i64>;

/// The callbacks for data of one call.
#[derive(Clone, Copy)]
pub(crate) struct DataCallbacks {
    pub write: WriteCallback,
    pub read: ReadCallback,
    pub context: *mut c_void,
}

impl DataCallbacks {
    pub const NONE: Self = Self { write: None, read: None, context: std::ptr::null_mut() };
}

/// What the working thread asks of the caller's.
enum Request {
    Message(CString),
    Write(Vec<u8>, SyncSender<bool>),
    Read(usize, SyncSender<Option<Vec<u8>>>),
}

/// The working thread's way to the caller's callbacks.
#[derive(Clone)]
pub(crate) struct Caller(Sender<Request>);

impl Observer for Caller {
    fn event(&self, event: Event) {
        if let Ok(json) = serde_json::to_string(&event) {
            // Whoever is gone does not listen.
            let _ = self.0.send(Request::Message(handle::c_string(&json)));
        }
    }
}

fn callback_failed() -> std::io::Error {
    std::io::Error::other("the callback said that it failed")
}

impl Write for Caller {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.0.send(Request::Write(data.to_vec(), reply)).map_err(|_| callback_failed())?;
        match answer.recv() {
            Ok(true) => Ok(data.len()),
            _ => Err(callback_failed()),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Read for Caller {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let (reply, answer) = mpsc::sync_channel(1);
        let capacity = buffer.len().min(READ_BYTES);
        self.0.send(Request::Read(capacity, reply)).map_err(|_| callback_failed())?;
        match answer.recv() {
            Ok(Some(data)) if data.len() <= buffer.len() => {
                buffer[..data.len()].copy_from_slice(&data);
                Ok(data.len())
            }
            _ => Err(callback_failed()),
        }
    }
}

/// Runs `work` with the caller's callbacks.
///
/// # Safety
/// The callbacks of `watch` and `data` may be called with their contexts until this returns.
pub(crate) unsafe fn run<T: Send>(
    watch: &Watch,
    data: DataCallbacks,
    work: impl FnOnce(JobContext<'_>, &Caller) -> Result<T> + Send,
) -> Result<T> {
    let flag = match watch.cancel {
        0 => CancelToken::new(),
        handle => handle::cancel(handle)?,
    };
    let progress = Progress::new();
    let (sender, requests) = mpsc::channel();
    std::thread::scope(|scope| {
        let (progress, flag) = (&progress, &flag);
        let working = std::thread::Builder::new()
            .name("vmtide".into())
            .spawn_scoped(scope, move || {
                let caller = Caller(sender);
                work(JobContext { progress, cancel: flag, observer: &caller }, &caller)
            })
            .map_err(|error| {
                Failure::new(Status::Failed, format!("no thread can be started: {error}"))
            })?;
        // SAFETY: by this function's own contract.
        unsafe { serve(watch, data, progress, flag, &requests) };
        working.join().unwrap_or_else(|_| {
            Err(Failure::new(
                Status::Internal,
                "a fault in libvmtide ended the work; standard error has the place: please report it",
            ))
        })
    })
}

/// Runs callbacks until the working thread has nothing more to ask.
///
/// # Safety
/// As [`run`].
unsafe fn serve(
    watch: &Watch,
    data: DataCallbacks,
    progress: &Progress,
    cancel: &CancelToken,
    requests: &Receiver<Request>,
) {
    let tell = || {
        if let Some(callback) = watch.progress {
            let now = progress.snapshot();
            // SAFETY: by the contract of `run`.
            let stop = unsafe {
                callback(watch.context, now.done_bytes, now.total_bytes, now.transferred_bytes)
            };
            if stop != 0 {
                cancel.cancel();
            }
        }
    };
    let mut told = std::time::Instant::now();
    loop {
        match requests.recv_timeout(INTERVAL) {
            Ok(Request::Message(text)) => {
                if let Some(callback) = watch.message {
                    // SAFETY: by the contract of `run`; the text lives until the callback returns.
                    unsafe { callback(watch.context, text.as_ptr()) };
                }
            }
            Ok(Request::Write(bytes, reply)) => {
                let taken = data.write.is_some_and(|callback| {
                    // SAFETY: by the contract of `run`; the bytes live until the callback returns.
                    let outcome = unsafe {
                        callback(data.context, bytes.as_ptr().cast(), bytes.len() as u64)
                    };
                    outcome == 0
                });
                // Whoever asked and does not wait any more needs no answer.
                let _ = reply.send(taken);
            }
            Ok(Request::Read(capacity, reply)) => {
                // SAFETY: by the contract of `run`.
                let _ = reply.send(unsafe { read_some(data, capacity) });
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if told.elapsed() >= INTERVAL {
            tell();
            told = std::time::Instant::now();
        }
    }
    tell();
}

/// Asks the read callback.
///
/// # Safety
/// As [`run`].
unsafe fn read_some(data: DataCallbacks, capacity: usize) -> Option<Vec<u8>> {
    let callback = data.read?;
    let mut buffer = vec![0u8; capacity];
    // SAFETY: by the contract of `run`; the buffer has `capacity` bytes.
    let count = unsafe { callback(data.context, buffer.as_mut_ptr().cast(), capacity as u64) };
    let count = usize::try_from(count).ok().filter(|count| *count <= capacity)?;
    buffer.truncate(count);
    Some(buffer)
}
