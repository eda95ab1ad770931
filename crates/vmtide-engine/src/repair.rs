//! Repairing a repository.

use crate::Result;
use crate::events::{JobContext, Phase};
use vmtide_repo::{RepairOptions, RepairReport, Repository};

/// Makes right, or with `dry_run` counts, what can be made right without losing anything.
///
/// # Errors
/// Those of the repository. What was done before stays done; another run goes on.
pub fn repair(
    repository: &Repository,
    options: &RepairOptions<'_>,
    context: JobContext<'_>,
) -> Result<RepairReport> {
    context.phase(Phase::Repair, repository.location());
    Ok(repository.repair(options, context.progress, context.cancel)?)
}
