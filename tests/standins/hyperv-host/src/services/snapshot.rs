//! `Msvm_VirtualSystemSnapshotService`: checkpoints.

use super::arguments::Arguments;
use super::{INVALID_PARAMETER, INVALID_STATE};
use crate::jobs::{Answer, EFFECT_CREATE, Effect, JobError};
use crate::services::reference::ConvertPoint;
use crate::state::{FrozenDisk, Snapshot, State, Vss, guid};
use std::collections::BTreeMap;
use uuid::Uuid;
use vmtide_cim::{CimValue, ObjectPath};
use vmtide_image::Format;

/// `SnapshotType` of a checkpoint for a backup.
const RECOVERY: u64 = 32768;

/// A checkpoint to be made.
pub(crate) struct NewSnapshot {
    pub(crate) vm: Uuid,
    pub(crate) recovery: bool,
    /// 1 application, 2 crash.
    pub(crate) consistency: u8,
    pub(crate) skip_others: bool,
    /// Whether it is another product that asks.
    pub(crate) by_other: bool,
}

impl State {
    pub(crate) fn snapshot_service(
        &mut self,
        method: &str,
        arguments: &Arguments,
    ) -> Option<Answer> {
        Some(match method {
            "CreateSnapshot" => self.begin_snapshot(arguments),
            "DestroySnapshot" => {
                self.begin_destruction(arguments.settings("AffectedSnapshot"), false)
            }
            "DestroySnapshotTree" => {
                self.begin_destruction(arguments.settings("SnapshotSettingData"), true)
            }
            "ConvertToReferencePoint" => self.begin_conversion(arguments),
            "ApplySnapshot" => self.begin_apply(arguments),
            _ => return None,
        })
    }

    fn begin_snapshot(&mut self, arguments: &Arguments) -> Answer {
        let Some(vm) = arguments.vm("AffectedSystem").and_then(|id| self.vms.get(&id)) else {
            return Answer::code(INVALID_PARAMETER);
        };
        if vm.planned {
            return Answer::code(INVALID_STATE);
        }
        let (vm, name) = (vm.id, vm.configuration.text("ElementName").to_owned());
        let recovery = match arguments.number("SnapshotType") {
            2 | 3 => false,
            RECOVERY => true,
            _ => return Answer::code(INVALID_PARAMETER),
        };
        let class =
            if recovery { "Msvm_VirtualSystemSnapshotSettingData" } else { "CIM_SettingData" };
        let Ok(settings) = arguments.embedded("SnapshotSettings", class) else {
            return Answer::code(INVALID_PARAMETER);
        };
        let number = |name: &str| {
            let value = settings.as_ref().and_then(|settings| settings.value(name));
            value.and_then(CimValue::as_u64).unwrap_or(0)
        };
        if number("ConsistencyLevel") > 2 || number("GuestBackupType") > 2 {
            return Answer::code(INVALID_PARAMETER);
        }
        let skip_others = settings
            .as_ref()
            .and_then(|settings| settings.value("IgnoreNonSnapshottableDisks"))
            .and_then(CimValue::as_bool)
            .unwrap_or(false);
        let is_refused = self.faults.creation_code.is_some()
            || self.faults.vss_fails && number("ConsistencyLevel") == 1;
        if self.faults.foreign_at_refusal && is_refused {
            self.foreign_checkpoint(vm, &format!("{name} - Other"));
        }
        if let Some(code) = self.faults.creation_code {
            return Answer::code(code);
        }
        let busy = self.snapshots.values().any(|other| other.vm == vm && other.recovery);
        let merging = self.faults.refuse_while_merging && self.is_merging(vm);
        if recovery && busy && !self.options.many_recovery_snapshots || merging {
            return Answer::code(INVALID_STATE);
        }
        let consistency = if number("ConsistencyLevel") == 1 { 1 } else { 2 };
        let caption = format!("Taking checkpoint of {name}");
        if std::mem::take(&mut self.faults.foreign_beside) {
            let other = NewSnapshot {
                vm,
                recovery: true,
                consistency: 2,
                skip_others: true,
                by_other: true,
            };
            let effect = Effect::CreateSnapshot(other);
            self.begin("CreateSnapshot", caption.clone(), effect, Some("ResultingSnapshot"));
        }
        let new = NewSnapshot { vm, recovery, consistency, skip_others, by_other: false };
        let effect = Effect::CreateSnapshot(new);
        self.begin("CreateSnapshot", caption, effect, Some("ResultingSnapshot"))
    }

