//! The traits a platform implements.

use crate::{
    Changes, Consistency, DiskId, HealthCheck, JobId, Result, TrackingId, VmConfig, VmSelector,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use vmtide_block::{BlockDevice, CancelToken};

/// A virtualisation platform, or a part of one, as a source of backups.
pub trait Hypervisor: Send + Sync {
    /// The VMs it knows.
    ///
    /// # Errors
    /// Where the platform cannot be reached or denies it.
    fn list(&self) -> Result<Vec<VmSummary>>;

    /// The configuration of one VM, by name or by the platform's own id.
    ///
    /// # Errors
    /// [`NotFound`](crate::HypervisorError::NotFound), or as [`list`](Self::list).
    fn describe(&self, vm: &str) -> Result<VmConfig>;

    /// Brings the VM to the consistency asked for, fixes the moment on all disks at once, starts
    /// tracking from it, and lets the VM run on. Removes first what an earlier job of ours left.
    ///
    /// # Errors
    /// Everything made so far is undone before an error is returned.
    /// [`Busy`](crate::HypervisorError::Busy) while another job of ours works on the VM;
    /// [`ConsistencyNotReached`](crate::HypervisorError::ConsistencyNotReached) where a downgrade
    /// would be needed and is not allowed.
    fn freeze(&self, request: &FreezeRequest) -> Result<Box<dyn FrozenVm>>;

    /// Whether [`VmConfig::id`] names a VM for its whole life, across renaming and moves between hosts. The
    /// line of restore points then goes by it, and names are for people only.
    fn has_lasting_ids(&self) -> bool {
        false
    }

    /// The VMs that `selector` means, in the order of [`list`](Self::list). Tags mean none where the platform has
    /// no place for them.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    fn select(&self, selector: &VmSelector) -> Result<Vec<VmSummary>> {
        let mut chosen = self.list()?;
        chosen.retain(|vm| selector.matches(&vm.name, vm.id.as_deref(), &[]));
        Ok(chosen)
    }

    /// Removes what killed jobs of ours left on the platform, by our journal and by our names.
    /// What is not ours is never touched, nor what a living job uses.
    ///
    /// # Errors
    /// Where something of ours is there but could not be removed.
    fn reap(&self) -> Result<ReapReport>;

    /// As [`reap`](Self::reap), and removes as well what carries our name but belongs to no job that is known here: of
    /// another installation, or of one whose state was lost. Only somebody who knows that no such job runs can ask
    /// for it. The default removes no more than [`reap`](Self::reap).
    ///
    /// # Errors
    /// As [`reap`](Self::reap).
    fn reap_orphans(&self) -> Result<ReapReport> {
        self.reap()
    }

    /// Looks the platform over, and one VM of it or all of them: rights, versions, what backups need and
    /// what stands in their way. Changes nothing. What cannot be looked at is among the answers.
    fn examine(&self, _vm: Option<&str>) -> Vec<HealthCheck> {
        Vec::new()
    }
}

/// One line of a list of VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSummary {
    /// The name people use.
    pub name: String,
    /// The platform's own id, where it has one.
    pub id: Option<String>,
    /// Running, paused, shut off, … in the platform's word; of a VM that cannot be read, why, as
    /// [`unreadable`](Self::unreadable) writes it.
    pub state: String,
    /// The number of disks a backup would hold; 0 where it cannot be told.
    pub disks: usize,
}

/// What the state of a VM begins with that cannot be read; the reason follows.
const UNREADABLE: &str = "unreadable: ";

impl VmSummary {
    /// A VM that is there and of which no more than its name can be told. It is listed all the same: one that is left
    /// out of a list is left out of backups without a word.
    pub fn unreadable(name: impl Into<String>, id: Option<String>, reason: &str) -> Self {
        Self { name: name.into(), id, state: format!("{UNREADABLE}{reason}"), disks: 0 }
    }

    /// Why the VM cannot be read; none where it can.
    pub fn problem(&self) -> Option<&str> {
        self.state.strip_prefix(UNREADABLE)
    }
}

/// What a backup wants of a frozen VM.
#[derive(Clone, Debug)]
pub struct FreezeRequest {
    /// The VM, by name or the platform's id; platforms with one VM per connection take any.
    pub vm: String,
    /// The job; everything made on the platform carries it.
    pub job: JobId,
    /// Names the lineage (one repository, one VM) that tracking belongs to, so that two
    /// repositories never use each other's tracking. Lower-case hexadecimal, 16 digits.
    pub lineage: String,
    /// The consistency wanted.
    pub consistency: Consistency,
    /// Whether less is acceptable when it cannot be reached.
    pub allow_downgrade: bool,
    /// Per disk, the tracking id and size of the restore point to compare with. A disk that is not
    /// here is read in full.
    pub bases: BTreeMap<DiskId, Base>,
    /// Disks to leave out.
    pub exclude: Vec<DiskId>,
    /// Stops waiting for the platform.
    pub cancel: CancelToken,
}

