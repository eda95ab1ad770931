//! An object of a bucket, open for reading.
//!
//! Opening reads the beginning of the object, with which comes its length: of most objects that is
//! all there is. (The end would do as well, but there are servers that fail where it is longer than
//! the object.) Readers that go forward in small steps get more than they ask for, so that their
//! next steps cost no request.

use crate::answer::Answer;
use crate::client::Request;
use crate::store::Core;
use bytes::Bytes;
use http::Method;
use parking_lot::Mutex;
use std::io::{Error, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vmtide_repo::{ObjectReader, RepoError, Result};

/// How much of the beginning comes with the opening.
const HEAD_BYTES: u64 = 64 << 10;

/// Steps up to this length are small.
const SMALL_BYTES: u64 = 256 << 10;

/// How much is read when a reader goes forward in small steps.
const AHEAD_BYTES: u64 = 1 << 20;

/// What all readers of a store may hold of what they read ahead.
const MAX_AHEAD_BYTES: u64 = 32 << 20;

/// A part of the object.
struct Window {
    offset: u64,
    bytes: Bytes,
}

impl Window {
    /// Copies from it where it has all of the buffer.
    fn copy(&self, buffer: &mut [u8], offset: u64) -> bool {
        let part = offset
            .checked_sub(self.offset)
            .and_then(|from| usize::try_from(from).ok())
            .and_then(|from| self.bytes.get(from..from.checked_add(buffer.len())?));
        if let Some(part) = part {
            buffer.copy_from_slice(part);
        }
        part.is_some()
    }
}

/// An object open for reading.
pub(crate) struct S3Reader {
    core: Arc<Core>,
    name: String,
    key: String,
    length_bytes: u64,
    head: Window,
    /// Where the last read ended.
    last_end: AtomicU64,
    ahead: Mutex<Option<Window>>,
}

impl S3Reader {
    /// Opens the object `name`, whose form is checked.
    ///
    /// # Errors
    /// [`RepoError::NotFound`], `Denied`, `Io`.
    pub(crate) fn open(core: Arc<Core>, name: &str) -> Result<Self> {
        let key = core.key(name);
        let request = Request::new(Method::GET, &key)
            .header("range", &format!("bytes=0-{}", HEAD_BYTES - 1))
            .expect(usize::try_from(HEAD_BYTES).unwrap_or(usize::MAX));
        let (length_bytes, head) = match core.try_send(&request)? {
            Ok(answer) => {
                let length = length_of(&answer).ok_or_else(|| unusable(&core, name))?;
                let whole = answer.status == 200 && answer.body.len() as u64 == length;
                if answer.status == 206 || whole {
                    (length, answer.body)
                } else {
                    (length, Bytes::new())
                }
            }
            // An empty object has no first byte.
            Err(failure) if failure.is(416, "InvalidRange") => (0, Bytes::new()),
            Err(failure) if failure.is_missing() => {
                return Err(RepoError::NotFound {
                    what: format!("{name} in {}", core.location()),
                    hint: String::new(),
                });
            }
            Err(failure) => return Err(core.error(failure, &format!("open {name}"))),
        };
        Ok(Self {
            core,
            name: name.to_owned(),
            key,
            length_bytes,
            head: Window { offset: 0, bytes: head },
            last_end: AtomicU64::new(u64::MAX),
            ahead: Mutex::new(None),
        })
    }

    /// Reads a part that the object has into the buffer.
    fn fetch_into(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let (request, what) = self.part(offset, buffer.len() as u64);
        let answer = self.core.send_into(&request, buffer, &what)?;
        self.check_part(&answer, buffer.len() as u64, &what)
    }

    /// Reads a part that the object has.
    fn fetch(&self, offset: u64, length: u64) -> Result<Bytes> {
        let (request, what) = self.part(offset, length);
        let answer = self.core.send(&request, &what)?;
        self.check_part(&answer, length, &what)?;
        Ok(answer.body)
    }

    /// The request for a part, and what it does.
    fn part(&self, offset: u64, length: u64) -> (Request, String) {
        let what = format!("read {length} bytes at {offset} of {}", self.name);
        let range = format!("bytes={offset}-{}", offset + length - 1);
        let expected = usize::try_from(length).unwrap_or(usize::MAX);
        (Request::new(Method::GET, &self.key).header("range", &range).expect(expected), what)
    }

    /// Whether the answer is the part that was asked for.
    fn check_part(&self, answer: &Answer, expected: u64, what: &str) -> Result<()> {
        let is_whole = expected == self.length_bytes;
        if answer.body_bytes as u64 == expected && (answer.status == 206 || is_whole) {
            return Ok(());
        }
        let text = format!(
            "the server answered {} with {} bytes: it has no ranged reads, and no repository can \
             be kept there",
            answer.status, answer.body_bytes
        );
        Err(RepoError::io(what, Error::new(ErrorKind::InvalidData, text)))
    }

    /// Reads more than is asked for, where there is room to keep it.
    fn fetch_ahead(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let length = AHEAD_BYTES.min(self.length_bytes - offset).max(buffer.len() as u64);
        self.drop_ahead();
        let used = self.core.ahead_bytes.fetch_add(length, Ordering::Relaxed);
        if used + length > MAX_AHEAD_BYTES {
            self.core.ahead_bytes.fetch_sub(length, Ordering::Relaxed);
            return self.fetch_into(buffer, offset);
        }
        let fetched = self.fetch(offset, length);
        let kept = fetched.map(|bytes| {
            let window = Window { offset, bytes };
            let copied = window.copy(buffer, offset);
            (self.ahead.lock().replace(window), copied)
        });
        match kept {
            Ok((before, _)) => {
                // Another thread kept something meanwhile.
                let freed = before.map_or(0, |window| window.bytes.len() as u64);
                self.core.ahead_bytes.fetch_sub(freed, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => {
                self.core.ahead_bytes.fetch_sub(length, Ordering::Relaxed);
                Err(error)
            }
        }
    }

    fn drop_ahead(&self) {
        if let Some(window) = self.ahead.lock().take() {
            self.core.ahead_bytes.fetch_sub(window.bytes.len() as u64, Ordering::Relaxed);
        }
    }
}

/// The length of the object in an answer to a ranged GET.
fn length_of(answer: &Answer) -> Option<u64> {
    match answer.status {
        206 => answer.header("content-range")?.rsplit('/').next()?.parse().ok(),
        _ => answer.header("content-length")?.parse().ok(),
    }
}

fn unusable(core: &Core, name: &str) -> RepoError {
    let text = "the server's answer does not say how long the object is";
    RepoError::io(
        format!("open {name} in {}", core.location()),
        Error::new(ErrorKind::InvalidData, text),
    )
}

impl ObjectReader for S3Reader {
    fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let length = buffer.len() as u64;
        let end = offset.checked_add(length).filter(|end| *end <= self.length_bytes);
        let Some(end) = end else {
            return Err(RepoError::damaged(
                &self.name,
                format!(
                    "{} bytes long, but {length} bytes at {offset} are needed: it was cut",
                    self.length_bytes
                ),
            ));
        };
        if buffer.is_empty() || self.head.copy(buffer, offset) {
            return Ok(());
        }
        let goes_forward = self.last_end.swap(end, Ordering::Relaxed) == offset;
        if self.ahead.lock().as_ref().is_some_and(|window| window.copy(buffer, offset)) {
            return Ok(());
        }
        if goes_forward && length <= SMALL_BYTES {
            return self.fetch_ahead(buffer, offset);
        }
        self.fetch_into(buffer, offset)
    }
}

impl Drop for S3Reader {
    fn drop(&mut self) {
        self.drop_ahead();
    }
}
