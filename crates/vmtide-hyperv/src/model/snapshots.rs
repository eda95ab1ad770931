//! Checkpoints: found, made, named, removed, turned into reference points.

use super::codes;
use super::points::point_path;
use super::read::{self, guid};
use super::types::{
    BackupType, ReferencePointRecord, SnapshotKind, SnapshotRecord, VmRecord, VmSettings,
};
use crate::Host;
use crate::host::from_cim;
use crate::job::{JobEnd, JobOutcome, vanished};
use uuid::Uuid;
use vmtide_block::CancelToken;
use vmtide_cim::{CimError, CimInstance, CimValue, ObjectPath, wql, xml};
use vmtide_hypervisor::{Consistency, HypervisorError, Result};

/// The service of checkpoints.
const SNAPSHOT_SERVICE: &str = "Msvm_VirtualSystemSnapshotService";

/// The class of settings of VMs and checkpoints.
const SETTINGS: &str = "Msvm_VirtualSystemSettingData";

/// `SnapshotType` of a recovery checkpoint. The method's page does not list it among the vendor's numbers;
/// Microsoft's own backup sample passes it.
const RECOVERY: u16 = 32768;

/// What a recovery checkpoint is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// The consistency. Of file systems is the same to Hyper-V as of applications: the guest decides
    /// (VSS on Windows, a freeze of file systems on Linux).
    pub consistency: Consistency,
    /// What VSS tells the applications of a Windows guest.
    pub backup_type: BackupType,
    /// Whether disks that cannot be held (pass-through, shared) are left out, silently: the caller
    /// compares the checkpoint's disks with the VM's. Otherwise such a VM is refused by the host.
    pub ignore_non_snapshottable: bool,
}

/// Why a checkpoint was not made, as far as is known.
#[derive(Debug)]
pub(crate) struct NotMade {
    /// The reason.
    pub error: HypervisorError,
    /// Whether that is the host's last word: what is not there yet will not come of this call. Otherwise the checkpoint
    /// may be there, or come.
    pub refused: bool,
    /// Whether it was refused for what the VM, or something on it, is at: later it may go well.
    pub busy: bool,
}

impl NotMade {
    /// The call was refused, or never made.
    fn refused(error: HypervisorError) -> Self {
        Self { error, refused: true, busy: false }
    }

    /// The call was not answered, or not with a result.
    fn of_call(error: CimError) -> Self {
        let refused = matches!(
            error,
            CimError::Unreachable { before_request: true, .. }
                | CimError::Untrusted { .. }
                | CimError::Login { .. }
                | CimError::Denied { .. }
                | CimError::NotFound { .. }
        );
        Self { error: from_cim(error), refused, busy: false }
    }
}

impl From<HypervisorError> for NotMade {
    fn from(error: HypervisorError) -> Self {
        Self { error, refused: false, busy: false }
    }
}

impl Host {
    /// The checkpoints of a VM, of every kind, in the order the host tells them.
    ///
    /// # Errors
    /// As [`from_cim`] says.
    pub fn snapshots(&self, vm: Uuid) -> Result<Vec<SnapshotRecord>> {
        let found = self.query(&format!(
            "SELECT * FROM {SETTINGS} WHERE VirtualSystemIdentifier={}",
            wql::quote(&guid(vm))
        ))?;
        let mut snapshots = Vec::new();
        for instance in found {
            if let Some(snapshot) = read::snapshot(read::settings(instance)?) {
                snapshots.push(snapshot);
            }
        }
        Ok(snapshots)
    }

    /// Makes a recovery checkpoint of a VM: all its disks at one moment.
    ///
    /// After an error the checkpoint may exist nevertheless (the answer was lost, the limit passed, it was
    /// cancelled): whoever journals this looks for what was not there before.
    ///
    /// # Errors
    /// [`HypervisorError::ConsistencyNotReached`] where more than crash consistency was asked for and the
    /// host failed for a reason that may be the guest's; [`HypervisorError::Failed`] with the host's words;
    /// or as [`wait`](Self::wait) and [`from_cim`] say.
    pub fn create_recovery_snapshot(
        &self,
        vm: &VmRecord,
        request: &SnapshotRequest,
        cancel: &CancelToken,
    ) -> Result<SnapshotRecord> {
        let made = self.make_recovery_snapshot(vm, request, cancel, &mut |_| Ok(()));
        made.map_err(|not_made| not_made.error)
    }

