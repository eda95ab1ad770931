//! Opening the repository that the user names.

use crate::app::App;
use crate::passwords::PasswordSource;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmtide_engine::source::{file_path, split_scheme};
use vmtide_engine::{EngineError, Result};
use vmtide_repo::{LocalStore, ObjectStore, RepoError, Repository};
use vmtide_s3::{ProbeDepth, S3Store};

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
            "{scheme}:// is no repository: give a directory, or s3://BUCKET/PREFIX"
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
pub fn store_at(app: &App, location: &str) -> Result<Arc<dyn ObjectStore>> {
    if is_s3(location) {
        return Ok(Arc::new(s3_at(app, location)?));
    }
    Ok(Arc::new(LocalStore::open(directory_of(location)?)?))
}

/// Whether a repository is in S3.
pub fn is_s3(location: &str) -> bool {
    matches!(split_scheme(location), Some(("s3", _)))
}

/// The store of the repository in S3 at `location`.
///
/// # Errors
/// As [`store_at`].
pub fn s3_at(app: &App, location: &str) -> Result<S3Store> {
    let store = S3Store::connect(&app.global.s3.options(location)?)?;
    store.require(ProbeDepth::Reading)?;
    Ok(store)
}

/// Opens the repository at `location`.
///
/// # Errors
/// As [`open`].
pub fn open_at(app: &App, location: &str) -> Result<Repository> {
    open_with(app, location, &PasswordSource::of_repository(&app.global.password))
}

/// Opens another repository beside that of `-r`, with the password in `file`, or else the same.
///
/// # Errors
/// As [`open`].
pub fn open_other(app: &App, location: &str, file: Option<&Path>) -> Result<Repository> {
    match file {
        Some(file) => open_with(app, location, &PasswordSource::of_file(file)),
        None => open_at(app, location),
    }
}

/// Opens the repository at `location` with a password of its own.
///
/// # Errors
/// As [`open`].
pub fn open_with(app: &App, location: &str, source: &PasswordSource<'_>) -> Result<Repository> {
    open_in(store_at(app, location)?, source)
}

/// Opens the repository in a store.
///
/// # Errors
/// As [`open`].
pub fn open_in(store: Arc<dyn ObjectStore>, source: &PasswordSource<'_>) -> Result<Repository> {
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
