//! Small files beside the disks: what a restore of a VM reads and makes, below the roots and nowhere else.
//!
//! Whole files only, with a limit: configurations of VMs have some hundred kilobytes. Nothing is ever replaced.

use super::error::{ApiError, Result};
use super::request::{Asked, json};
use crate::held_body;
use crate::limits::MAX_FILE_BYTES;
use crate::provider::ProviderError;
use crate::state::{AppState, Shared};
use crate::stream::receive_bytes;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::sync::Arc;
use tokio::sync::OwnedSemaphorePermit;

/// The most entries of a directory that are told: more is no directory of a VM.
const MAX_ENTRIES: usize = 100_000;

/// A directory as it is told.
#[derive(Serialize)]
struct Directory {
    path: String,
    /// Free on its volume; none where that cannot be told.
    free_bytes: Option<u64>,
    files: Vec<Entry>,
}

/// A file of it.
#[derive(Serialize)]
struct Entry {
    name: String,
    size_bytes: u64,
}

/// `GET /v1/files?path=DIRECTORY`
pub(super) async fn list(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&["path"])?;
    let path = asked.path()?;
    json(&state.blocking(move |state| list_directory(state, path)).await?)
}

fn list_directory(state: &AppState, requested: String) -> Result<Directory, ProviderError> {
    let missing = || ProviderError::NotFound { path: requested.clone() };
    let path = state.roots.locate_directory(&requested).map_err(|refusal| {
        tracing::debug!(path = requested, %refusal, "refused");
        missing()
    })?;
    let failed = |error: &std::io::Error| failed(&requested, error);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&path).map_err(|error| failed(&error))? {
        let entry = entry.map_err(|error| failed(&error))?;
        // Not followed: a link is no file of this directory.
        let Ok(metadata) = entry.metadata() else { continue };
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !metadata.is_file() {
            continue;
        }
        if files.len() >= MAX_ENTRIES {
            let reason = format!("the directory has more than {MAX_ENTRIES} files");
            return Err(ProviderError::Unsupported { path: requested, reason });
        }
        files.push(Entry { name, size_bytes: metadata.len() });
    }
    files.sort_by(|one, other| one.name.cmp(&other.name));
    let free_bytes = vmtide_block::files::free_bytes(&path).ok();
    Ok(Directory { path: requested, free_bytes, files })
}

/// `GET /v1/files/content?path=FILE`
pub(super) async fn read(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&["path"])?;
    let path = asked.path()?;
    let place = place(&state)?;
    let requested = path.clone();
    let content = state.with_disk(&path, move |_, path| {
        let failed = |error: std::io::Error| failed(&requested, &error);
        let file = File::open(path).map_err(failed)?;
        let mut content = Vec::new();
        // A file may grow while it is read.
        let read = file.take(MAX_FILE_BYTES + 1).read_to_end(&mut content).map_err(failed)?;
        if read as u64 > MAX_FILE_BYTES {
            let reason = format!("only files of at most {MAX_FILE_BYTES} bytes are given whole");
            return Err(ProviderError::Unsupported { path: requested.clone(), reason });
        }
        Ok((content, place))
    });
    let (content, place) = content.await?;
    // The content is held until the client has taken it.
    let body = held_body::hold(content, place);
    Ok(([(CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

/// `POST /v1/files/content?path=FILE`
pub(super) async fn write(
    State(state): State<Shared>,
    asked: Asked,
    body: Body,
) -> Result<Response> {
    asked.parameters.only(&["path"])?;
    asked.may_write()?;
    let path = asked.path()?;
    let place = place(&state)?;
    let content = receive_bytes(body, MAX_FILE_BYTES, &state.limits).await?;
    let written = state.blocking(move |state| {
        // Also where the client has gone meanwhile.
        let _place = place;
        write_new(state, &path, &content)
    });
    written.await?;
    Ok(StatusCode::CREATED.into_response())
}

fn write_new(state: &AppState, requested: &str, content: &[u8]) -> Result<(), ProviderError> {
    let vacant = state.locate_new(requested)?;
    let write = |path: &Path| -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
        let written = file.write_all(content).and_then(|()| file.sync_all());
        if written.is_err() {
            drop(file);
            // A part must not be taken for the whole; that it is in the way is told by the next try.
            let _ = std::fs::remove_file(path);
        }
        written
    };
    write(vacant.path()).map_err(|error| failed(requested, &error))?;
    vacant.recheck().map_err(|refusal| ProviderError::Failed {
        path: requested.to_owned(),
        reason: format!("the new file is not where it was asked for: that {refusal}"),
    })
}

/// `DELETE /v1/files?path=FILE`
pub(super) async fn remove(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&["path"])?;
    asked.may_write()?;
    let path = asked.path()?;
    let requested = path.clone();
    let removed = state.blocking(move |state| {
        let located = state.locate(&path)?;
        let claim = state.work.claim(located.path()).ok_or_else(|| ProviderError::InUse {
            path: path.clone(),
            reason: "another client of the agent writes it".into(),
        })?;
        // By the name that was asked for where that is a link would remove something else: the file itself goes.
        let removed = std::fs::remove_file(located.path());
        drop(claim);
        removed.map_err(|error| failed(&requested, &error))
    });
    removed.await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// `POST /v1/files/directories?path=DIRECTORY`
pub(super) async fn make_directory(State(state): State<Shared>, asked: Asked) -> Result<Response> {
    asked.parameters.only(&["path"])?;
    asked.may_write()?;
    let path = asked.path()?;
    let made = state.blocking(move |state| {
        state.roots.create_directory(&path).map_err(|refusal| {
            tracing::debug!(path, %refusal, "refused");
            match refusal {
                crate::roots::Refusal::Io(error) => failed(&path, &error),
                _ => ProviderError::NotFound { path: path.clone() },
            }
        })
    });
    made.await?;
    Ok(StatusCode::CREATED.into_response())
}

/// `DELETE /v1/files/directories?path=DIRECTORY`: one that is empty; any other stays.
pub(super) async fn remove_directory(
    State(state): State<Shared>,
    asked: Asked,
) -> Result<Response> {
    asked.parameters.only(&["path"])?;
    asked.may_write()?;
    let path = asked.path()?;
    let removed = state.blocking(move |state| {
        let missing = |_| ProviderError::NotFound { path: path.clone() };
        let directory = state.roots.locate_directory(&path).map_err(missing)?;
        if state.roots.directories().any(|root| root == directory) {
            let reason = "it is a directory that the agent serves".to_owned();
            return Err(ProviderError::Denied { path: path.clone(), reason });
        }
        match std::fs::remove_dir(&directory) {
            Err(error) if error.kind() != ErrorKind::DirectoryNotEmpty => {
                Err(failed(&path, &error))
            }
            _ => Ok(()),
        }
    });
    removed.await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The right to hold one file in memory.
fn place(state: &Shared) -> Result<OwnedSemaphorePermit> {
    Arc::clone(&state.work.files).try_acquire_owned().map_err(|_| {
        ApiError::new("busy", "the agent moves as many files as it does at once: ask again later")
    })
}

fn failed(path: &str, error: &std::io::Error) -> ProviderError {
    let path = path.to_owned();
    let reason = error.to_string();
    match error.kind() {
        ErrorKind::NotFound => ProviderError::NotFound { path },
        ErrorKind::AlreadyExists => ProviderError::Exists { path },
        ErrorKind::PermissionDenied => ProviderError::Denied { path, reason },
        ErrorKind::ResourceBusy | ErrorKind::ExecutableFileBusy => {
            ProviderError::InUse { path, reason }
        }
        _ => ProviderError::Failed { path, reason },
    }
}
