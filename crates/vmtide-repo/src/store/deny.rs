//! A store whose credential may add and never remove.

use super::{ObjectEntry, ObjectReader, ObjectStore, ObjectWriter, Retention};
use crate::{RepoError, Result};
use std::io;
use std::sync::Arc;

/// Another store, seen with a credential that has no right to remove: what a backup host is given
/// so that nobody who takes it over can destroy backups. Everything but `prune`, `forget` and
/// removing keys must work.
#[derive(Clone)]
pub struct DenyStore {
    inner: Arc<dyn ObjectStore>,
}

impl DenyStore {
    /// Denies removing from `inner`.
    pub fn new(inner: Arc<dyn ObjectStore>) -> Self {
        Self { inner }
    }

    fn denied(&self, name: &str) -> RepoError {
        let context = format!("remove {name} in {}", self.location());
        RepoError::io(context, io::Error::from(io::ErrorKind::PermissionDenied))
    }
}

impl ObjectStore for DenyStore {
    fn location(&self) -> String {
        self.inner.location()
    }

    fn is_distant(&self) -> bool {
        self.inner.is_distant()
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        self.inner.create(name)
    }

    fn create_retained(&self, name: &str, retention: &Retention) -> Result<Box<dyn ObjectWriter>> {
        self.inner.create_retained(name, retention)
    }

    fn retain(&self, name: &str, retention: &Retention) -> Result<()> {
        self.inner.retain(name, retention)
    }

    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>> {
        self.inner.open(name)
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectEntry) -> Result<()>) -> Result<()> {
        self.inner.list(prefix, visit)
    }

    fn remove(&self, name: &str) -> Result<()> {
        Err(self.denied(name))
    }

    fn remove_unfinished(&self) -> Result<u64> {
        Err(self.denied("tmp/"))
    }
}
