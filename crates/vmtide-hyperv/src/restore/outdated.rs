//! Reference points that a restore in place has outdated and could not remove.
//!
//! A restore destroys the reference points that it knows as ours. Those of another repository, of another
//! machine's vmtide or of another product stay, and the host may go on answering "what changed since" for
//! them, without what the restore wrote. Giving the disks a new id (`VIRTUAL_DISK_ID`) would tell everybody,
//! but guests see that id (SCSI page 83) and may know their disks by it. So a note is put beside the disks
//! before the first byte is written, which names those reference points. Every backup of vmtide, whatever its
//! repository and machine, looks for such notes and builds on none of the points they name.

use super::host_path::{directory_of, join};
use crate::cycle::same_point;
use crate::model::read::guid;
use crate::model::types::{DiskAttachment, ReferencePointRecord, VmRecord};
use crate::{Host, HostFiles};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use uuid::Uuid;
use vmtide_hypervisor::{HypervisorError, JobId, Result};

/// The largest note that is read, in bytes: some thousands of reference points.
const MAX_NOTE_BYTES: u64 = 1 << 20;

/// The most notes that are read. A VM has one in each directory of its disks; more are no work of vmtide's, and then no
/// point is believed.
const MAX_NOTES: usize = 64;

/// The version of what a note holds.
const VERSION: u32 = 1;

/// What a note holds. Names of fields are read by other versions: they only get more.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    version: u32,
    /// For people who find the file.
    about: String,
    /// The reference points, by their `InstanceID`.
    outdated_reference_points: Vec<String>,
}

/// Which reference points of a VM say nothing of its disks any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct OutdatedPoints {
    points: Vec<String>,
    /// A note cannot be read: any of them may be.
    all: bool,
}

impl OutdatedPoints {
    /// Whether the reference point `id` is one of them.
    pub(crate) fn holds(&self, id: &str) -> bool {
        self.all || self.points.iter().any(|point| same_point(point, id))
    }
}

/// Where the notes of a VM are: beside its disks.
pub(super) struct Notes<'a> {
    files: &'a dyn HostFiles,
    vm: Uuid,
    directories: BTreeSet<String>,
}

impl<'a> Notes<'a> {
    /// Those beside `disks` of `vm`.
    pub fn beside(files: &'a dyn HostFiles, vm: Uuid, disks: &[DiskAttachment]) -> Self {
        let own = disks.iter().filter(|disk| !disk.pass_through);
        let directories = own.map(|disk| directory_of(&disk.host_resource).to_owned()).collect();
        Self { files, vm, directories }
    }

    /// What they say.
    ///
    /// # Errors
    /// Where a directory cannot be listed; one that must not be is passed over.
    pub fn read(&self) -> Result<OutdatedPoints> {
        let paths = self.paths()?;
        let mut outdated = OutdatedPoints { points: Vec::new(), all: paths.len() > MAX_NOTES };
        for path in paths.iter().take(MAX_NOTES) {
            match self.files.read_file(path, MAX_NOTE_BYTES) {
                // Removed meanwhile, by a restore that has destroyed the points or has a note of its own.
                Ok(None) => {}
                Ok(Some(content)) => match serde_json::from_slice::<Note>(&content) {
                    Ok(note) => outdated.points.extend(note.outdated_reference_points),
                    Err(_) => outdated.all = true,
                },
                Err(error @ HypervisorError::Unreachable { .. }) => return Err(error),
                Err(_) => outdated.all = true,
            }
        }
        Ok(outdated)
    }

    /// Writes down, in the directories of the disks that are `written`, that `left` are outdated from now on, and
    /// removes notes of earlier restores: what they name is among `left` or gone.
    ///
    /// # Errors
    /// Where that cannot be written: then nothing of the disks must be.
    pub fn replace(&self, written: &BTreeSet<&str>, left: &[ReferencePointRecord]) -> Result<()> {
        let earlier = self.paths()?;
        if !left.is_empty() {
            let note = Note {
                version: VERSION,
                about: "vmtide has restored disks of this VM in place. The host's change tracking since these \
                        reference points does not know of it: no backup may build on them."
                    .into(),
                outdated_reference_points: left.iter().map(|one| one.instance_id.clone()).collect(),
            };
            let content = serde_json::to_vec_pretty(&note).map_err(|error| {
                HypervisorError::failed("write down outdated reference points", error.to_string())
            })?;
            let name = format!("{}{}.json", beginning(self.vm), JobId::random());
            for directory in written {
                self.files.write_file(&join(directory, &name), &content)?;
            }
        }
        for path in earlier {
            self.files.remove_file(&path)?;
        }
        Ok(())
    }

    fn paths(&self) -> Result<Vec<String>> {
        let beginning = beginning(self.vm).to_lowercase();
        let mut paths = Vec::new();
        for directory in &self.directories {
            let present = match self.files.list(directory) {
                // Who may read the disks need not be allowed to list what lies beside them.
                Err(HypervisorError::Denied { .. }) => continue,
                present => present?.unwrap_or_default(),
            };
            let is_note = |name: &str| name.to_lowercase().starts_with(&beginning);
            let own = present.into_iter().filter(|entry| is_note(&entry.name));
            paths.extend(own.map(|entry| join(directory, &entry.name)));
        }
        Ok(paths)
    }
}

/// What the names of the notes of a VM begin with.
fn beginning(vm: Uuid) -> String {
    format!("vmtide restored VM {} ", guid(vm))
}

/// The reference points of `vm` that restores in place have outdated.
///
/// # Errors
/// Where the host cannot be asked for its disks, or their directories cannot be listed.
pub(crate) fn outdated_points(
    host: &Host,
    files: &dyn HostFiles,
    vm: &VmRecord,
) -> Result<OutdatedPoints> {
    Notes::beside(files, vm.id, &host.disks(&vm.settings)?).read()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_outdated_by_its_name_in_either_form() {
        let outdated = OutdatedPoints { points: vec![r"Microsoft:VM\POINT".into()], all: false };
        assert!(outdated.holds(r"Microsoft:VM\POINT") && outdated.holds("Microsoft:point"));
        assert!(!outdated.holds("Microsoft:OTHER"));
        assert!(!OutdatedPoints::default().holds("Microsoft:POINT"));
        assert!(OutdatedPoints { points: Vec::new(), all: true }.holds("Microsoft:POINT"));
    }

    #[test]
    fn names_of_notes_tell_vms_apart() {
        let (one, other) = (beginning(Uuid::from_u128(0xA)), beginning(Uuid::from_u128(0xAA)));
        assert!(!one.starts_with(&other) && !other.starts_with(&one));
        assert!(!one.contains(['\\', '/', ':']), "{one}");
    }
}