/// The earlier moment of one disk that changes are asked since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// The tracking id, where the earlier restore point has one.
    pub tracking: Option<TrackingId>,
    /// The size of the disk then, in bytes.
    pub size_bytes: u64,
}

/// All disks of a VM at one moment, readable until [`commit`](Self::commit) or
/// [`abort`](Self::abort). Dropping it without either aborts as well as can be done silently.
pub trait FrozenVm: Send {
    /// The configuration at that moment.
    fn config(&self) -> &VmConfig;

    /// The consistency reached.
    fn consistency(&self) -> Consistency;

    /// Why [`consistency`](Self::consistency) is less than was asked for; none where it is not.
    fn downgrade_reason(&self) -> Option<&str> {
        None
    }

    /// What else the user should know, e.g. a disk that was left out; one line each.
    fn warnings(&self) -> &[String];

    /// The disks, in the order of the configuration.
    fn disks(&self) -> &[FrozenDisk];

    /// Whether the disks have shown the one moment up to now. To be asked after the last read and
    /// right before the restore point is committed: where somebody else interfered on the platform
    /// the views may have changed while they were read, without any read failing.
    ///
    /// # Errors
    /// Where a view was lost, or the platform cannot be asked: the restore point must not be
    /// committed.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// The earlier disk that `disk` was, where it stood in another place of the VM at the base: its changes are
    /// those since that disk's tracking id, and it is stored on top of that disk.
    fn moved_from(&self, disk: &DiskId) -> Option<&DiskId> {
        let _ = disk;
        None
    }

    /// Everything is read and nothing will be read again: where a platform names the moment for good only then
    /// (Hyper-V's reference point), it does so now, before the restore point that records the names is committed.
    /// To be asked after [`check`](Self::check), asked again it answers the same; [`disks`](Self::disks) cannot be read any more. The base's
    /// tracking stays as it was until [`commit`](Self::commit).
    ///
    /// # Errors
    /// Where the restore point must not be committed. A moment that only could not be named is none: the disk is
    /// then without tracking, with a warning.
    fn seal(&mut self) -> Result<Seal> {
        let tracked = |disk: &FrozenDisk| Some((disk.id.clone(), disk.tracking.clone()?));
        Ok(Seal { tracking: self.disks().iter().filter_map(tracked).collect(), ..Seal::default() })
    }

    /// The restore point is committed: keep the new tracking, release the old, remove the rest.
    /// Answers with what could not be removed now and is left to [`Hypervisor::reap`].
    ///
    /// # Errors
    /// Where the new tracking could not be kept: the next backup will read in full. The restore
    /// point stands in any case.
    fn commit(self: Box<Self>) -> Result<Vec<String>>;

    /// No restore point came of it: go back to the old tracking with nothing lost, remove all
    /// else.
    ///
    /// # Errors
    /// What could not be undone; the journal keeps it for [`Hypervisor::reap`].
    fn abort(self: Box<Self>) -> Result<()>;
}

/// What [`FrozenVm::seal`] answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// The tracking id of each disk for the next backup. A disk that is not here has none: it will be read in full.
    pub tracking: BTreeMap<DiskId, TrackingId>,
    /// What the user should know, one line each.
    pub warnings: Vec<String>,
    /// The consistency, where the platform tells only now that it is less than it said; [`FrozenVm::consistency`] is
    /// the same from then on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Consistency>,
    /// Why, as [`FrozenVm::downgrade_reason`] says from then on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downgrade_reason: Option<String>,
}

/// One disk of a frozen VM.
#[derive(Clone)]
pub struct FrozenDisk {
    /// Which disk.
    pub id: DiskId,
    /// Its content at the moment, unchanging.
    pub device: Arc<dyn BlockDevice>,
    /// What may differ from the base.
    pub changes: Changes,
    /// The tracking id of this moment, for the next backup; none where the source has no tracking, or tells it
    /// only by [`FrozenVm::seal`].
    pub tracking: Option<TrackingId>,
}

/// What [`Hypervisor::reap`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReapReport {
    /// What was removed, one line each.
    pub removed: Vec<String>,
    /// What belongs to a job that is still alive and was left alone.
    pub in_use: Vec<String>,
    /// What else is left, or could not be looked at, and what a person can do about it; one line each.
    #[serde(default)]
    pub notes: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_cannot_be_read_says_why_also_to_another_process() {
        let vm = VmSummary::unreadable("web", None, "its storage is offline");
        let read: VmSummary = serde_json::from_value(serde_json::to_value(&vm).unwrap()).unwrap();
        assert_eq!(read.problem(), Some("its storage is offline"));
        let running = VmSummary { state: "running".into(), ..vm };
        assert_eq!(running.problem(), None);
        let old: ReapReport = serde_json::from_str(r#"{"removed":["a"],"in_use":[]}"#).unwrap();
        assert_eq!((old.removed.len(), old.notes.len()), (1, 0));
    }
}
