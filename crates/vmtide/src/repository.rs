//! Opening the repository that the user names.

use crate::app::App;
use crate::passwords::PasswordSource;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_engine::source::{file_path, split_scheme};
use vmtide_engine::{EngineError, Result};
use vmtide_repo::{LocalStore, ObjectStore, RepoError, Repository};

/// The directory of a repository given as a path or `file:///` URL.
///
/// # Errors
/// [`EngineError::Usage`] for other URLs.
pub fn directory_of(location: &str) -> Result<PathBuf> {
    match split_scheme(location) {
        None if location.is_empty() => Err(EngineError::usage("the repository's path is empty")),
        None => Ok(location.into()),
        Some(("file", rest)) => file_path(location, rest),
        Some((scheme, _)) => Err(EngineError::usage(format!(
            "{scheme}:// repositories are not in this build yet: give a directory"
        ))),
    }
}

/// Opens the repository of `-r`.
///
/// # Errors
/// [`EngineError::Usage`] where none is named; that of opening it.
pub fn open(app: &App) -> Result<Repository> {
    let location = app.global.repository.as_deref().ok_or_else(|| {
        EngineError::usage("no repository: give -r REPO, or set VMTIDE_REPOSITORY")
    })?;
    open_at(app, location)
}

/// The store of the repository at `location`.
///
/// # Errors
/// [`EngineError::Usage`] for a location that is none; those of the store.
pub fn store_at(location: &str) -> Result<Arc<dyn ObjectStore>> {
    Ok(Arc::new(LocalStore::open(&directory_of(location)?)?))
}

/// Opens the repository at `location`.
///
/// # Errors
/// As [`open`].
pub fn open_at(app: &App, location: &str) -> Result<Repository> {
    open_with(location, &PasswordSource::of_repository(&app.global.password))
}

/// Opens another repository beside that of `-r`, with the password in `file`, or else the same.
///
/// # Errors
/// As [`open`].
pub fn open_other(app: &App, location: &str, file: Option<&Path>) -> Result<Repository> {
    match file {
        Some(file) => open_with(location, &PasswordSource::of_file(file)),
        None => open_at(app, location),
    }
}

/// Opens the repository at `location` with a password of its own.
///
/// # Errors
/// As [`open`].
pub fn open_with(location: &str, source: &PasswordSource<'_>) -> Result<Repository> {
    let store = store_at(location)?;
    let mut refused = None;
    let mut password = || {
        source.get().map_err(|error| {
            let message = error.to_string();
            refused = Some(error);
            RepoError::Invalid(message)
        })
    };
    Repository::open(store, &mut password).map_err(|error| {
        // The reason that there is no password has a class of its own.
        refused.unwrap_or(EngineError::Repo(error))
    })
}
