//! A store that fails on purpose, around another: for tests of crashes, full disks and damage.
//!
//! What happens to a store is counted: *changes* (an object appears, objects are removed), *writes*
//! (bytes go to an object that is not there yet) and *reads*. A fault is planned for the n-th of
//! these. To try a job at every moment, run it with a crash at change 0, 1, 2, … until it comes
//! through.

use super::{ObjectEntry, ObjectReader, ObjectStore, ObjectWriter, Retention};
use crate::{RepoError, Result};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// An object appears (`finish`), or is removed.
    Change,
    /// Bytes are written to an object that is not there yet.
    Write,
    /// Bytes are read from an object.
    Read,
}

/// How it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process dies before the step: nothing happens any more, every later call fails, and what
    /// was being written is left unfinished.
    Crash,
    /// The disk is full from here on: this and every later write and `finish` fail; removing works.
    NoSpace,
    /// This step alone fails, without effect.
    Io,
    /// This step takes effect and is reported as failed, as when a server's answer is lost.
    LostAnswer,
}

/// What is wrong with the bytes of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Corruption {
    /// One bit is the other way round; an offset past the end has no effect.
    FlipBit {
        /// The byte.
        offset: u64,
        /// The bit in it, 0 to 7.
        bit: u8,
    },
    /// Only the beginning is left.
    Truncate {
        /// Its length in bytes.
        length_bytes: u64,
    },
    /// It cannot be opened, though it is listed.
    Missing,
}

/// How often each step was taken, the failed ones included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepCounts {
    /// Changes.
    pub changes: u64,
    /// Writes.
    pub writes: u64,
    /// Reads.
    pub reads: u64,
}

#[derive(Default)]
struct State {
    crashed: bool,
    full: bool,
    counts: StepCounts,
    plans: Vec<(Step, u64, Fault)>,
    corruptions: BTreeMap<String, Corruption>,
}

/// What is to happen at a step.
enum Outcome {
    Go,
    Fail(RepoError),
    FailAfter(RepoError),
}

/// A store that fails on purpose, around another. Clones share plans and counts.
#[derive(Clone)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    state: Arc<Mutex<State>>,
}

impl FaultyStore {
    /// Around `inner`, with nothing planned: only counts.
    pub fn new(inner: Arc<dyn ObjectStore>) -> Self {
        Self { inner, state: Arc::default() }
    }

    /// Around `inner`, with a crash before change number `change`, from 0.
    pub fn crashing_at(inner: Arc<dyn ObjectStore>, change: u64) -> Self {
        let store = Self::new(inner);
        store.plan(Step::Change, change, Fault::Crash);
        store
    }

    /// Plans a fault for the step of a kind with this number, counted from 0 since the store was made.
    pub fn plan(&self, step: Step, number: u64, fault: Fault) {
        self.state.lock().plans.push((step, number, fault));
    }

    /// Makes the object `name` read as damaged.
    pub fn corrupt(&self, name: &str, corruption: Corruption) {
        self.state.lock().corruptions.insert(name.into(), corruption);
    }

    /// How often each step was taken.
    pub fn counts(&self) -> StepCounts {
        self.state.lock().counts
    }

    /// Whether the planned crash has happened.
    pub fn has_crashed(&self) -> bool {
        self.state.lock().crashed
    }
}

impl State {
    /// Counts a step of `name` and says what is to become of it.
    fn step(&mut self, step: Step, name: &str) -> Outcome {
        if self.crashed {
            return Outcome::Fail(crashed(name));
        }
        let counter = match step {
            Step::Change => &mut self.counts.changes,
            Step::Write => &mut self.counts.writes,
            Step::Read => &mut self.counts.reads,
        };
        let number = *counter;
        *counter += 1;
        let planned = self.plans.iter().find(|plan| (plan.0, plan.1) == (step, number));
        match planned.map(|plan| plan.2) {
            Some(Fault::Crash) => {
                self.crashed = true;
                Outcome::Fail(crashed(name))
            }
            Some(Fault::NoSpace) => {
                self.full = true;
                Outcome::Fail(failed(name, code::NO_SPACE))
            }
            Some(Fault::Io) => Outcome::Fail(failed(name, code::IO)),
            Some(Fault::LostAnswer) => Outcome::FailAfter(failed(name, code::TIMED_OUT)),
            None => Outcome::Go,
        }
    }
}

/// Takes a step around `action`.
fn take<T>(
    state: &Mutex<State>,
    step: Step,
    name: &str,
    action: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let outcome = state.lock().step(step, name);
    match outcome {
        Outcome::Go => action(),
        Outcome::Fail(error) => Err(error),
        Outcome::FailAfter(error) => action().and(Err(error)),
    }
}

/// Fails where the disk is full or the process dead; takes no step.
fn check(state: &Mutex<State>, name: &str, needs_space: bool) -> Result<()> {
    let state = state.lock();
    if state.crashed {
        return Err(crashed(name));
    }
    if needs_space && state.full {
        return Err(failed(name, code::NO_SPACE));
    }
    Ok(())
}

