//! An object of a local store being written: a file in `tmp/` until it is whole and durable.

use super::Root;
use super::bulk::BulkFile;
use super::files;
use crate::store::ObjectWriter;
use crate::{ObjectId, RepoError, Result};
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::Arc;

/// How often an object is given its name when its directory vanishes each time. Twice needs two others who remove the
/// last object of one directory at the same moment; more than this is something else, and an error.
const MOST_ATTEMPTS: u32 = 16;

/// A file in `tmp/` that becomes the object `name` in [`finish`](ObjectWriter::finish), and is
/// removed when it is dropped before.
pub(super) struct LocalWriter {
    root: Arc<Root>,
    name: String,
    temporary: PathBuf,
    /// None once finished.
    file: Option<BulkFile>,
}

impl LocalWriter {
    /// Begins the object `name`, whose form is checked already.
    pub(super) fn begin(root: Arc<Root>, name: &str) -> Result<Self> {
        let directory = root.path.join(super::TEMPORARY);
        let temporary = directory.join(ObjectId::random()?.to_string());
        let file = files::create_new(&temporary)
            .or_else(|error| match error.kind() {
                ErrorKind::NotFound => {
                    files::create_directory(&directory).and_then(|()| files::create_new(&temporary))
                }
                _ => Err(error),
            })
            .map_err(|error| not_written(&root, name, error))?;
        Ok(Self { root, name: name.to_owned(), temporary, file: Some(BulkFile::new(file)) })
    }

    /// Everything in the file and on the disk, under the temporary name still.
    fn sync(&mut self) -> io::Result<()> {
        self.file.take().map_or(Ok(()), BulkFile::sync)
    }

    fn publish(&self) -> Result<()> {
        let io = |error| not_written(&self.root, &self.name, error);
        let path = self.root.path.join(&self.name);
        let mut attempts = 0;
        let directory = loop {
            let directory = self.root.parent_of(&self.name)?;
            attempts += 1;
            match files::rename_new(&self.temporary, &path) {
                Ok(()) => break directory,
                // Whoever removed the last object of a directory may have taken the directory away just now.
                Err(error)
                    if error.kind() == ErrorKind::NotFound
                        && attempts < MOST_ATTEMPTS
                        && self.temporary.exists() => {}
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    return Err(RepoError::AlreadyExists {
                        what: format!("{} in {}", self.name, self.root.path.display()),
                        hint: String::new(),
                    });
                }
                Err(error) => return Err(io(error)),
            }
        };
        files::sync_directory(&directory).map_err(|error| {
            // Whoever gets an error may rely on there being no such object.
            let _ = std::fs::remove_file(&path);
            io(error)
        })
    }
}

impl ObjectWriter for LocalWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let file = self.file.as_mut().ok_or_else(|| {
            RepoError::Invalid(format!("{} is finished and takes no more", self.name))
        })?;
        file.write(bytes).map_err(|error| not_written(&self.root, &self.name, error))
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.sync().map_err(|error| not_written(&self.root, &self.name, error))?;
        self.publish()
    }
}

impl Drop for LocalWriter {
    fn drop(&mut self) {
        drop(self.file.take());
        // After success there is nothing under this name; otherwise prune gets what stays.
        let _ = std::fs::remove_file(&self.temporary);
    }
}

/// The error of an object that could not be written, with what a person needs to know first.
fn not_written(root: &Root, name: &str, error: io::Error) -> RepoError {
    let kept = "nothing of it is kept, every finished restore point is untouched";
    RepoError::io(format!("write {name} in {} ({kept})", root.path.display()), error)
}
