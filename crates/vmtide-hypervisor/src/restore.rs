//! The port of restores: VMs that are made again from a restore point, and VMs whose disks go back to one.
//!
//! A platform that VMs can be restored to implements [`VmRestorer`]. A restore asks it to
//! [`begin`](VmRestorer::begin) and gets a [`RestoringVm`]: disks to be written. When all of them are, the
//! job calls [`finish`](RestoringVm::finish), otherwise [`abort`](RestoringVm::abort), exactly one of the
//! two. A new VM has its name only when it is complete, as the last step of `finish`; whatever happens
//! before leaves nothing behind, at once or at the next [`reap`](VmRestorer::reap_restores). A VM that is
//! changed in place cannot be undone: until all of it is written it is marked as incomplete, by its name
//! and by a file beside its disks, and the same restore, started again, goes on.

use crate::{DiskId, Firmware, FullReason, JobId, ReapReport, Result, TrackingId, VmConfig};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use vmtide_block::{CancelToken, RangeSet, WritableBlockDevice};

/// A platform on which VMs can be restored. May be shared by threads.
pub trait VmRestorer: Send + Sync {
    /// Begins a new VM: checks that its name, its id and its place are free, and makes its disks, empty.
    /// Nothing of it is registered yet.
    ///
    /// # Errors
    /// Everything made so far is undone before an error is returned.
    /// [`Busy`](crate::HypervisorError::Busy) while another job of ours restores a VM of that name.
    fn begin(&self, request: &NewVmRequest) -> Result<Box<dyn RestoringVm>>;

    /// Opens the disks of a VM that is off, to be changed where they differ from the restore point. Marks
    /// the VM as incomplete first.
    ///
    /// # Errors
    /// Where the VM runs, is saved, or has checkpoints; where it is another VM than that of the restore point,
    /// or a disk is missing, is another one, or is smaller. Its disks have not been written then, and it is
    /// not marked; change tracking that writing would have made untrue may be gone already.
    fn begin_in_place(&self, request: &InPlaceRequest) -> Result<Box<dyn RestoringVm>>;

    /// Removes what killed restores of ours left: VMs that never got their name, and their files. What is
    /// not ours is never touched, nor what a living job works on.
    ///
    /// # Errors
    /// Where something of ours is there but could not be removed.
    fn reap_restores(&self) -> Result<ReapReport>;
}

/// A new VM to be made from a restore point.
#[derive(Clone, Debug)]
pub struct NewVmRequest {
    /// The configuration that the restore point holds; may be that of another platform.
    pub config: VmConfig,
    /// The name of the new VM.
    pub name: String,
    /// The job; everything made on the platform carries it.
    pub job: JobId,
    /// The disks to be made, of those of the configuration.
    pub disks: Vec<DiskToRestore>,
    /// Whether it is the VM itself that comes back, or a copy.
    pub identity: VmIdentity,
    /// By which way it is made.
    pub route: RestoreRoute,
    /// The directory on the host under which a directory for the VM is made; none takes the host's default.
    pub directory: Option<String>,
    /// Which of its network adapters are connected.
    pub networks: NetworkPlan,
    /// How it boots, where that is not to go by the configuration.
    pub firmware: Option<Firmware>,
    /// Ends the work early.
    pub cancel: CancelToken,
}

/// A VM whose disks go back to a restore point.
#[derive(Clone, Debug)]
pub struct InPlaceRequest {
    /// The VM, by name or by the platform's id.
    pub vm: String,
    /// The configuration that the restore point holds.
    pub config: VmConfig,
    /// The restore point, as the mark names it to a person.
    pub point: String,
    /// The job.
    pub job: JobId,
    /// The disks to be written.
    pub disks: Vec<DiskToRestore>,
    /// Whether the VM may be another than that of the restore point, and its disks others: they are then
    /// overwritten by their places. For a copy that is to be refreshed; without it nothing of another VM, and
    /// no other disk, is ever written.
    pub into_other_vm: bool,
    /// The tracking ids of all restore points of this VM. What they name becomes untrue by writing behind
    /// the platform's back, and must not be built on by the next backup.
    pub known_tracking: Vec<TrackingId>,
    /// Ends the work early.
    pub cancel: CancelToken,
}

/// A disk of a restore point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskToRestore {
    /// Which.
    pub id: DiskId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// How many of its bytes hold data, where that is known: what the target needs room for.
    pub data_bytes: Option<u64>,
    /// The tracking id of the restore point.
    pub tracking: Option<TrackingId>,
}