fn crashed(name: &str) -> RepoError {
    failed(name, code::ABORTED)
}

fn failed(name: &str, code: i32) -> RepoError {
    let source = std::io::Error::from_raw_os_error(code);
    RepoError::io(format!("injected fault at {name}"), source)
}

/// The operating system's words for it.
#[cfg(unix)]
mod code {
    use rustix::io::Errno;

    pub(super) const NO_SPACE: i32 = Errno::NOSPC.raw_os_error();
    pub(super) const IO: i32 = Errno::IO.raw_os_error();
    pub(super) const TIMED_OUT: i32 = Errno::TIMEDOUT.raw_os_error();
    pub(super) const ABORTED: i32 = Errno::CONNABORTED.raw_os_error();
}

/// The operating system's words for it: `ERROR_DISK_FULL`, `ERROR_IO_DEVICE`, `ERROR_SEM_TIMEOUT`,
/// `ERROR_CONNECTION_ABORTED`.
#[cfg(windows)]
mod code {
    pub(super) const NO_SPACE: i32 = 112;
    pub(super) const IO: i32 = 1117;
    pub(super) const TIMED_OUT: i32 = 121;
    pub(super) const ABORTED: i32 = 1236;
}

struct FaultyWriter {
    name: String,
    inner: Option<Box<dyn ObjectWriter>>,
    state: Arc<Mutex<State>>,
}

impl ObjectWriter for FaultyWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        check(&self.state, &self.name, true)?;
        let (state, name, inner) = (&self.state, &self.name, &mut self.inner);
        take(state, Step::Write, name, || {
            inner.as_mut().map_or(Ok(()), |writer| writer.write(bytes))
        })
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        check(&self.state, &self.name, true)?;
        let state = Arc::clone(&self.state);
        let name = self.name.clone();
        take(&state, Step::Change, &name, || {
            self.inner.take().map_or(Ok(()), |writer| writer.finish())
        })
    }
}

impl Drop for FaultyWriter {
    fn drop(&mut self) {
        // A dead process does not clean up after itself.
        if self.state.lock().crashed {
            std::mem::forget(self.inner.take());
        }
    }
}

struct FaultyReader {
    name: String,
    inner: Box<dyn ObjectReader>,
    corruption: Option<Corruption>,
    state: Arc<Mutex<State>>,
}

impl ObjectReader for FaultyReader {
    fn rereads_cheaply(&self) -> bool {
        self.inner.rereads_cheaply()
    }

    fn length_bytes(&self) -> u64 {
        match self.corruption {
            Some(Corruption::Truncate { length_bytes }) => {
                length_bytes.min(self.inner.length_bytes())
            }
            _ => self.inner.length_bytes(),
        }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.length_bytes()) {
            return Err(RepoError::damaged(&self.name, "it was cut"));
        }
        take(&self.state, Step::Read, &self.name, || self.inner.read_at(buffer, offset))?;
        if let Some(Corruption::FlipBit { offset: at, bit }) = self.corruption
            && let Some(index) = at.checked_sub(offset)
            && let Some(byte) = usize::try_from(index).ok().and_then(|at| buffer.get_mut(at))
        {
            *byte ^= 1 << (bit % 8);
        }
        Ok(())
    }
}

impl FaultyStore {
    fn around(&self, name: &str, inner: Box<dyn ObjectWriter>) -> Box<dyn ObjectWriter> {
        let state = Arc::clone(&self.state);
        Box::new(FaultyWriter { name: name.into(), inner: Some(inner), state })
    }
}

impl ObjectStore for FaultyStore {
    fn location(&self) -> String {
        self.inner.location()
    }

    fn is_distant(&self) -> bool {
        self.inner.is_distant()
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        check(&self.state, name, true)?;
        Ok(self.around(name, self.inner.create(name)?))
    }

    fn create_retained(&self, name: &str, retention: &Retention) -> Result<Box<dyn ObjectWriter>> {
        check(&self.state, name, true)?;
        Ok(self.around(name, self.inner.create_retained(name, retention)?))
    }

    fn retain(&self, name: &str, retention: &Retention) -> Result<()> {
        take(&self.state, Step::Change, name, || self.inner.retain(name, retention))
    }

    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>> {
        check(&self.state, name, false)?;
        let corruption = self.state.lock().corruptions.get(name).copied();
        if corruption == Some(Corruption::Missing) {
            return Err(RepoError::NotFound {
                what: format!("{name} in {}", self.location()),
                hint: String::new(),
            });
        }
        Ok(Box::new(FaultyReader {
            name: name.into(),
            inner: self.inner.open(name)?,
            corruption,
            state: Arc::clone(&self.state),
        }))
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectEntry) -> Result<()>) -> Result<()> {
        check(&self.state, prefix, false)?;
        self.inner.list(prefix, visit)
    }

    fn remove(&self, name: &str) -> Result<()> {
        take(&self.state, Step::Change, name, || self.inner.remove(name))
    }

    fn remove_unfinished(&self) -> Result<u64> {
        take(&self.state, Step::Change, "tmp/", || self.inner.remove_unfinished())
    }
}
