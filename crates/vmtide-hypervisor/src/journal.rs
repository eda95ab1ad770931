//! What we are about to make on somebody else's machine, written down before we make it.
//!
//! One small JSON file per job in the state directory, replaced atomically and synced at every
//! step. When a job ends well its file is removed; a file without a living job is work for
//! [`reap`](crate::Hypervisor::reap). The steps are the platform's own words: the journal only
//! keeps them.

use crate::{HypervisorError, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The end of the name of a file that says that the VM was let go.
const RELEASED: &str = "released";

/// Names one job: 16 lower-case hexadecimal digits, random.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(String);

impl JobId {
    /// A new id. Unique by chance: 64 random bits.
    pub fn random() -> Self {
        let bits = getrandom::u64().unwrap_or_else(|_| {
            // Without a random source the time and process number still tell jobs apart.
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            let nanos = now.map_or(0, |duration| u64::from(duration.subsec_nanos()));
            (nanos << 32) ^ u64::from(std::process::id())
        });
        Self(format!("{bits:016x}"))
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// An id that another process made; none where the text is not one. It becomes a part of names of files, so
    /// nothing else may stand in it.
    pub fn parse(text: &str) -> Option<Self> {
        is_sixteen_digits(text).then(|| Self(text.to_owned()))
    }
}

/// Whether a text is 16 lower-case hexadecimal digits, as ids of jobs and lineages are.
pub(crate) fn is_sixteen_digits(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a journal file holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalEntry {
    /// The job.
    pub job: JobId,
    /// The platform connection it works on, e.g. a QMP socket path.
    pub target: String,
    /// The platform's own record of what may exist, e.g. node and export names, in order of
    /// creation.
    pub steps: Vec<serde_json::Value>,
}

/// The journal of one job.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    entry: JournalEntry,
}

impl Journal {
    /// Begins the journal of a job in `state_directory`.
    ///
    /// # Errors
    /// [`HypervisorError::Io`] where it cannot be written: then nothing may be made either.
    pub fn begin(state_directory: &Path, job: JobId, target: &str) -> Result<Self> {
        let directory = directory_of(state_directory);
        std::fs::create_dir_all(&directory).map_err(|error| {
            HypervisorError::io(format!("create the journal {}", directory.display()), error)
        })?;
        let path = directory.join(format!("{job}.json"));
        let entry = JournalEntry { job, target: target.into(), steps: Vec::new() };
        let journal = Self { path, entry };
        journal.save()?;
        Ok(journal)
    }

    /// The entries left by jobs on `target`, oldest first. A file that is no journal is skipped
    /// with a log line: it cannot say what to remove.
    ///
    /// # Errors
    /// [`HypervisorError::Io`] where the directory cannot be read.
    pub fn leftovers(state_directory: &Path, target: &str) -> Result<Vec<Self>> {
        let directory = directory_of(state_directory);
        let io = |error| HypervisorError::io(format!("read {}", directory.display()), error);
        let listing = match std::fs::read_dir(&directory) {
            Ok(listing) => listing,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io(error)),
        };
        let mut found = Vec::new();
        for item in listing {
            let item = item.map_err(io)?;
            let path = item.path();
            if path.extension().is_some_and(|extension| extension == RELEASED)
                && !Self::file_of_mark(&path).exists()
            {
                // A mark that came after its job had finished. Where it stays it does no harm.
                let _ = std::fs::remove_file(&path);
            }
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                // A job on another target has just finished.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(io(error)),
            };
            match serde_json::from_str::<JournalEntry>(&text) {
                Ok(entry) if entry.target == target => {
                    let modified = item.metadata().and_then(|metadata| metadata.modified()).ok();
                    found.push((modified, Self { path, entry }));
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(path = %path.display(), %error, "not a journal"),
            }
        }
        found.sort_by_key(|(modified, _)| *modified);
        Ok(found.into_iter().map(|(_, journal)| journal).collect())
    }

    /// What is written down.
    pub fn entry(&self) -> &JournalEntry {
        &self.entry
    }

    /// Writes down a step, durably, *before* it is taken.
    ///
    /// # Errors
    /// [`HypervisorError::Io`]: then the step must not be taken.
    pub fn record(&mut self, step: serde_json::Value) -> Result<()> {
        self.entry.steps.push(step);
        self.save()
    }

    /// The file whose existence says that the VM was let go by somebody else than the job, e.g. by
    /// a process that watches over it: what the steps say of pausing or freezing the VM is no
    /// longer so. It stands beside the journal and goes with it. Only make it while
    /// [`file_of_mark`](Self::file_of_mark) exists: without the journal it means nothing.
    pub fn released_mark(&self) -> PathBuf {
        self.path.with_extension(RELEASED)
    }

    /// The journal's file that belongs to a [`released_mark`](Self::released_mark).
    pub fn file_of_mark(mark: &Path) -> PathBuf {
        mark.with_extension("json")
    }

    /// Whether the VM was let go by somebody else than the job.
    pub fn is_released(&self) -> bool {
        self.released_mark().exists()
    }

    /// Everything is undone or kept on purpose: forgets the job.
    ///
    /// # Errors
    /// [`HypervisorError::Io`]; harmless but for one more look at the next reaping.
    pub fn finish(self) -> Result<()> {
        // The journal first: a mark that is left alone is removed at the next look.
        for path in [&self.path, &self.released_mark()] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(HypervisorError::io(
                        format!("remove the journal {}", path.display()),
                        error,
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn save(&self) -> Result<()> {
        let temporary = self.path.with_extension("tmp");
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(&self.entry)?)?;
            file.sync_all()?;
            std::fs::rename(&temporary, &self.path)?;
            match self.path.parent() {
                Some(parent) => vmtide_block::files::sync_directory(parent),
                None => Ok(()),
            }
        };
        write().map_err(|error| {
            HypervisorError::io(format!("write the journal {}", self.path.display()), error)
        })
    }
}

fn directory_of(state_directory: &Path) -> PathBuf {
    state_directory.join("journal")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn steps_survive_and_finished_jobs_leave_nothing() {
        let state = tempfile::tempdir().unwrap();
        let mut first = Journal::begin(state.path(), JobId::random(), "a.qmp").unwrap();
        first.record(json!({"node": "n1"})).unwrap();
        first.record(json!({"export": "e1"})).unwrap();
        let other = Journal::begin(state.path(), JobId::random(), "b.qmp").unwrap();
        std::fs::write(state.path().join("journal/broken.json"), "{").unwrap();

        let left = Journal::leftovers(state.path(), "a.qmp").unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].entry(), first.entry());
        assert_eq!(left[0].entry().steps, [json!({"node": "n1"}), json!({"export": "e1"})]);

        other.finish().unwrap();
        assert!(Journal::leftovers(state.path(), "b.qmp").unwrap().is_empty());
        assert_eq!(Journal::leftovers(state.path(), "a.qmp").unwrap().len(), 1);
    }

    #[test]
    fn a_mark_of_release_lives_as_long_as_its_journal() {
        let state = tempfile::tempdir().unwrap();
        let journal = Journal::begin(state.path(), JobId::random(), "a.qmp").unwrap();
        let mark = journal.released_mark();
        assert!(Journal::file_of_mark(&mark).exists() && !journal.is_released());
        std::fs::write(&mark, "").unwrap();
        let left = Journal::leftovers(state.path(), "a.qmp").unwrap();
        assert!(left[0].is_released());
        journal.finish().unwrap();
        assert!(!mark.exists());
        // One that comes too late.
        std::fs::write(&mark, "").unwrap();
        assert!(Journal::leftovers(state.path(), "a.qmp").unwrap().is_empty());
        assert!(!mark.exists());
    }

    #[test]
    fn no_state_directory_means_no_leftovers() {
        let state = tempfile::tempdir().unwrap();
        assert!(Journal::leftovers(&state.path().join("none"), "x").unwrap().is_empty());
    }
}