/// Whether a restored VM is the one it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmIdentity {
    /// The VM itself where its name is kept and the host has no VM of its id, else a copy.
    #[default]
    Auto,
    /// The VM itself: its id, serial numbers, hardware addresses and disk ids.
    Original,
    /// A copy: new ids and new hardware addresses, so that it can live beside the original.
    New,
}

/// How a VM is made again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreRoute {
    /// Exact where the restore point has what it takes, else portable.
    #[default]
    Auto,
    /// From the platform's own configuration files: with every setting as it was.
    Exact,
    /// From the portable configuration: also from other platforms and other versions.
    Portable,
}

/// Which network adapters of a restored VM are connected, and to what. By default none: a VM that comes
/// back beside its original must not answer for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkPlan {
    /// Connect adapters to the network of the name they had, where the map does not say otherwise.
    pub connect: bool,
    /// The network an adapter was connected to → the one it is connected to now.
    pub map: BTreeMap<String, String>,
}

impl NetworkPlan {
    /// The network for an adapter that was connected to `network`; none leaves it disconnected.
    pub fn target_of<'a>(&'a self, network: Option<&'a str>) -> Option<&'a str> {
        let old = network?;
        let mapped = self.map.iter().find(|(from, _)| from.to_lowercase() == old.to_lowercase());
        mapped.map(|(_, to)| to.as_str()).or_else(|| self.connect.then_some(old))
    }
}

/// A VM that is being restored: disks to be written until [`finish`](Self::finish) or
/// [`abort`](Self::abort). Dropping it without either aborts as well as can be done silently.
pub trait RestoringVm: Send {
    /// The disks, in the order of the request. Nobody holds a device beyond this VM.
    fn disks(&self) -> &[RestoringDisk];

    /// What the user should know so far; one line each.
    fn warnings(&self) -> &[String];

    /// All disks are written: makes the VM what it should be, gives it its name as the last step, and
    /// starts it if asked.
    ///
    /// # Errors
    /// Of a new VM everything is undone before an error is returned, or left to
    /// [`VmRestorer::reap_restores`] where that cannot be; one that was changed in place stays marked. A
    /// VM that is complete and only would not start is no error but a warning.
    fn finish(self: Box<Self>, power_on: bool) -> Result<RestoredVm>;

    /// The disks were not all written: removes what was made. A VM that was changed in place stays marked.
    ///
    /// # Errors
    /// What could not be removed; it is left to [`VmRestorer::reap_restores`].
    fn abort(self: Box<Self>) -> Result<()>;
}

/// One disk of a [`RestoringVm`].
#[derive(Clone)]
pub struct RestoringDisk {
    /// Which disk.
    pub id: DiskId,
    /// Where it lies, as the host names it.
    pub path: String,
    /// Its image format, e.g. `vhdx`.
    pub format: String,
    /// Where to write; at least as large as the disk of the restore point.
    pub device: Arc<dyn WritableBlockDevice>,
    /// What it holds now.
    pub content: DiskContent,
}

/// What a disk holds before it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskContent {
    /// Zeros: it is new.
    Zeros,
    /// Anything: all of it is compared; the reason says why.
    Unknown(FullReason),
    /// The restore point's bytes, but for these ranges.
    DiffersWithin(RangeSet),
}

/// A VM that was restored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredVm {
    /// Its name.
    pub name: String,
    /// The platform's id of it.
    pub id: String,
    /// Where its files lie, as the host names it.
    pub directory: String,
    /// By which way it was made; none where it was changed in place.
    pub route: Option<RestoreRoute>,
    /// Whether it has the id it had.
    pub same_id: bool,
    /// Whether it was started.
    pub powered_on: bool,
    /// What the user should know, one line each.
    pub warnings: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_connected_only_where_somebody_said_so() {
        let none = NetworkPlan::default();
        assert_eq!(none.target_of(Some("LAN")), None);
        let same = NetworkPlan { connect: true, ..NetworkPlan::default() };
        assert_eq!(same.target_of(Some("LAN")), Some("LAN"));
        assert_eq!(same.target_of(None), None);
        let map = BTreeMap::from([("lan".to_owned(), "Test".to_owned())]);
        let mapped = NetworkPlan { connect: false, map: map.clone() };
        assert_eq!(mapped.target_of(Some("LAN")), Some("Test"));
        assert_eq!(mapped.target_of(Some("DMZ")), None);
        let both = NetworkPlan { connect: true, map };
        assert_eq!(
            (both.target_of(Some("LAN")), both.target_of(Some("DMZ"))),
            (Some("Test"), Some("DMZ"))
        );
    }
}
