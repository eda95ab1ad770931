//! Checking a repository: that all restore points can be restored.

use crate::Result;
use crate::events::{JobContext, Phase};
use std::sync::Arc;
use vmtide_repo::{IntegrityReport, ObjectStore, Repository, VerifyOptions, VerifyReport};

/// Checks the restore points of `options`: that all they refer to is there, and as much of the
/// data as asked by reading it. Damage is in the report and no error, so that all of it is found; it
/// is put on record, so that the next backup heals it.
///
/// # Errors
/// Where the check itself could not be done.
pub fn verify(
    repository: &Repository,
    options: &VerifyOptions,
    context: JobContext<'_>,
) -> Result<VerifyReport> {
    context.phase(Phase::Verify, repository.location());
    Ok(repository.verify(options, context.progress, context.cancel)?)
}

/// Compares all stored bytes of a repository with their checksums, without its key.
///
/// # Errors
/// Where the check itself could not be done.
pub fn check_integrity(
    store: &Arc<dyn ObjectStore>,
    context: JobContext<'_>,
) -> Result<IntegrityReport> {
    context.phase(Phase::Verify, store.location());
    Ok(vmtide_repo::check_integrity(store, context.progress, context.cancel)?)
}