    fn begin_destruction(&mut self, id: Option<Uuid>, tree: bool) -> Answer {
        let Some(id) = id.filter(|id| self.snapshots.contains_key(id)) else {
            return Answer::code(INVALID_PARAMETER);
        };
        self.harm += u64::from(self.snapshots[&id].by_other);
        if let Some(code) = self.faults.destruction_code {
            return Answer::code(code);
        }
        let mut ids = vec![id];
        let mut at = 0;
        while tree && at < ids.len() {
            let children = self.snapshots.values().filter(|s| s.parent == Some(ids[at]));
            ids.extend(children.map(|snapshot| snapshot.id).collect::<Vec<_>>());
            at += 1;
        }
        let method = if tree { "DestroySnapshotTree" } else { "DestroySnapshot" };
        self.begin(method, "Deleting checkpoint".into(), Effect::DestroySnapshots(ids), None)
    }

    fn begin_conversion(&mut self, arguments: &Arguments) -> Answer {
        let settings = arguments
            .embedded("ReferencePointSettings", "Msvm_VirtualSystemReferencePointSettingData");
        let snapshot = arguments.settings("AffectedSnapshot");
        let snapshot = snapshot.and_then(|id| self.snapshots.get(&id));
        let (Some(snapshot), Ok(_)) = (snapshot, settings) else {
            return Answer::code(INVALID_PARAMETER);
        };
        if !snapshot.recovery {
            return Answer::code(INVALID_STATE);
        }
        let (id, vm) = (snapshot.id, snapshot.vm);
        self.harm += u64::from(snapshot.by_other);
        let convert = ConvertPoint { snapshot: id };
        if std::mem::take(&mut self.faults.foreign_at_conversion) {
            drop(self.destroy_snapshots(&[id]));
            if let Some(other) = self.foreign_checkpoint(vm, "other") {
                drop(self.convert_snapshot(&ConvertPoint { snapshot: other }));
            }
            return Answer::code(INVALID_PARAMETER);
        }
        if let Some(code) = self.faults.conversion_code {
            return Answer::code(code);
        }
        let caption = "Converting checkpoint to reference point".into();
        let effect = Effect::Convert(convert);
        self.begin("ConvertToReferencePoint", caption, effect, Some("ResultingReferencePoint"))
    }

    fn begin_apply(&mut self, arguments: &Arguments) -> Answer {
        let snapshot = arguments.settings("Snapshot").and_then(|id| self.snapshots.get(&id));
        let Some(snapshot) = snapshot else { return Answer::code(INVALID_PARAMETER) };
        if snapshot.recovery || self.vms.get(&snapshot.vm).is_none_or(|vm| vm.state == 2) {
            return Answer::code(INVALID_STATE);
        }
        let effect = Effect::Apply(snapshot.id);
        self.begin("ApplySnapshot", "Applying checkpoint".into(), effect, None)
    }

    /// Another product's checkpoint for its own backup.
    fn foreign_checkpoint(&mut self, vm: Uuid, name: &str) -> Option<Uuid> {
        let new =
            NewSnapshot { vm, recovery: true, consistency: 2, skip_others: true, by_other: true };
        let made = self.create_snapshot(new).ok()?;
        let (path, _) = made.last()?;
        let id = super::arguments::id_of(path.key("InstanceID")?)?;
        self.snapshots.get_mut(&id)?.configuration.settings.set("ElementName", name);
        Some(id)
    }

