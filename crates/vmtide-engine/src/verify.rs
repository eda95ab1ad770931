//! Checking a repository: that all restore points can be restored.

use crate::Result;
use crate::events::{JobContext, Phase};
use vmtide_repo::{Repository, VerifyOptions, VerifyReport};

/// Checks the restore points of `options`: that all they refer to is there, and as much of the
/// data as asked by reading it. Damage is in the report and no error, so that all of it is found.
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
