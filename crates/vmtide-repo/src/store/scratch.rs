//! A part of a store for measuring, apart from the repository in it.

use super::{ObjectEntry, ObjectReader, ObjectStore, ObjectWriter};
use crate::{RepoError, Result};
use jiff::{SignedDuration, Timestamp};
use std::sync::Arc;

/// Where everything made for measuring lies. Nothing of a repository does (format §2), so that no
/// reader and no `prune` ever sees it.
pub(crate) const SCRATCH: &str = "bench/";

/// What is older than this was left by a run that died.
const LEFT_AFTER: SignedDuration = SignedDuration::from_mins(30);

/// The objects of another store under [`SCRATCH`], as a store of its own. Removes them all when it is
/// cleared.
#[derive(Clone)]
pub(crate) struct ScratchStore {
    inner: Arc<dyn ObjectStore>,
}

impl ScratchStore {
    /// Begins in `inner`, and removes what a run that died has left there.
    ///
    /// # Errors
    /// [`RepoError::Busy`] where another run seems to go on; those of the store.
    pub fn begin(inner: Arc<dyn ObjectStore>) -> Result<Self> {
        let limit = Timestamp::now().checked_sub(LEFT_AFTER).unwrap_or(Timestamp::UNIX_EPOCH);
        let mut fresh = None;
        inner.list(SCRATCH, &mut |entry| {
            if entry.modified > limit {
                fresh = Some(entry.name);
            }
            Ok(())
        })?;
        if let Some(name) = fresh {
            let detail = format!(
                "{name} in {} was written within the last half hour: another benchmark runs, or one \
                 was killed; wait, or remove everything under {SCRATCH}",
                inner.location()
            );
            return Err(RepoError::Busy { detail });
        }
        let store = Self { inner };
        store.clear()?;
        Ok(store)
    }

    /// Removes everything.
    ///
    /// # Errors
    /// Those of the store.
    pub fn clear(&self) -> Result<()> {
        let mut names = Vec::new();
        self.inner.list(SCRATCH, &mut |entry| {
            names.push(entry.name);
            Ok(())
        })?;
        names.iter().try_for_each(|name| self.inner.remove(name))
    }
}

fn inside(name: &str) -> String {
    format!("{SCRATCH}{name}")
}

impl ObjectStore for ScratchStore {
    fn location(&self) -> String {
        format!("{}/{}", self.inner.location(), SCRATCH.trim_end_matches('/'))
    }

    fn is_distant(&self) -> bool {
        self.inner.is_distant()
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        self.inner.create(&inside(name))
    }

    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>> {
        self.inner.open(&inside(name))
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectEntry) -> Result<()>) -> Result<()> {
        self.inner.list(&inside(prefix), &mut |mut entry| {
            match entry.name.strip_prefix(SCRATCH) {
                Some(name) => entry.name = name.to_owned(),
                None => return Ok(()),
            }
            visit(entry)
        })
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.inner.remove(&inside(name))
    }

    fn remove_unfinished(&self) -> Result<u64> {
        // What others have not finished is theirs.
        Ok(0)
    }
}