    /// Makes a checkpoint: all disks that can be frozen are, at one moment.
    pub(crate) fn create_snapshot(
        &mut self,
        new: NewSnapshot,
    ) -> Result<Vec<(ObjectPath, u16)>, JobError> {
        if let Some(code) = self.faults.creation_job {
            return Err(JobError::new(code, "Checkpoint operation failed (standin)."));
        }
        let vm = self.vms.get(&new.vm).ok_or_else(|| gone("the virtual machine"))?;
        let asks_guest = new.recovery && new.consistency == 1;
        let works = vm.vss == Vss::Works && !self.faults.vss_fails;
        if asks_guest && vm.state != 3 && !(vm.state == 2 && works) {
            return Err(JobError::new(
                32768,
                "Production checkpoints cannot be created: the guest's VSS did not answer (0x80042306).",
            ));
        }
        let mut configuration = vm.configuration.clone();
        let parent = vm.current_parent;
        let mut keys = Vec::new();
        let (mut others, paths): (usize, Vec<(String, String)>) = (
            pass_through(&configuration),
            configuration.disk_paths().map(|(a, b)| (a.to_owned(), b.to_owned())).collect(),
        );
        for (number, (suffix, path)) in paths.into_iter().enumerate() {
            if new.recovery && self.faults.skipped_disk == Some(number) {
                configuration.resources.retain(|resource| resource.suffix != suffix);
                continue;
            }
            match self.disk_of(&path) {
                Some(key) if matches!(self.disks[&key].format, Format::Vhdx | Format::Vhd) => {
                    keys.push((suffix, key));
                }
                _ => {
                    others += 1;
                    configuration.resources.retain(|resource| resource.suffix != suffix);
                }
            }
        }
        if others > 0 && !new.skip_others {
            return Err(JobError::new(
                32775,
                "The virtual machine has disks that checkpoints do not support.",
            ));
        }
        let mut disks: BTreeMap<String, FrozenDisk> = BTreeMap::new();
        for (suffix, key) in keys {
            let frozen = self.freeze_disk(key, new.recovery).map_err(internal)?;
            let live = self.disks[&key].live.clone();
            self.rename_file(Some(new.vm), &frozen.path, &live);
            disks.insert(suffix, frozen);
        }
        let id = self.random.guid();
        self.describe_snapshot(&mut configuration, id, new.recovery);
        let consistency = new.consistency;
        let snapshot = Snapshot {
            id,
            vm: new.vm,
            recovery: new.recovery,
            by_other: new.by_other,
            consistency,
            configuration,
            disks,
            parent,
            made: self.number(),
        };
        self.write_snapshot_files(&snapshot).map_err(internal)?;
        self.snapshots.insert(id, snapshot);
        if let Some(vm) = self.vms.get_mut(&new.vm).filter(|_| !new.recovery) {
            vm.current_parent = Some(id);
        }
        self.attach_meanwhile(new.vm);
        let vm = self.vms.get(&new.vm).map(|vm| (self.path_of_vm(vm), 0));
        Ok(vm.into_iter().chain([(self.path_of_settings(id), EFFECT_CREATE)]).collect())
    }

    /// Somebody attaches a disk while the checkpoint is made, where that is switched on.
    fn attach_meanwhile(&mut self, vm: Uuid) {
        if !std::mem::take(&mut self.faults.disk_at_checkpoint) {
            return;
        }
        let taken =
            self.vms[&vm].configuration.disk_paths().any(|(suffix, _)| suffix.ends_with(r"\40\L"));
        if !taken {
            self.attach_disk(vm, &crate::DiskSpec::scsi(40, 1 << 20));
        }
    }

    fn describe_snapshot(
        &self,
        configuration: &mut crate::state::Configuration,
        id: Uuid,
        recovery: bool,
    ) {
        let name = configuration.text("ElementName").to_owned();
        let settings = &mut configuration.settings;
        let kind = if recovery { "Recovery" } else { "Realized" };
        settings.set("VirtualSystemType", format!("Microsoft:Hyper-V:Snapshot:{kind}"));
        settings.set("ElementName", format!("{name} - ({} ms)", self.now_ms));
        settings.set("CreationTime", crate::instances::timestamp(self.unix_s()));
        settings.set("ConfigurationID", guid(id));
        settings.set("ConfigurationFile", format!(r"Snapshots\{}.vmcx", guid(id)));
        if settings.value("GuestStateFile").is_some() {
            settings.set("GuestStateFile", format!(r"Snapshots\{}.vmgs", guid(id)));
        }
    }

