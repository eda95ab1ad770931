//! Objects in memory, for tests, simulation and fuzzing.

use super::{ObjectEntry, ObjectReader, ObjectStore, ObjectWriter, Retention, name};
use crate::{RepoError, Result};
use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A store in memory that keeps every promise of [`ObjectStore`]. Clones are the same store, as two
/// processes on one directory are; [`snapshot`](Self::snapshot) makes another.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Object>,
    /// Bytes of writers that ended without `finish` and did not clean up.
    unfinished_bytes: u64,
    /// How far the store's clock is ahead of ours.
    ahead: SignedDuration,
    /// Where the store's clock stands, when it does not go by itself.
    stopped: Option<Timestamp>,
}

/// An object's content, and when it was finished.
#[derive(Clone, Debug)]
struct Object {
    content: Arc<[u8]>,
    modified: Timestamp,
    retained_until: Option<Timestamp>,
}

impl Object {
    const fn new(content: Arc<[u8]>, modified: Timestamp) -> Self {
        Self { content, modified, retained_until: None }
    }
}

impl State {
    fn now(&self) -> Timestamp {
        let now = self.stopped.unwrap_or_else(Timestamp::now);
        now.checked_add(self.ahead).unwrap_or(now)
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// The content of an object, None where there is none.
    pub fn bytes(&self, name: &str) -> Option<Arc<[u8]>> {
        self.state.lock().objects.get(name).map(|object| object.content.clone())
    }

    /// Puts an object in place of whatever is there, which no real store does: this is how a test
    /// makes damage.
    pub fn replace(&self, name: &str, content: &[u8]) {
        let mut state = self.state.lock();
        let object = Object::new(content.into(), state.now());
        state.objects.insert(name.into(), object);
    }

    /// Until when an object is kept, None where it may be removed at any time.
    pub fn retained_until(&self, name: &str) -> Option<Timestamp> {
        self.state.lock().objects.get(name).and_then(|object| object.retained_until)
    }

    /// The names of all objects, sorted.
    pub fn names(&self) -> Vec<String> {
        self.state.lock().objects.keys().cloned().collect()
    }

    /// Another store with the same objects: what is found after a crash now.
    pub fn snapshot(&self) -> Self {
        let state = self.state.lock();
        let copy = State {
            objects: state.objects.clone(),
            unfinished_bytes: 0,
            ahead: state.ahead,
            stopped: state.stopped,
        };
        Self { state: Arc::new(Mutex::new(copy)) }
    }

    /// Lets time pass, by the store's clock.
    pub fn advance(&self, time: SignedDuration) {
        self.state.lock().ahead += time;
    }

    /// Makes the store's clock stand at a time; it goes on only by [`advance`](Self::advance).
    pub fn stop_clock(&self, at: Timestamp) {
        self.state.lock().stopped = Some(at);
    }

    /// Makes as if a crashed writer had left that many bytes, for
    /// [`remove_unfinished`](ObjectStore::remove_unfinished) to find.
    pub fn leave_unfinished(&self, length_bytes: u64) {
        let mut state = self.state.lock();
        state.unfinished_bytes = state.unfinished_bytes.saturating_add(length_bytes);
    }
}

struct MemoryWriter {
    state: Arc<Mutex<State>>,
    name: String,
    retained_until: Option<Timestamp>,
    content: Vec<u8>,
}

impl ObjectWriter for MemoryWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.content.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let mut state = self.state.lock();
        if state.objects.contains_key(&self.name) {
            return Err(RepoError::AlreadyExists {
                what: format!("{} in memory", self.name),
                hint: String::new(),
            });
        }
        let object = Object {
            retained_until: self.retained_until,
            ..Object::new(self.content.into(), state.now())
        };
        state.objects.insert(self.name, object);
        Ok(())
    }
}

struct MemoryReader {
    name: String,
    content: Arc<[u8]>,
}

impl ObjectReader for MemoryReader {
    fn length_bytes(&self) -> u64 {
        self.content.len() as u64
    }

    fn rereads_cheaply(&self) -> bool {
        true
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let part = usize::try_from(offset)
            .ok()
            .and_then(|from| self.content.get(from..from.checked_add(buffer.len())?))
            .ok_or_else(|| {
                RepoError::damaged(
                    &self.name,
                    format!(
                        "{} bytes long, but {} bytes at {offset} are needed: it was cut",
                        self.content.len(),
                        buffer.len()
                    ),
                )
            })?;
        buffer.copy_from_slice(part);
        Ok(())
    }
}

impl ObjectStore for MemoryStore {
    fn location(&self) -> String {
        "memory".into()
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        name::check_object(name)?;
        Ok(Box::new(MemoryWriter {
            state: Arc::clone(&self.state),
            name: name.into(),
            retained_until: None,
            content: Vec::new(),
        }))
    }

    fn create_retained(&self, name: &str, retention: &Retention) -> Result<Box<dyn ObjectWriter>> {
        name::check_object(name)?;
        Ok(Box::new(MemoryWriter {
            state: Arc::clone(&self.state),
            name: name.into(),
            retained_until: Some(retention.until),
            content: Vec::new(),
        }))
    }

    fn retain(&self, name: &str, retention: &Retention) -> Result<()> {
        name::check_object(name)?;
        let mut state = self.state.lock();
        let object = state.objects.get_mut(name).ok_or_else(|| RepoError::NotFound {
            what: format!("{name} in memory"),
            hint: String::new(),
        })?;
        object.retained_until = object.retained_until.max(Some(retention.until));
        Ok(())
    }

    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>> {
        name::check_object(name)?;
        match self.bytes(name) {
            Some(content) => Ok(Box::new(MemoryReader { name: name.into(), content })),
            None => {
                Err(RepoError::NotFound { what: format!("{name} in memory"), hint: String::new() })
            }
        }
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectEntry) -> Result<()>) -> Result<()> {
        name::check_prefix(prefix)?;
        // Gathered first: the visitor may use the store.
        let found: Vec<ObjectEntry> = self
            .state
            .lock()
            .objects
            .range(prefix.to_owned()..)
            .take_while(|(name, _)| name.starts_with(prefix))
            .map(|(name, object)| ObjectEntry {
                name: name.clone(),
                length_bytes: object.content.len() as u64,
                modified: object.modified,
            })
            .collect();
        found.into_iter().try_for_each(visit)
    }

    fn remove(&self, name: &str) -> Result<()> {
        name::check_object(name)?;
        let mut state = self.state.lock();
        let until = state.objects.get(name).and_then(|object| object.retained_until);
        if let Some(until) = until.filter(|until| *until > state.now()) {
            return Err(RepoError::Locked { object: name.into(), until });
        }
        state.objects.remove(name);
        Ok(())
    }

    fn remove_unfinished(&self) -> Result<u64> {
        Ok(std::mem::take(&mut self.state.lock().unfinished_bytes))
    }
}