    /// As [`create_recovery_snapshot`](Self::create_recovery_snapshot); tells the job to `started` as soon as the host
    /// names it: its results are the proof of what it made, when its end is not heard of.
    ///
    /// # Errors
    /// [`NotMade`], which also tells whether that is the host's last word.
    pub(crate) fn make_recovery_snapshot(
        &self,
        vm: &VmRecord,
        request: &SnapshotRequest,
        cancel: &CancelToken,
        started: &mut dyn FnMut(&ObjectPath) -> Result<()>,
    ) -> Result<SnapshotRecord, NotMade> {
        let what = format!("making a recovery checkpoint of {}", vm.name);
        let before = self.snapshots(vm.id).map_err(NotMade::refused)?;
        let service = self.service(SNAPSHOT_SERVICE).map_err(NotMade::refused)?;
        let parameters = [
            ("AffectedSystem", CimValue::from(&vm.path)),
            ("SnapshotSettings", settings_of(request).map_err(NotMade::refused)?.into()),
            ("SnapshotType", CimValue::Uint16(RECOVERY)),
        ];
        let output = self.cim().invoke(&service, "CreateSnapshot", &parameters);
        let output = output.map_err(NotMade::of_call)?;
        let end = match output.return_value {
            codes::DONE => JobEnd::Done(JobOutcome::default()),
            codes::JOB_STARTED => {
                let job = output.parameters.optional_reference("Job").map_err(from_cim)?;
                let job = job.ok_or_else(|| {
                    HypervisorError::protocol(self.peer(), "a job was started and not named")
                })?;
                started(&job)?;
                self.follow(&job, &what, cancel)?
            }
            code => JobEnd::Failed { code, detail: String::new() },
        };
        let outcome = match end {
            JobEnd::Done(outcome) => outcome,
            JobEnd::Failed { code, detail } => {
                let error = codes::error(&what, code, &detail);
                let error = match request.consistency {
                    Consistency::Crash => error,
                    wanted if codes::may_be_consistency(code) => {
                        HypervisorError::ConsistencyNotReached { wanted, detail: error.to_string() }
                    }
                    _ => error,
                };
                let refused = codes::is_last_word(code);
                return Err(NotMade { error, refused, busy: codes::is_busy(code) });
            }
            // It may have made one.
            JobEnd::Vanished => return Err(vanished(&what).into()),
        };
        for warning in &outcome.warnings {
            tracing::warn!(%warning, "{what}");
        }
        Ok(self.new_snapshot(vm, &output.parameters, &outcome, &before)?)
    }

    /// The recovery checkpoints that a job names as its results, of a VM and without those in `before`. None where the
    /// host has forgotten the job, which it does some five minutes after its end.
    pub(crate) fn snapshots_of_job(
        &self,
        job: &ObjectPath,
        snapshots: &[SnapshotRecord],
        before: &[String],
    ) -> Vec<String> {
        let results = self.affected(job);
        let is_result = |id: &str| {
            results.iter().any(|path| {
                path.class.eq_ignore_ascii_case(SETTINGS)
                    && path.key("InstanceID").is_some_and(|key| key.eq_ignore_ascii_case(id))
            })
        };
        let new = snapshots.iter().filter(|snapshot| {
            let id = &snapshot.settings.instance_id;
            snapshot.kind == SnapshotKind::Recovery && !before.contains(id) && is_result(id)
        });
        new.map(|snapshot| snapshot.settings.instance_id.clone()).collect()
    }

    /// The checkpoint that a call has made: the one it named, or the one that was not there before.
    fn new_snapshot(
        &self,
        vm: &VmRecord,
        answer: &CimInstance,
        outcome: &JobOutcome,
        before: &[SnapshotRecord],
    ) -> Result<SnapshotRecord> {
        let named = answer.optional_reference("ResultingSnapshot").ok().flatten();
        let is_settings = |path: &ObjectPath| path.class.eq_ignore_ascii_case(SETTINGS);
        let candidates: Vec<_> = named
            .into_iter()
            .chain(outcome.affected.iter().filter(|path| is_settings(path)).cloned())
            .collect();
        let is_new = |snapshot: &SnapshotRecord| {
            snapshot.kind == SnapshotKind::Recovery
                && !before
                    .iter()
                    .any(|old| old.settings.instance_id == snapshot.settings.instance_id)
        };
        let mut new: Vec<_> = self.snapshots(vm.id)?.into_iter().filter(is_new).collect();
        let is_named = |snapshot: &SnapshotRecord| {
            let id = snapshot.settings.instance_id.as_str();
            candidates
                .iter()
                .any(|path| path.key("InstanceID").is_some_and(|key| key.eq_ignore_ascii_case(id)))
        };
        if let Some(index) = new.iter().position(is_named) {
            return Ok(new.swap_remove(index));
        }
        // Another product may make one at the same time; which one is ours is then not known.
        match (new.pop(), new.is_empty()) {
            (Some(only), true) => Ok(only),
            (None, _) => Err(HypervisorError::protocol(
                self.peer(),
                format!("it reports a recovery checkpoint of {} and shows none", vm.name),
            )),
            (Some(_), false) => Err(HypervisorError::protocol(
                self.peer(),
                format!(
                    "{} has several new recovery checkpoints, and which is ours it did not say",
                    vm.name
                ),
            )),
        }
    }