    /// Removes checkpoints; their disks merge afterwards.
    pub(crate) fn destroy_snapshots(
        &mut self,
        ids: &[Uuid],
    ) -> Result<Vec<(ObjectPath, u16)>, JobError> {
        for id in ids {
            if let Some(snapshot) = self.snapshots.remove(id) {
                self.forget_snapshot(&snapshot);
            }
        }
        self.forget_ids();
        Ok(ids.iter().map(|id| (self.path_of_settings(*id), 0)).collect())
    }

    /// Puts what followed a checkpoint behind the one before it, and removes its files.
    pub(crate) fn forget_snapshot(&mut self, snapshot: &Snapshot) {
        for other in self.snapshots.values_mut().filter(|s| s.parent == Some(snapshot.id)) {
            other.parent = snapshot.parent;
        }
        if let Some(vm) = self.vms.get_mut(&snapshot.vm) {
            if vm.current_parent == Some(snapshot.id) {
                vm.current_parent = snapshot.parent;
            }
            if vm.last_applied == Some(snapshot.id) {
                vm.last_applied = None;
            }
        }
        self.remove_configuration_files(&snapshot.configuration);
        self.note(format!("checkpoint {} removed", guid(snapshot.id)));
    }

    /// Goes back to a checkpoint.
    pub(crate) fn apply_snapshot(&mut self, id: Uuid) -> Result<Vec<(ObjectPath, u16)>, JobError> {
        let snapshot = self.snapshots.get(&id).ok_or_else(|| gone("the checkpoint"))?;
        let (vm, mut configuration) = (snapshot.vm, snapshot.configuration.clone());
        let frozen: Vec<FrozenDisk> = snapshot.disks.values().cloned().collect();
        let live = self.vms.get(&vm).ok_or_else(|| gone("the virtual machine"))?;
        // What names the VM itself stays.
        let own = [
            "VirtualSystemType",
            "ElementName",
            "ConfigurationID",
            "ConfigurationFile",
            "CreationTime",
        ];
        for name in own {
            let value = live.configuration.settings.value(name).cloned();
            configuration.settings.set(name, value.unwrap_or(CimValue::Null));
        }
        if let Some(value) = live.configuration.settings.value("GuestStateFile").cloned() {
            configuration.settings.set("GuestStateFile", value);
        }
        for disk in &frozen {
            let new = self.revert_disk(disk).map_err(internal)?;
            for resource in &mut configuration.resources {
                if resource.host_resource() == Some(disk.path.as_str()) {
                    resource.values.set("HostResource", CimValue::strings([new.as_str()]));
                }
            }
        }
        if let Some(vm) = self.vms.get_mut(&vm) {
            vm.configuration = configuration;
            vm.last_applied = Some(id);
            vm.current_parent = Some(id);
        }
        Ok(vec![(self.path_of_settings(id), 0)])
    }
}

/// How many physical disks of the host a VM has.
fn pass_through(configuration: &crate::state::Configuration) -> usize {
    let physical = |subtype: &CimValue| subtype.as_str() == Some(PHYSICAL_DRIVE);
    let resources = configuration.resources.iter();
    resources.filter(|r| r.values.value("ResourceSubType").is_some_and(physical)).count()
}

/// `ResourceSubType` of a drive that is a physical disk of the host.
pub(crate) const PHYSICAL_DRIVE: &str = "Microsoft:Hyper-V:Physical Disk Drive";

pub(crate) fn gone(what: &str) -> JobError {
    JobError::new(32773, format!("{what} is gone"))
}

/// The stand-in itself failed.
pub(crate) fn internal(error: impl std::fmt::Display) -> JobError {
    JobError::new(32768, format!("the stand-in failed: {error}"))
}
