//! Steps on files and directories that survive a crash, and the file systems that lack some of them.

use crate::{RepoError, Result};
use std::path::Path;

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub(super) use unix::{create_directory, create_new, open_regular, rename_new, sync_directory};
#[cfg(windows)]
pub(super) use windows::{create_directory, create_new, open_regular, rename_new, sync_directory};

/// Creates a directory and those above it that are missing, each durable.
pub(super) fn create_directories(path: &Path) -> Result<()> {
    let missing: Vec<&Path> = path.ancestors().take_while(|p| !p.exists()).collect();
    for directory in missing.into_iter().rev() {
        create_directory(directory)
            .and_then(|()| directory.parent().map_or(Ok(()), sync_directory))
            .map_err(|error| {
                RepoError::io(format!("create directory {}", directory.display()), error)
            })?;
    }
    Ok(())
}
