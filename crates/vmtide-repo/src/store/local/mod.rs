//! Objects as files of a local directory (format §2).
//!
//! An object is written to `tmp/`, synced, then given its name by a rename that replaces nothing,
//! and its directory is synced: so it is there whole or not at all, whatever crashes. Directories
//! are made when first needed, and the directory above is synced then.

mod bulk;
mod files;
mod reader;
mod writer;

use super::{ObjectEntry, ObjectReader, ObjectStore, ObjectWriter, SCRATCH, UNFINISHED_KEPT, name};
use crate::{ObjectId, RepoError, Result};
use jiff::Timestamp;
use parking_lot::Mutex;
use reader::LocalReader;
use std::collections::HashSet;
use std::fs::{self, FileType};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use writer::LocalWriter;

/// The object that makes a directory a repository.
const CONFIGURATION: &str = "vmtide.repo";

/// Where objects are files before they have a name.
const TEMPORARY: &str = "tmp";

/// What may be in a directory that `init` takes for an empty one: what an interrupted `init` leaves
/// (key slots of a repository that never was open nothing), and what a fresh file system has.
const HARMLESS: [&str; 3] = [TEMPORARY, "keys", "lost+found"];

/// A store in a local directory, which may be a mounted network share. Shared by threads; any
/// number of processes may use one directory.
#[derive(Clone, Debug)]
pub struct LocalStore {
    root: Arc<Root>,
}

/// The directory, with what is known about it.
#[derive(Debug)]
struct Root {
    path: PathBuf,
    /// Directories whose own entry is known to be durable.
    durable: Mutex<HashSet<PathBuf>>,
}

impl Root {
    fn new(path: PathBuf) -> Self {
        Self { path, durable: Mutex::new(HashSet::new()) }
    }

    /// The directory that holds the object `name`, made where it was missing, itself durable.
    ///
    /// One that was there is synced once all the same: its maker may have crashed before.
    fn parent_of(&self, name: &str) -> Result<PathBuf> {
        let mut directory = self.path.clone();
        let Some((parents, _)) = name.rsplit_once('/') else {
            return Ok(directory);
        };
        for component in parents.split('/') {
            let above = directory.clone();
            directory.push(component);
            if self.durable.lock().contains(&directory) && directory.is_dir() {
                continue;
            }
            files::create_directory(&directory)
                .and_then(|()| files::sync_directory(&above))
                .map_err(|error| {
                    RepoError::io(format!("create directory {}", directory.display()), error)
                })?;
            self.durable.lock().insert(directory.clone());
        }
        Ok(directory)
    }
}

impl LocalStore {
    /// Makes a store in a directory that is missing or empty, for a new repository.
    ///
    /// # Errors
    /// [`RepoError::AlreadyExists`] where something is in the directory, a repository or not;
    /// [`RepoError::Invalid`] where the path is a file; `Io`, `Denied`.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = absolute(path.as_ref())?;
        files::create_directories(&path)?;
        must_be_directory(&path)?;
        must_be_empty(&path)?;
        files::create_directory(&path.join(TEMPORARY))
            .and_then(|()| files::sync_directory(&path))
            .map_err(|error| cannot(&path, error))?;
        Ok(Self { root: Arc::new(Root::new(path)) })
    }

    /// Opens the store of the repository in a directory. Writes nothing.
    ///
    /// # Errors
    /// [`RepoError::NotFound`] where there is no repository, [`RepoError::Invalid`] where the path
    /// is a file; `Io`, `Denied`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = absolute(path.as_ref())?;
        must_be_directory(&path)?;
        match fs::metadata(path.join(CONFIGURATION)) {
            Ok(_) => Ok(Self { root: Arc::new(Root::new(path)) }),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(no_repository(&path)),
            Err(error) => Err(cannot(&path, error)),
        }
    }
}

impl ObjectStore for LocalStore {
    fn location(&self) -> String {
        self.root.path.display().to_string()
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        name::check_object(name)?;
        Ok(Box::new(LocalWriter::begin(self.root.clone(), name)?))
    }

    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>> {
        name::check_object(name)?;
        match files::open_regular(&self.root.path.join(name)) {
            Ok((file, length_bytes)) => {
                Ok(Box::new(LocalReader { file, length_bytes, name: name.to_owned() }))
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                Err(RepoError::NotFound {
                    what: format!("{name} in {}", self.location()),
                    hint: String::new(),
                })
            }
            Err(error) => Err(RepoError::io(format!("open {name} in {}", self.location()), error)),
        }
    }

    fn list(&self, prefix: &str, visit: &mut dyn FnMut(ObjectEntry) -> Result<()>) -> Result<()> {
        let directory = name::check_prefix(prefix)?;
        self.walk(directory, visit)
    }

