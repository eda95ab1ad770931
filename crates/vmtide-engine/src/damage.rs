//! Damage that a job meets goes on record, so that the next backup heals it.

use vmtide_repo::Repository;

/// Puts on record what was met damaged. That it cannot be written, because the repository may only
/// be read, must not hide what the job has to say.
pub(crate) fn record_damage(repository: &Repository, by: &str) {
    if let Err(error) = repository.quarantine_found(by) {
        tracing::warn!(%error, "damage that was met could not be put on record");
    }
}
