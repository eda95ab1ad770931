//! What of a VM can be tracked and held, and what stands in the way of a backup.
//!
//! A generation is no reason by itself: a generation 1 VM whose disks are VHDX files and whose configuration
//! is recent is tracked like any other. What generation 1 VMs often have is VHD files and old versions; each
//! is a reason of its own to read a disk in full, and named.

use crate::{DiskAttachment, SnapshotKind, SnapshotRecord, VmSettings};
use vmtide_hypervisor::FullReason;

/// The first version of a VM's configuration whose changes are tracked (Windows Server 2016).
const FIRST_TRACKED: (u16, u16) = (6, 2);

/// The first version at which tracking is the ordinary case; some products refuse to track below it.
const FIRST_ORDINARY: (u16, u16) = (8, 0);

/// What the name of a checkpoint of ours begins with; the job's id follows.
pub(crate) const OUR_NAME: &str = "vmtide ";

/// Whether the version of a VM's configuration lets its changes be tracked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VersionGate {
    /// It does.
    Tracked,
    /// It may; the text says why it may not.
    Doubtful(String),
    /// It does not, and every disk is read in full; the text says why.
    Untracked(String),
}

impl VersionGate {
    /// Looks at the settings of a VM.
    pub fn of(settings: &VmSettings) -> Self {
        let (major, minor) = settings.version;
        let mend = "Update-VMVersion raises it for good while the VM is off";
        if settings.version < FIRST_TRACKED {
            Self::Untracked(format!(
                "the VM's configuration has version {major}.{minor}, and changes are tracked from 6.2 on; {mend}"
            ))
        } else if settings.version < FIRST_ORDINARY {
            Self::Doubtful(format!(
                "the VM's configuration has version {major}.{minor}: change tracking may not work below 8.0; {mend}"
            ))
        } else {
            Self::Tracked
        }
    }
}

/// What a backup gets of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskGate {
    /// Its content, and what changed.
    Tracked,
    /// Its content.
    InFull(FullReason),
    /// Nothing: no checkpoint of the VM holds it. The text says why, and what to do instead.
    NotHeld(String),
}

impl DiskGate {
    /// Looks at one disk. `format` is what its file was found to be (`vhdx`, `vhd`, `vhds`); none goes by the
    /// file's name.
    pub fn of(version: &VersionGate, disk: &DiskAttachment, format: Option<&str>) -> Self {
        let by_name = format_of_name(&disk.host_resource);
        let format = format.map(str::to_lowercase).or(by_name.map(str::to_owned));
        if disk.pass_through {
            return Self::NotHeld(
                "it is a physical disk of the host handed through, which no checkpoint holds; back it up \
                 from within the guest"
                    .into(),
            );
        }
        if disk.shared || format.as_deref() == Some("vhds") {
            return Self::NotHeld(
                "it is shared by several VMs, and checkpoints of one VM do not hold it; back it up from \
                 within the guests"
                    .into(),
            );
        }
        let untracked = |why: String| Self::InFull(FullReason::NoTracking(why));
        match (version, format.as_deref()) {
            (VersionGate::Untracked(why), _) => untracked(why.clone()),
            (_, Some("vhdx")) => Self::Tracked,
            (_, Some("vhd")) => untracked(format!(
                "{} is a VHD file, and only VHDX is tracked; Convert-VHD makes one of it",
                disk.host_resource
            )),
            (_, other) => untracked(format!(
                "{} has the format {}, which is not VHDX",
                disk.host_resource,
                other.unwrap_or("of no known file")
            )),
        }
    }
}

/// The format that the name of a file says; none for another extension.
fn format_of_name(path: &str) -> Option<&'static str> {
    let extension = path.rsplit_once('.')?.1.to_lowercase();
    Some(match extension.as_str() {
        "vhdx" | "avhdx" => "vhdx",
        "vhd" | "avhd" => "vhd",
        "vhds" => "vhds",
        _ => return None,
    })
}

/// Whether a file is the leaf that a VM writes to while a checkpoint stands, by its name.
pub(crate) fn is_leaf(path: &str) -> bool {
    let extension = path.rsplit_once('.').map_or(String::new(), |(_, end)| end.to_lowercase());
    matches!(extension.as_str(), "avhdx" | "avhd")
}

/// The job whose checkpoint this is, by its name; none for one that is not ours.
pub fn job_of_checkpoint(name: &str) -> Option<&str> {
    let job = name.strip_prefix(OUR_NAME)?;
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (job.len() == 16 && job.bytes().all(is_digit)).then_some(job)
}

/// The checkpoints of a VM by whose they are.
#[derive(Clone, Debug, Default)]
pub struct Checkpoints {
    /// Recovery checkpoints with our name: of a job that runs, or left by one that was killed.
    pub ours: Vec<SnapshotRecord>,
    /// Recovery checkpoints without: of another product, or of ours before they were named.
    pub others: Vec<SnapshotRecord>,
    /// Those of users, automatic ones, Replica's.
    pub of_users: Vec<SnapshotRecord>,
}

impl Checkpoints {
    /// Sorts the checkpoints of a VM.
    pub fn of(snapshots: Vec<SnapshotRecord>) -> Self {
        let mut sorted = Self::default();
        for snapshot in snapshots {
            let list = match (&snapshot.kind, job_of_checkpoint(&snapshot.settings.name)) {
                (SnapshotKind::Recovery, Some(_)) => &mut sorted.ours,
                (SnapshotKind::Recovery, None) => &mut sorted.others,
                _ => &mut sorted.of_users,
            };
            list.push(snapshot);
        }
        sorted
    }

    /// What to tell of another product's recovery checkpoints; none where there are none. A backup may go
    /// on: the host says itself whether it takes another checkpoint.
    pub fn warning(&self) -> Option<String> {
        let names: Vec<_> = self.others.iter().map(|one| one.settings.name.as_str()).collect();
        (!names.is_empty()).then(|| {
            format!(
                "another backup's recovery checkpoint is there ({}): that backup is running, or has left it",
                names.join(", ")
            )
        })
    }
}