    fn remove(&self, name: &str) -> Result<()> {
        name::check_object(name)?;
        let path = self.root.path.join(name);
        let removed = match fs::remove_file(&path) {
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                return Ok(());
            }
            Err(error) => Err(error),
            // What a benchmark made goes with its directories.
            Ok(()) if name.starts_with(SCRATCH) => {
                remove_empty_directories(&self.root.path, &path);
                return Ok(());
            }
            Ok(()) => path.parent().map_or(Ok(()), settle_removal),
        };
        removed
            .map_err(|error| RepoError::io(format!("remove {name} in {}", self.location()), error))
    }

    fn remove_unfinished(&self) -> Result<u64> {
        let directory = self.root.path.join(TEMPORARY);
        let failed = |error| RepoError::io(format!("empty {}", directory.display()), error);
        let mut freed_bytes = 0_u64;
        let mut now = None;
        for entry in read_directory(&directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // Only what a writer of ours made: everything else is left alone.
            let ours = entry.file_name().to_str().is_some_and(is_id);
            let (true, Some(metadata)) = (ours, found(entry.metadata()).map_err(failed)?) else {
                continue;
            };
            let now = match now {
                Some(now) => now,
                None => *now.insert(self.now().map_err(failed)?),
            };
            let modified = metadata.modified().map_err(failed)?;
            let age = now.duration_since(modified).unwrap_or_default();
            if metadata.is_file()
                && age >= UNFINISHED_KEPT.unsigned_abs()
                && found(fs::remove_file(entry.path())).map_err(failed)?.is_some()
            {
                freed_bytes = freed_bytes.saturating_add(metadata.len());
            }
        }
        Ok(freed_bytes)
    }
}

impl LocalStore {
    /// The time by the clock that stamps the files, which may be that of a server.
    fn now(&self) -> io::Result<SystemTime> {
        let id = ObjectId::random().map_err(io::Error::other)?;
        let path = self.root.path.join(TEMPORARY).join(id.to_string());
        let modified = files::create_new(&path).and_then(|file| file.metadata()?.modified());
        let _ = fs::remove_file(&path);
        modified
    }

    /// Visits the objects of a directory and of those below it.
    fn walk(
        &self,
        directory: &str,
        visit: &mut dyn FnMut(ObjectEntry) -> Result<()>,
    ) -> Result<()> {
        let path = self.root.path.join(directory);
        let failed = |error| RepoError::io(format!("list {}", path.display()), error);
        for entry in read_directory(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let file_name = entry.file_name();
            let Some(component) = file_name.to_str() else {
                continue;
            };
            let name = format!("{directory}/{component}");
            // Depth is bounded by what a name may be, so that links in a circle end.
            if !name::is_object(&name) {
                continue;
            }
            // Follows links, as opening does: an administrator may have moved packs elsewhere.
            let Some(metadata) = found(fs::metadata(entry.path())).map_err(failed)? else {
                continue;
            };
            if metadata.is_dir() {
                self.walk(&name, visit)?;
            } else if metadata.is_file() {
                let modified = metadata.modified().map_err(failed)?;
                visit(ObjectEntry {
                    name,
                    length_bytes: metadata.len(),
                    // A time that no calendar has is one of long ago.
                    modified: Timestamp::try_from(modified).unwrap_or(Timestamp::UNIX_EPOCH),
                })?;
            }
        }
        Ok(())
    }
}

/// Makes it durable that a file of this directory is gone. The directory goes with its last file where it was made for
/// one lease, list or pack alone, as its name tells: a repository sees many thousands of these.
fn settle_removal(directory: &Path) -> io::Result<()> {
    let of_one = directory.file_name().and_then(|name| name.to_str()).is_some_and(is_id);
    if of_one {
        // One that is not empty stays.
        let _ = fs::remove_dir(directory);
    }
    match files::sync_directory(directory) {
        // It is gone, by this or by somebody who removed another file of it.
        Err(error) if error.kind() == ErrorKind::NotFound && of_one => {
            directory.parent().map_or(Ok(()), files::sync_directory)
        }
        result => result,
    }
}

/// Removes the directories between `root` and a file that was removed, as far as they are empty.
fn remove_empty_directories(root: &Path, file: &Path) {
    let mut directory = file.parent();
    while let Some(path) = directory.filter(|path| *path != root) {
        // One that is not empty ends it.
        if fs::remove_dir(path).is_err() {
            return;
        }
        directory = path.parent();
    }
}

/// The entries of a directory; none where there is no directory.
fn read_directory(path: &Path) -> io::Result<impl Iterator<Item = io::Result<fs::DirEntry>>> {
    Ok(found(fs::read_dir(path))?.into_iter().flatten())
}

/// None where what was asked for is not there (any more).
fn found<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

fn is_id(name: &str) -> bool {
    name.parse::<ObjectId>().is_ok()
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| cannot(path, error))
}

fn must_be_directory(path: &Path) -> Result<()> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(metadata) => Err(RepoError::Invalid(format!(
            "{} is {}, not the directory of a repository",
            path.display(),
            kind_name(metadata.file_type())
        ))),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Err(no_repository(path))
        }
        Err(error) => Err(cannot(path, error)),
    }
}

fn kind_name(kind: FileType) -> &'static str {
    if kind.is_file() { "a file" } else { "something special" }
}

fn must_be_empty(path: &Path) -> Result<()> {
    if path.join(CONFIGURATION).exists() {
        return Err(RepoError::AlreadyExists {
            what: format!("a repository at {}", path.display()),
            hint: String::new(),
        });
    }
    for entry in fs::read_dir(path).map_err(|error| cannot(path, error))? {
        let file_name = entry.map_err(|error| cannot(path, error))?.file_name();
        let file_name = file_name.to_string_lossy();
        if !file_name.starts_with('.') && !HARMLESS.contains(&file_name.as_ref()) {
            return Err(RepoError::AlreadyExists {
                what: format!("{file_name} in {}", path.display()),
                hint: "a new repository needs an empty directory".into(),
            });
        }
    }
    Ok(())
}

fn no_repository(path: &Path) -> RepoError {
    RepoError::NotFound {
        what: format!("repository at {}", path.display()),
        hint: format!("`vmtide init {}` makes one", path.display()),
    }
}

fn cannot(path: &Path, error: io::Error) -> RepoError {
    RepoError::io(format!("open repository {}", path.display()), error)
}
