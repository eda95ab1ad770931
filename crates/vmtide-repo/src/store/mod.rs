//! Where objects are kept: a narrow trait, so that faults, latency and simulation fit in.
//!
//! Objects are written once under a name nobody else uses and never changed (format §2). A store
//! must make an object appear whole or not at all, and durable before `finish` returns; nothing
//! else is asked of it.

mod deny;
mod faulty;
mod local;
mod memory;
mod name;
mod retention;
mod scratch;

pub use deny::DenyStore;
pub use faulty::{Corruption, Fault, FaultyStore, Step, StepCounts};
pub use local::LocalStore;
pub use memory::MemoryStore;
pub use name::{check_object as check_object_name, check_prefix, is_object as is_object_name};
pub use retention::{Retention, RetentionMode};
pub(crate) use scratch::{SCRATCH, ScratchStore};

use crate::{RepoError, Result};
use jiff::{SignedDuration, Timestamp};

/// How long unfinished objects are kept in case their writer goes on: much longer than any write takes.
pub const UNFINISHED_KEPT: SignedDuration = SignedDuration::from_hours(24);

/// One object in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectEntry {
    /// The full name, `packs/ab/…`.
    pub name: String,
    /// The length in bytes.
    pub length_bytes: u64,
    /// When it was written, by the clock of the store: the file's time of modification, S3's
    /// `Last-Modified` (whole seconds). Compare it with that of other objects of the same store and
    /// with nothing else.
    pub modified: Timestamp,
}

/// A store of immutable objects. Shared by threads and by processes.
pub trait ObjectStore: Send + Sync {
    /// The store as a person knows it, a path or a URL without secrets.
    fn location(&self) -> String;

    /// Whether a request travels a network and waits there, so that many at once get more than few: whoever reads much
    /// then does so from more threads than there are cores. False for a disk, which few keep busy.
    fn is_distant(&self) -> bool {
        false
    }

    /// Begins an object. It becomes visible, whole and durable, when
    /// [`finish`](ObjectWriter::finish) returns; dropped without that, it never was.
    ///
    /// # Errors
    /// [`RepoError`](crate::RepoError)`::{Io, Denied}`.
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>>;

    /// Writes a small object in one go.
    ///
    /// # Errors
    /// As [`create`](Self::create) and [`ObjectWriter::finish`].
    fn put(&self, name: &str, content: &[u8]) -> Result<()> {
        let mut writer = self.create(name)?;
        writer.write(content)?;
        writer.finish()
    }

    /// As [`create`](Self::create), of an object that nobody can remove before `retention.until`.
    ///
    /// # Errors
    /// As [`create`](Self::create); [`RepoError::Invalid`](crate::RepoError::Invalid) where the
    /// store cannot keep objects.
    fn create_retained(&self, name: &str, retention: &Retention) -> Result<Box<dyn ObjectWriter>> {
        let _ = (name, retention);
        Err(cannot_retain(&self.location()))
    }

    /// Keeps an object that is there until `retention.until` at least: a time is only ever extended.
    ///
    /// # Errors
    /// [`RepoError::NotFound`](crate::RepoError::NotFound), `Io`, `Denied`;
    /// [`RepoError::Invalid`](crate::RepoError::Invalid) where the store cannot keep objects.
    fn retain(&self, name: &str, retention: &Retention) -> Result<()> {
        let _ = (name, retention);
        Err(cannot_retain(&self.location()))
    }

    /// Opens an object for reading at any place.
    ///
    /// # Errors
    /// [`RepoError::NotFound`](crate::RepoError::NotFound), `Io`, `Denied`.
    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>>;

    /// Calls `visit` for every object whose name begins with `prefix` (which ends in `/`), in no
    /// order. Objects that appear or vanish meanwhile may or may not be seen.
    ///
    /// # Errors
    /// Those of the store and of `visit`.
    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectEntry) -> Result<()>) -> Result<()>;

    /// Removes an object; no error where there is none.
    ///
    /// # Errors
    /// [`RepoError::Locked`](crate::RepoError::Locked) where it is kept until a time; `Io`, `Denied`.
    fn remove(&self, name: &str) -> Result<()>;

    /// Removes what writers left unfinished that nobody went on with for [`UNFINISHED_KEPT`], in the
    /// store's time. Loses nothing even where its writer only stood still: that one gets an error.
    /// Answers with the number of bytes freed.
    ///
    /// # Errors
    /// `Io`, `Denied`.
    fn remove_unfinished(&self) -> Result<u64>;
}

fn cannot_retain(location: &str) -> RepoError {
    RepoError::Invalid(format!(
        "{location} cannot make objects immutable: that needs a bucket with S3 Object Lock"
    ))
}

/// Reads a small object whole.
///
/// # Errors
/// [`RepoError::Damaged`] where it is longer than `limit_bytes`, which bounds what is allocated;
/// those of [`ObjectStore::open`] and [`ObjectReader::read_at`].
pub fn read_small(store: &dyn ObjectStore, name: &str, limit_bytes: usize) -> Result<Vec<u8>> {
    let reader = store.open(name)?;
    let length_bytes = reader.length_bytes();
    match usize::try_from(length_bytes) {
        Ok(length) if length <= limit_bytes => {
            let mut content = vec![0; length];
            reader.read_at(&mut content, 0)?;
            Ok(content)
        }
        _ => Err(RepoError::damaged(
            name,
            format!("{length_bytes} bytes long; {limit_bytes} is the most it may have"),
        )),
    }
}

/// An object being written.
pub trait ObjectWriter: Send {
    /// Appends bytes.
    ///
    /// # Errors
    /// `Io`; the object must then be dropped.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;

    /// Makes the object visible and durable.
    ///
    /// # Errors
    /// [`RepoError::AlreadyExists`](crate::RepoError::AlreadyExists) where the name is taken; `Io`.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// An object open for reading. Shared by threads.
pub trait ObjectReader: Send + Sync {
    /// The length in bytes.
    fn length_bytes(&self) -> u64;

    /// Fills `buffer` from `offset`, all of it.
    ///
    /// # Errors
    /// [`RepoError::Damaged`](crate::RepoError::Damaged) where the object ends before; `Io`.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()>;

    /// Whether reading what was read a moment ago costs next to nothing, as in a file of this machine: then a little is
    /// read at first, and the rest where that was not enough. False where every read is a request over a network.
    fn rereads_cheaply(&self) -> bool {
        false
    }
}
