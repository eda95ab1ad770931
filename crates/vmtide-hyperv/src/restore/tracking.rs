//! Forgetting change tracking of a disk that is written without the host's knowledge.
//!
//! Hyper-V tracks what a VM writes, not what a restore writes into the file of a VM that is off. A backup
//! that asked "what changed since" across such a restore would miss what it wrote. So before the first
//! write the reference points of ours are destroyed, and the files in which the host keeps its tracking
//! (`.rct`, `.mrt` beside the disk) are removed: an id from before is then unknown, which means reading the
//! disk in full. Reference points of other products stay: they are not ours; with the files gone the host
//! refuses their ids too, and where it does not, [`super::outdated`] has backups of vmtide read in full.

use super::host_path::{directory_of, file_name_of, join, stem_of};
use crate::cycle::{BaseToken, Ledger, same_point};
use crate::model::types::ReferencePointRecord;
use crate::{Host, HostFiles};
use std::path::Path;
use uuid::Uuid;
use vmtide_block::CancelToken;
use vmtide_hypervisor::{HypervisorError, Result, TrackingId};

/// The extensions of the files in which the host keeps its tracking.
const TRACKING_EXTENSIONS: [&str; 2] = ["rct", "mrt"];

/// Removes the host's tracking files beside the disk at `path`: both `disk.vhdx.rct` and `disk.rct` have
/// been seen.
///
/// # Errors
/// Where the directory cannot be read, or a file of tracking cannot be removed.
pub(super) fn remove_files(files: &dyn HostFiles, path: &str) -> Result<()> {
    let directory = directory_of(path);
    let name = file_name_of(path).to_lowercase();
    let stems = [name.as_str(), stem_of(&name)];
    for entry in files.list(directory)?.unwrap_or_default() {
        let found = entry.name.to_lowercase();
        let is_tracking = found.rsplit_once('.').is_some_and(|(stem, extension)| {
            TRACKING_EXTENSIONS.contains(&extension) && stems.contains(&stem)
        });
        if is_tracking {
            files.remove_file(&join(directory, &entry.name))?;
        }
    }
    Ok(())
}

/// The reference points of a VM; none on a host that does not know what that is.
///
/// # Errors
/// Where it cannot be asked.
pub(super) fn points_of(host: &Host, vm: Uuid) -> Result<Vec<ReferencePointRecord>> {
    match host.reference_points(vm) {
        Err(HypervisorError::Unsupported { .. }) => Ok(Vec::new()),
        points => points,
    }
}

/// Destroys the reference points of ours on a VM: those written down on this machine, and those that restore
/// points name. Answers with those that are left, which are others'.
///
/// # Errors
/// Where one is there and cannot be destroyed: then nothing must be written.
pub(super) fn destroy_points(
    host: &Host,
    state_directory: &Path,
    vm: Uuid,
    named: &[TrackingId],
    cancel: &CancelToken,
) -> Result<Vec<ReferencePointRecord>> {
    let mut ledger = Ledger::open(state_directory, vm)?;
    let mut ours: Vec<String> = ledger.all().map(|point| point.id.clone()).collect();
    let tokens = named.iter().filter_map(|id| BaseToken::parse(id).ok());
    ours.extend(tokens.filter(|token| token.vm == vm).map(|token| token.point));
    let mut others = Vec::new();
    for point in points_of(host, vm)? {
        if ours.iter().any(|id| same_point(id, &point.instance_id)) {
            host.destroy_reference_point(&point, cancel)?;
            ledger.remove(&point.instance_id)?;
        } else {
            others.push(point);
        }
    }
    let here = host.identity();
    for gone in ours {
        ledger.remove_missing(&gone, here.as_deref())?;
    }
    Ok(others)
}
