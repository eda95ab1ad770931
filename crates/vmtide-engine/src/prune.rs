//! Removing what no restore point needs.

use crate::Result;
use crate::events::{JobContext, Phase};
use vmtide_repo::{PruneOptions, PruneReport, Repository};

/// Removes, or with `dry_run` counts, what no restore point needs.
///
/// # Errors
/// Those of the repository; busy while another job uses it. Whatever was not removed is found by
/// the next run.
pub fn prune(
    repository: &Repository,
    options: &PruneOptions,
    context: JobContext<'_>,
) -> Result<PruneReport> {
    context.phase(Phase::Prune, repository.location());
    Ok(repository.prune(options, context.progress, context.cancel)?)
}
