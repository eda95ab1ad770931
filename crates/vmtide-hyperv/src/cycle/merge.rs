//! Waiting until what the VM wrote during a backup is back in its disk.
//!
//! While a checkpoint stands the VM writes into a new differencing file per disk, a *leaf*. When the checkpoint is gone
//! the host merges the leaves in the background. Only then does the VM run on the file it ran on before, and only then
//! is nothing left: merges that never end are the commonest complaint about backups of Hyper-V.

use crate::cycle::HypervHypervisor;
use crate::{DiskAttachment, gates};
use uuid::Uuid;
use vmtide_block::CancelToken;
use vmtide_hypervisor::{HypervisorError, Result};

/// The first pause between two looks, in milliseconds; they grow to that of the host's options.
const FIRST_PAUSE_MS: u64 = 200;

/// The most checkpoints whose disks are looked at to tell whether they hold a leaf.
const MAX_SNAPSHOTS: usize = 256;

/// The leaves of a checkpoint among the files that its VM writes to: where it holds a disk, the VM writes to a
/// differencing file that is another.
pub(crate) fn leaves(live: &[DiskAttachment], held: &[DiskAttachment]) -> Vec<String> {
    let is_leaf = |disk: &&DiskAttachment| {
        gates::is_leaf(&disk.host_resource)
            && held.iter().any(|other| {
                other.location == disk.location
                    && !other.host_resource.eq_ignore_ascii_case(&disk.host_resource)
            })
    };
    live.iter().filter(is_leaf).map(|disk| disk.host_resource.clone()).collect()
}

/// The leaves that are still there: the VM writes to them, or their files exist and no checkpoint of a user's or another
/// product's has taken them over.
///
/// # Errors
/// Where the host cannot be asked.
pub(crate) fn left(hyperv: &HypervHypervisor, vm: Uuid, leaves: &[String]) -> Result<Vec<String>> {
    if leaves.is_empty() {
        return Ok(Vec::new());
    }
    let host = hyperv.host();
    let record = match host.vm(vm) {
        Ok(record) => record,
        // The VM was deleted, and its files with it or not: nothing of ours runs on.
        Err(HypervisorError::NotFound { .. }) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let live: Vec<String> =
        host.disks(&record.settings)?.into_iter().map(|disk| disk.host_resource).collect();
    let is_live = |leaf: &String| live.iter().any(|path| path.eq_ignore_ascii_case(leaf));
    let (mut left, idle): (Vec<_>, Vec<_>) = leaves.iter().cloned().partition(is_live);
    let mut present: Vec<String> = idle.into_iter().filter(|leaf| exists(hyperv, leaf)).collect();
    if !present.is_empty() {
        let held = held_by_checkpoints(hyperv, vm)?;
        present.retain(|leaf| !held.iter().any(|path| path.eq_ignore_ascii_case(leaf)));
        left.append(&mut present);
    }
    Ok(left)
}

/// Waits until no leaf is left, within the limit of the options. Answers with those that are.
///
/// # Errors
/// As [`left`]; a cancelled job.
pub(crate) fn wait(
    hyperv: &HypervHypervisor,
    vm: Uuid,
    leaves: &[String],
    cancel: &CancelToken,
) -> Result<Vec<String>> {
    let options = hyperv.host().options();
    let clock = options.clock.as_ref();
    let deadline = clock.now_ms().saturating_add(hyperv.options().merge_wait_ms);
    let mut pause_ms = FIRST_PAUSE_MS.min(options.poll_interval_ms).max(1);
    loop {
        let left = left(hyperv, vm, leaves)?;
        if left.is_empty() || clock.now_ms() >= deadline || cancel.is_cancelled() {
            return Ok(left);
        }
        clock.sleep_ms(pause_ms);
        pause_ms = (pause_ms + pause_ms / 2).min(options.poll_interval_ms).max(1);
    }
}

/// Whether the file is there, as far as its directory can be seen.
fn exists(hyperv: &HypervHypervisor, path: &str) -> bool {
    let Some((directory, name)) = path.rsplit_once(['\\', '/']) else {
        return false;
    };
    match hyperv.files().list(directory) {
        Ok(entries) => entries.iter().flatten().any(|entry| entry.name.eq_ignore_ascii_case(name)),
        Err(error) => {
            tracing::debug!(%error, directory, "cannot see whether a merged file is gone");
            false
        }
    }
}

/// The files that checkpoints hold. One of ours holds no leaf of ours: it was made over them, and holds what was before.
fn held_by_checkpoints(hyperv: &HypervHypervisor, vm: Uuid) -> Result<Vec<String>> {
    let host = hyperv.host();
    let mut held = Vec::new();
    let snapshots = host.snapshots(vm)?;
    for snapshot in snapshots.iter().take(MAX_SNAPSHOTS) {
        held.extend(host.disks(&snapshot.settings)?.into_iter().map(|disk| disk.host_resource));
    }
    Ok(held)
}

/// What to tell of leaves that are left.
pub(crate) fn describe(left: &[String]) -> String {
    format!("still being merged by the host: {}", left.join(", "))
}
