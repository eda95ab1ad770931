//! Disks that are left out of a backup, and whether they are the ones that were meant.
//!
//! A disk is left out by its place (`scsi1:0`). SCSI controllers have no numbers of their own and are numbered in the
//! order of their ids, so that one that is added may move the places of all others: the exclusion then hits a disk that
//! was backed up until now. Only the disk's GUID, which its file tells, is proof.

use crate::DiskAttachment;
use crate::cycle::HypervHypervisor;
use crate::cycle::disks::{self, Bases};
use uuid::Uuid;
use vmtide_hypervisor::{DiskId, FreezeRequest, HypervisorError, Result};

/// A disk that is left out.
pub(crate) struct Excluded {
    /// Its place.
    id: DiskId,
    /// Its GUID, where its file has one; else why that is not known.
    guid: Result<Option<Uuid>, String>,
}

/// Learns which disks are left out. One that cannot be opened may be left out for just that.
///
/// # Errors
/// Where the job was cancelled.
pub(crate) fn look_at(
    hyperv: &HypervHypervisor,
    excluded: &[DiskAttachment],
    request: &FreezeRequest,
) -> Result<Vec<Excluded>> {
    let mut found = Vec::with_capacity(excluded.len());
    for attachment in excluded {
        request.cancel.check()?;
        let guid = disks::open_file(hyperv, attachment).map(|file| file.disk_id);
        request.cancel.check()?;
        let guid = guid.map_err(|error| error.to_string());
        found.push(Excluded { id: disks::id_of(attachment), guid });
    }
    Ok(found)
}

/// The GUIDs of disks that are left out.
pub(crate) fn guids(excluded: &[Excluded]) -> impl Iterator<Item = Uuid> {
    excluded.iter().filter_map(|disk| disk.guid.clone().ok().flatten())
}

/// Looks whether a disk that the base has in another place would be left out now. `here` are the GUIDs of the disks that
/// are backed up. A disk that the base has in the very place is left out on purpose.
///
/// Answers with warnings, where it cannot be known.
///
/// # Errors
/// Where one would: nobody meant that, and its content would be in no restore point from now on.
pub(crate) fn check(
    vm: &str,
    bases: &Bases<'_>,
    here: &[Uuid],
    excluded: &[Excluded],
) -> Result<Vec<String>> {
    let is_excluded = |id: &DiskId| excluded.iter().any(|disk| disk.id == *id);
    let missing = bases.guids.iter().filter(|(_, guid)| !here.contains(guid));
    let missing: Vec<_> = missing.collect();
    let mut warnings = Vec::new();
    for disk in excluded {
        match &disk.guid {
            Ok(Some(guid)) => {
                let mut before = missing.iter().filter(|(_, other)| other == guid);
                let Some((id, _)) = before.next() else { continue };
                if **id == disk.id || before.any(|(id, _)| **id == disk.id) {
                    continue;
                }
                return Err(hits_another(vm, &disk.id, id, *guid));
            }
            Ok(None) => {}
            Err(why) => {
                let lost = missing.iter().find(|(id, _)| !is_excluded(id));
                warnings.extend(lost.map(|(id, _)| {
                    format!(
                        "whether the excluded disk {} is the one that was {id} in the previous restore point is \
                         not known: {why}",
                        disk.id
                    )
                }));
            }
        }
    }
    Ok(warnings)
}

fn hits_another(vm: &str, id: &DiskId, before: &DiskId, guid: Uuid) -> HypervisorError {
    HypervisorError::failed(
        format!("leave the disk {id} of {vm} out"),
        format!(
            "it is the disk that was {before} in the previous restore point (id {guid}): a controller that is \
             added or removed changes the numbers of the others; exclude the place where the disk that is meant \
             is now, or, if this one is, back it up there once more first"
        ),
    )
}
