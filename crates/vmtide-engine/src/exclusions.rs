//! Disks that a backup is to leave out.

use crate::Result;
use crate::backup::BackupJob;
use crate::events::JobContext;
use vmtide_hypervisor::DiskId;

/// The disks to leave out that the VM does not have: a mistake in writing, or of a disk that was detached. Warned of, but
/// where other VMs of a selection may have them. A frozen VM no longer names the disks that are left out, so the platform
/// is asked before.
///
/// # Errors
/// Those of asking the platform.
pub fn find_unknown(
    job: &BackupJob<'_>,
    context: JobContext<'_>,
    warnings: &mut Vec<String>,
) -> Result<Vec<DiskId>> {
    if job.exclude.is_empty() {
        return Ok(Vec::new());
    }
    let known = job.hypervisor.describe(&job.vm)?.disks;
    let mut unknown = job.exclude.clone();
    unknown.retain(|id| known.iter().all(|disk| disk.id != *id));
    for excluded in unknown.iter().filter(|_| !job.is_one_of_many) {
        let names: Vec<_> = known.iter().map(|disk| disk.id.to_string()).collect();
        let message = format!(
            "disk {excluded} to be left out is none of the VM's disks, which are {}",
            names.join(", ")
        );
        context.warn(warnings, message);
    }
    Ok(unknown)
}
