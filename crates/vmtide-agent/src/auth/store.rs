//! The keys as they are now, read again when their file changes.

use super::keys::{self, KeySet};
use crate::error::{AgentError, Result};
use parking_lot::{Mutex, RwLock};
use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use zeroize::Zeroizing;

/// How often files that may change while the agent runs are looked at: what a revoked key has left at most.
pub const RELOAD_INTERVAL: Duration = Duration::from_secs(2);

/// The largest file of keys that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The keys of a file, as they are now. Any number of threads may ask.
pub struct KeyStore {
    path: PathBuf,
    current: RwLock<Arc<KeySet>>,
    stamp: Mutex<FileStamp>,
}

impl KeyStore {
    /// Reads the file.
    ///
    /// # Errors
    /// Where it cannot be read, is none, or holds no key: an agent without keys would let nobody in.
    pub fn open(path: &Path) -> Result<Self> {
        let stamp = FileStamp::of(path);
        let set = read(path)?;
        Ok(Self {
            path: path.to_path_buf(),
            current: RwLock::new(Arc::new(set)),
            stamp: Mutex::new(stamp),
        })
    }

    /// The keys as they are now.
    pub fn current(&self) -> Arc<KeySet> {
        Arc::clone(&self.current.read())
    }

    /// Reads the file again where it changed, or in any case. One that cannot be read changes nothing and is
    /// logged: half-written files and slips must not lock everybody out. So a file that was emptied or deleted
    /// revokes no key. Neither does one that now holds a key in the clear where it held hashes before: that may be
    /// the rest of one that was cut, and such a key has all rights. It is taken at the agent's next start.
    pub fn reload(&self, in_any_case: bool) {
        let stamp = FileStamp::of(&self.path);
        let mut last = self.stamp.lock();
        if *last == stamp && !in_any_case {
            return;
        }
        *last = stamp;
        match read(&self.path) {
            Ok(set) if set.is_plain() && !self.current().is_plain() => tracing::error!(
                file = %self.path.display(),
                "it holds a key in the clear now, which counts from the agent's next start; the keys from before \
                 stay in use"
            ),
            Ok(set) => {
                tracing::info!(file = %self.path.display(), keys = set.len(), "keys read again");
                *self.current.write() = Arc::new(set);
            }
            Err(error) => tracing::error!(%error, "the keys from before stay in use"),
        }
    }
}

/// Reads a file of keys.
///
/// # Errors
/// As [`KeyStore::open`].
pub fn read(path: &Path) -> Result<KeySet> {
    let shown = path.display();
    let failed = |error| AgentError::io(format!("read the keys of {shown}"), error);
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if metadata.len() > MAX_FILE_BYTES {
        return Err(AgentError::usage(format!("{shown}: too large for a file of keys")));
    }
    let bytes = Zeroizing::new(std::fs::read(path).map_err(failed)?);
    let wrong = |reason: String| AgentError::usage(format!("{shown}: {reason}"));
    let text = std::str::from_utf8(&bytes).map_err(|_| wrong("is no text in UTF-8".into()))?;
    let set = keys::parse(text).map_err(|error| wrong(error.to_string()))?;
    if set.is_empty() {
        return Err(wrong("holds no key; `vmtide agent key add` makes one".into()));
    }
    if set.is_plain() && others_may_read(&metadata) {
        tracing::warn!(
            "{shown} holds a key in the clear and others may read it: chmod 600, or make one with \
             `vmtide agent key add`"
        );
    }
    Ok(set)
}

#[cfg(unix)]
fn others_may_read(metadata: &Metadata) -> bool {
    std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o077 != 0
}

/// Windows has lists of rights for that, which nothing here can read without foreign functions.
#[cfg(not(unix))]
fn others_may_read(_metadata: &Metadata) -> bool {
    false
}

/// By what a changed file is known: replaced, rewritten, gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStamp(Option<(u64, SystemTime, u64)>);

impl FileStamp {
    /// The stamp of the file as it is now.
    pub fn of(path: &Path) -> Self {
        let stamp = |metadata: Metadata| {
            let modified = metadata.modified().ok()?;
            Some((metadata.len(), modified, number(&metadata)))
        };
        Self(std::fs::metadata(path).ok().and_then(stamp))
    }
}

#[cfg(unix)]
fn number(metadata: &Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

#[cfg(not(unix))]
fn number(_metadata: &Metadata) -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_change_while_it_runs_and_a_broken_file_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        assert!(KeyStore::open(&path).is_err());
        std::fs::write(&path, "").unwrap();
        assert!(KeyStore::open(&path).is_err());
        std::fs::write(&path, "swordfish\n").unwrap();
        let store = KeyStore::open(&path).unwrap();
        assert!(store.current().find(b"swordfish").is_some());
        std::fs::write(&path, "red herring\n").unwrap();
        store.reload(false);
        assert!(store.current().find(b"swordfish").is_none());
        assert!(store.current().find(b"red herring").is_some());
        std::fs::write(&path, "a:read-only:typo:typo\n").unwrap();
        store.reload(false);
        assert!(store.current().find(b"red herring").is_some());
        std::fs::remove_file(&path).unwrap();
        store.reload(false);
        assert!(store.current().find(b"red herring").is_some());
        let key = keys::generate("a", crate::auth::Rights::ReadOnly).unwrap();
        std::fs::write(&path, &key.line).unwrap();
        store.reload(true);
        assert!(store.current().find(key.secret.as_bytes()).is_some());
        std::fs::write(&path, "a").unwrap();
        store.reload(true);
        assert!(store.current().find(b"a").is_none(), "the rest of a line is no key");
        assert!(store.current().find(key.secret.as_bytes()).is_some());
    }
}