    /// Names a VM or a checkpoint.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn rename(&self, settings: &VmSettings, name: &str) -> Result<()> {
        let service = self.service("Msvm_VirtualSystemManagementService")?;
        // Properties that are not sent stay as they are.
        let change = CimInstance::new(SETTINGS)
            .with("InstanceID", settings.instance_id.as_str())
            .with("ElementName", name);
        let text = xml::to_xml(&change).map_err(from_cim)?;
        let what = format!("naming {} {name}", settings.name);
        let parameters = [("SystemSettings", CimValue::String(text))];
        self.call(&service, "ModifySystemSettings", &parameters, &what, &CancelToken::new())?;
        Ok(())
    }

    /// Removes a checkpoint; what it held is merged back, which takes longer than this call. One that is
    /// gone is no error.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn destroy_snapshot(&self, snapshot: &SnapshotRecord, cancel: &CancelToken) -> Result<()> {
        let what = format!("removing the checkpoint {}", snapshot.settings.name);
        let service = self.service(SNAPSHOT_SERVICE)?;
        let parameters = [("AffectedSnapshot", CimValue::from(&snapshot.settings.path))];
        let result = self.destroy(&service, "DestroySnapshot", &parameters, &what, cancel);
        match result {
            Ok(()) => Ok(()),
            // Somebody else was faster, or an earlier call of ours whose answer was lost.
            Err(error) => match self.exists(&snapshot.settings.path) {
                Ok(false) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Calls a method that removes something. A job that is gone is an error here; the caller looks
    /// whether the thing is.
    pub(crate) fn destroy(
        &self,
        service: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
        what: &str,
        cancel: &CancelToken,
    ) -> Result<()> {
        let (_, outcome) = self.call(service, method, parameters, what, cancel)?;
        for warning in outcome.warnings {
            tracing::warn!(%warning, "{what}");
        }
        Ok(())
    }

    /// Whether an object is there.
    pub(crate) fn exists(&self, path: &ObjectPath) -> Result<bool> {
        match self.cim().get(path) {
            Ok(_) => Ok(true),
            Err(CimError::NotFound { .. }) => Ok(false),
            Err(error) => Err(from_cim(error)),
        }
    }

    /// Turns a recovery checkpoint into a reference point: from now on the host tracks changes since it,
    /// and merges what the checkpoint held. None where the host does not say which point it made (it
    /// often does not, Windows Server 2025 above all): the caller finds it by what was not there before.
    ///
    /// # Errors
    /// As [`call`](Self::call). The point may exist nevertheless.
    pub fn convert_to_reference_point(
        &self,
        snapshot: &SnapshotRecord,
        cancel: &CancelToken,
    ) -> Result<Option<ReferencePointRecord>> {
        self.make_reference_point(snapshot, cancel, &mut |_| Ok(()))
    }

    /// As [`convert_to_reference_point`](Self::convert_to_reference_point); tells the job to `started` as soon as the host
    /// names it: its results are the proof of what it made, when its end is not heard of.
    ///
    /// # Errors
    /// As [`convert_to_reference_point`](Self::convert_to_reference_point), and those of `started`.
    pub(crate) fn make_reference_point(
        &self,
        snapshot: &SnapshotRecord,
        cancel: &CancelToken,
        started: &mut dyn FnMut(&ObjectPath) -> Result<()>,
    ) -> Result<Option<ReferencePointRecord>> {
        let what =
            format!("turning the checkpoint {} into a reference point", snapshot.settings.name);
        let service = self.service(SNAPSHOT_SERVICE)?;
        let parameters = [("AffectedSnapshot", CimValue::from(&snapshot.settings.path))];
        let (output, job) = self.begin(&service, "ConvertToReferencePoint", &parameters, &what)?;
        let outcome = match job {
            None => JobOutcome::default(),
            Some(job) => {
                started(&job)?;
                match self.follow(&job, &what, cancel)? {
                    JobEnd::Done(outcome) => outcome,
                    JobEnd::Failed { code, detail } => {
                        return Err(codes::error(&what, code, &detail));
                    }
                    // A checkpoint that is gone was converted, or removed by somebody else.
                    JobEnd::Vanished => return Err(vanished(&what)),
                }
            }
        };
        for warning in &outcome.warnings {
            tracing::warn!(%warning, "{what}");
        }
        let named = output.parameters.optional_reference("ResultingReferencePoint").ok().flatten();
        let mut candidates = named.into_iter().chain(outcome.affected);
        let Some(path) = candidates.find(point_path) else {
            return Ok(None);
        };
        match self.cim().get(&path) {
            Ok(instance) => {
                let point = read::reference_point(&instance)?;
                Ok(Some(point).filter(|point| point.vm == snapshot.settings.vm))
            }
            Err(CimError::NotFound { .. }) => Ok(None),
            Err(error) => Err(from_cim(error)),
        }
    }
}

/// The embedded settings of a recovery checkpoint.
fn settings_of(request: &SnapshotRequest) -> Result<String> {
    let consistency = match request.consistency {
        Consistency::Application | Consistency::FileSystem => 1,
        Consistency::Crash => 2,
    };
    let backup_type = match request.backup_type {
        BackupType::Full => 1,
        BackupType::Copy => 2,
    };
    let settings = CimInstance::new("Msvm_VirtualSystemSnapshotSettingData")
        .with("ConsistencyLevel", CimValue::Uint8(consistency))
        .with("GuestBackupType", CimValue::Uint8(backup_type))
        .with("IgnoreNonSnapshottableDisks", request.ignore_non_snapshottable);
    xml::to_xml(&settings).map_err(from_cim)
}
