//! Whether a VM has been taken back to a checkpoint since an earlier moment.
//!
//! `ApplySnapshot` throws away the file that the VM writes to and begins a new one on top of the checkpoint's. What the host
//! then answers for a tracking id of before is not documented: where ids outlive that, "changed since" leaves out what was
//! thrown away, and a restore point would be the state before the revert without a word. So it has to be shown that
//! nothing was applied:
//!
//! - A VM that had no checkpoints of users at the base cannot have gone back to before it.
//! - A disk that was frozen in the same file as at the base was not: a revert always makes a new one.
//! - Where users made checkpoints since, the first of them holds that file, and it is among those that the VM goes on from
//!   (`Parent`, from the newest to the oldest).
//!
//! Everything else is not known, as where a checkpoint of before the base was removed since and the file was merged
//! with it: that disk is read in full.

use crate::{DiskAttachment, DiskLocation, Host, SnapshotKind, SnapshotRecord, VmSettings};
use uuid::Uuid;
use vmtide_hypervisor::{FullReason, Result};

/// The most checkpoints that are followed from the VM to the oldest; Hyper-V allows 50.
const MAX_ANCESTORS: usize = 64;

/// The checkpoints of users of a VM at one moment.
pub(crate) struct Line {
    /// Whether there are any.
    any: bool,
    /// The disks of those that the moment goes on from: where they were, and the names of their files.
    held: Vec<(DiskLocation, String)>,
}

impl Line {
    /// The checkpoints of users that are there, as the state of `settings` goes on from them: those of a VM, or of a
    /// checkpoint for a backup.
    ///
    /// # Errors
    /// Where the host cannot be asked.
    pub fn of(host: &Host, vm: Uuid, settings: &VmSettings) -> Result<Self> {
        let all = host.snapshots(vm)?;
        let any = all.iter().any(|snapshot| snapshot.kind != SnapshotKind::Recovery);
        let mut held = Vec::new();
        let mut next = if any { parent_of(settings) } else { None };
        for _ in 0..MAX_ANCESTORS {
            let Some(found) = next.take().and_then(|id| find(&all, &id)) else { break };
            for disk in host.disks(&found.settings)? {
                held.push((disk.location, file_name(&disk.host_resource).to_lowercase()));
            }
            next = parent_of(&found.settings);
        }
        Ok(Self { any, held })
    }

    /// What a token keeps of a disk that was frozen in the file at `path`: its name, or nothing where no checkpoint was
    /// there to go back to.
    pub fn to_keep(&self, path: &str) -> String {
        if self.any { file_name(path).to_lowercase() } else { String::new() }
    }

    /// Why a disk may have been taken back since the moment of which a token keeps `kept`; none where it was not.
    pub fn doubt(&self, disk: &DiskAttachment, kept: Option<&str>) -> Option<FullReason> {
        let lost = |why: &str| Some(FullReason::TrackingLost(why.into()));
        let kept = match kept {
            None => {
                return lost(
                    "its record does not tell whether the VM had checkpoints to go back to",
                );
            }
            Some("") => return None,
            Some(kept) => kept,
        };
        let is_same = file_name(&disk.host_resource).eq_ignore_ascii_case(kept);
        let is_held = |(location, name): &(DiskLocation, String)| {
            *location == disk.location && name.eq_ignore_ascii_case(kept)
        };
        if is_same || self.held.iter().any(is_held) {
            return None;
        }
        lost(
            "checkpoints of the VM were applied or removed since, and which of the two cannot be told: after the one \
             what changed is not known",
        )
    }
}

/// The checkpoint that settings go on from, by its `InstanceID`; none too where that cannot be read.
fn parent_of(settings: &VmSettings) -> Option<String> {
    let parent = settings.instance.optional_reference("Parent").ok().flatten()?;
    parent.key("InstanceID").map(str::to_owned)
}

fn find<'a>(all: &'a [SnapshotRecord], id: &str) -> Option<&'a SnapshotRecord> {
    all.iter().find(|snapshot| snapshot.settings.instance_id.eq_ignore_ascii_case(id))
}

/// The name of a file without its directory: moving the storage of a VM changes only that.
fn file_name(path: &str) -> &str {
    path.rsplit(['\\', '/']).next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ControllerKind;
    use vmtide_cim::{CimInstance, ObjectPath};

    fn disk(path: &str, location: u32) -> DiskAttachment {
        DiskAttachment {
            instance_id: "Microsoft:V".into(),
            path: ObjectPath::default(),
            host_resource: path.into(),
            location: place(location),
            pass_through: false,
            shared: false,
            instance: CimInstance::default(),
        }
    }

    fn place(location: u32) -> DiskLocation {
        DiskLocation { controller: ControllerKind::Scsi, controller_number: 0, location }
    }

    #[test]
    fn only_a_file_that_is_still_there_shows_that_nothing_was_applied() {
        let none = Line { any: false, held: Vec::new() };
        assert_eq!(none.to_keep(r"C:\VMs\web.vhdx"), "");
        assert_eq!(none.doubt(&disk(r"C:\VMs\web.vhdx", 0), Some("")), None);
        assert!(none.doubt(&disk(r"C:\VMs\web.vhdx", 0), None).is_some(), "an older record");
        let some = Line { any: true, held: vec![(place(0), "web_a.avhdx".into())] };
        assert_eq!(some.to_keep(r"D:\x\Web_A.avhdx"), "web_a.avhdx");
        // Moved to another directory, as with the storage of a VM.
        assert_eq!(some.doubt(&disk(r"E:\Web_B.avhdx", 0), Some("web_b.avhdx")), None);
        // A user's checkpoint since holds it.
        assert_eq!(some.doubt(&disk(r"E:\web_c.avhdx", 0), Some("web_a.avhdx")), None);
        for (path, location, kept) in [
            (r"E:\web_c.avhdx", 1, "web_a.avhdx"),
            (r"E:\web_c.avhdx", 0, "web_b.avhdx"),
            (r"E:\web.vhdx", 0, "web_b.avhdx"),
        ] {
            let doubt = some.doubt(&disk(path, location), Some(kept));
            assert!(matches!(doubt, Some(FullReason::TrackingLost(_))), "{path} {kept}");
        }
    }
}
