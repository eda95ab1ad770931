//! `Msvm_VirtualSystemManagementService`, as far as it changes what is there; and the methods of VMs and jobs.

use super::arguments::Arguments;
use super::{INVALID_PARAMETER, INVALID_STATE};
use crate::jobs::{Answer, Effect, JobError};
use crate::state::State;
use uuid::Uuid;
use vmtide_cim::{CimInstance, CimType, CimValue, ObjectPath};

/// What of the settings of a VM or checkpoint can be changed.
const WRITABLE: [&str; 34] = [
    "ElementName",
    "Notes",
    "AutomaticStartupAction",
    "AutomaticStartupActionDelay",
    "AutomaticStartupActionSequenceNumber",
    "AutomaticShutdownAction",
    "AutomaticRecoveryAction",
    "AutomaticCriticalErrorAction",
    "AutomaticCriticalErrorActionTimeout",
    "AutomaticSnapshotsEnabled",
    "BIOSGUID",
    "BIOSNumLock",
    "BIOSSerialNumber",
    "BaseBoardSerialNumber",
    "ChassisSerialNumber",
    "ChassisAssetTag",
    "BootOrder",
    "BootSourceOrder",
    "ConsoleMode",
    "EnhancedSessionTransportType",
    "GuestControlledCacheTypes",
    "HighMmioGapSize",
    "LowMmioGapSize",
    "IncrementalBackupEnabled",
    "LockOnDisconnect",
    "NetworkBootPreferredProtocol",
    "PauseAfterBootFailure",
    "SecureBootEnabled",
    "SecureBootTemplateId",
    "SnapshotDataRoot",
    "SwapFileDataRoot",
    "UserSnapshotType",
    "VirtualNumaEnabled",
    "AllowReducedFcRedundancy",
];

impl State {
    pub(crate) fn system_service(&mut self, method: &str, arguments: &Arguments) -> Option<Answer> {
        Some(match method {
            "ModifySystemSettings" => self.modify_settings(arguments),
            "ModifyDiskMergeSettings" => self.modify_merges(arguments),
            "SetGuestNetworkAdapterConfiguration" => self.set_guest_network(arguments),
            "ExportSystemDefinition" => self.export_system(arguments),
            "AddResourceSettings" => self.add_resources(arguments),
            "ModifyResourceSettings" => self.modify_resources(arguments),
            "RemoveResourceSettings" => self.remove_resources(arguments),
            "AddFeatureSettings" => self.add_features(arguments),
            "DefineSystem" => self.define_system(arguments),
            "DestroySystem" => self.destroy_system(arguments),
            "ImportSystemDefinition" => self.import_system(arguments),
            "ValidatePlannedSystem" => self.validate_system(arguments),
            "RealizePlannedSystem" => self.realize_system(arguments),
            _ => return None,
        })
    }

    /// Changes what the instance says; what it does not say stays.
    fn modify_settings(&mut self, arguments: &Arguments) -> Answer {
        let settings = arguments.embedded("SystemSettings", "Msvm_VirtualSystemSettingData");
        let Ok(Some(settings)) = settings else { return Answer::code(INVALID_PARAMETER) };
        let id = settings.value("InstanceID").and_then(CimValue::as_str);
        let Some(id) = id.and_then(super::arguments::id_of) else {
            return Answer::code(INVALID_PARAMETER);
        };
        let configuration = match (self.vms.get_mut(&id), self.snapshots.get_mut(&id)) {
            (Some(vm), _) => &mut vm.configuration,
            (None, Some(snapshot)) => &mut snapshot.configuration,
            (None, None) => return Answer::code(INVALID_PARAMETER),
        };
        let current = &configuration.settings;
        let changed: Vec<(String, CimValue)> = settings
            .properties
            .iter()
            .filter(|(name, value)| name != "InstanceID" && current.value(name) != Some(value))
            .filter(|(_, value)| *value != CimValue::Null)
            .cloned()
            .collect();
        // A whole instance may be sent back; read-only properties must then be as they were.
        if changed.iter().any(|(name, _)| !WRITABLE.contains(&name.as_str())) {
            return Answer::code(INVALID_PARAMETER);
        }
        let too_long = |(name, value): &(String, CimValue)| {
            name == "ElementName" && value.as_str().is_none_or(|t| t.is_empty() || t.len() > 100)
        };
        if changed.iter().any(too_long) {
            return Answer::code(INVALID_PARAMETER);
        }
        for (name, value) in changed {
            configuration.settings.set(&name, value);
        }
        let done = Effect::Done(self.write_configuration(id));
        self.begin("ModifySystemSettings", "Modifying settings".into(), done, None)
    }

    /// Writes the configuration file of a VM or checkpoint anew.
    pub(crate) fn write_configuration(
        &mut self,
        id: Uuid,
    ) -> Result<Vec<(ObjectPath, u16)>, JobError> {
        let written = if let Some(vm) = self.vms.get(&id) {
            // One that is planned is nowhere but in the host's memory.
            if vm.planned { Ok(()) } else { self.write_vm_files(vm) }
        } else if let Some(snapshot) = self.snapshots.get(&id) {
            self.write_snapshot_files(snapshot)
        } else {
            Ok(())
        };
        written.map(|()| Vec::new()).map_err(super::snapshot::internal)
    }

    /// 0 switches the merges of a VM off, 1 on.
    fn modify_merges(&mut self, arguments: &Arguments) -> Answer {
        let settings = arguments.embedded("SettingData", "Msvm_DiskMergeSettingData");
        let Ok(Some(settings)) = settings else { return Answer::code(INVALID_PARAMETER) };
        let id = settings.value("InstanceID").and_then(CimValue::as_str).unwrap_or_default();
        let id: Option<Uuid> =
            id.strip_prefix("Microsoft:").and_then(|id| id.split('\\').next()?.parse().ok());
        let state = settings.value("EnabledState").and_then(CimValue::as_u64);
        let vm = id.and_then(|id| self.vms.get_mut(&id));
        let (Some(vm), Some(state @ 0..=1)) = (vm, state) else {
            return Answer::code(INVALID_PARAMETER);
        };
        vm.merges_off = state == 0;
        Answer::code(0)
    }

    fn set_guest_network(&mut self, arguments: &Arguments) -> Answer {
        let class = "Msvm_GuestNetworkAdapterConfiguration";
        let Ok(wanted) = arguments.all_embedded("NetworkConfiguration", class) else {
            return Answer::code(INVALID_PARAMETER);
        };
        let vm = arguments.vm("ComputerSystem").and_then(|id| self.vms.get_mut(&id));
        let Some(vm) = vm else { return Answer::code(INVALID_PARAMETER) };
        // The guest applies it, so it must run and answer.
        if vm.state != 2 || !vm.kvp {
            return Answer::code(32777);
        }
        let prefix = format!(r"Microsoft:GuestNetwork\{}\", crate::state::guid(vm.id));
        for configuration in wanted {
            let id = configuration.value("InstanceID").and_then(CimValue::as_str);
            let adapter = id.and_then(|id| id.strip_prefix(&prefix)).map(str::to_owned);
            let dhcp = configuration.value("DHCPEnabled").and_then(CimValue::as_bool);
            let (Some(adapter), Some(_)) = (adapter, dhcp) else {
                return Answer::code(INVALID_PARAMETER);
            };
            if vm.configuration.resource(&adapter).is_none() {
                return Answer::code(INVALID_PARAMETER);
            }
            vm.guest_networks.insert(adapter, configuration);
        }
        let caption = "Applying network configuration".into();
        let done = Effect::Done(Ok(Vec::new()));
        self.begin("SetGuestNetworkAdapterConfiguration", caption, done, None)
    }

    fn export_system(&mut self, arguments: &Arguments) -> Answer {
        let settings =
            arguments.embedded("ExportSettingData", "Msvm_VirtualSystemExportSettingData");
        let vm = arguments.vm("ComputerSystem").filter(|id| self.vms.contains_key(id));
        let (Some(vm), Ok(settings)) = (vm, settings) else {
            return Answer::code(INVALID_PARAMETER);
        };
        let copies = settings.as_ref().and_then(|s| s.value("CopyVmStorage")?.as_bool());
        if copies != Some(false) {
            return Answer::code(super::NOT_SUPPORTED);
        }
        let directory = arguments.text("ExportDirectory").to_owned();
        let done = self.export_configuration(vm, &directory).map(|()| Vec::new());
        let blocks = self.faults.export_blocks_merges;
        if let Some(vm) = self.vms.get_mut(&vm) {
            vm.merges_off |= blocks;
        }
        let done = Effect::Done(done.map_err(super::snapshot::internal));
        self.begin("ExportSystemDefinition", "Exporting virtual machine".into(), done, None)
    }

    pub(crate) fn computer_method(
        &mut self,
        path: &ObjectPath,
        method: &str,
        arguments: &Arguments,
    ) -> Option<Answer> {
        if method != "RequestStateChange" {
            return None;
        }
        let Some(vm) = path.key("Name").and_then(|id| id.parse().ok()) else {
            return Some(Answer::code(INVALID_PARAMETER));
        };
        let state = self.vms.get(&vm).map(|vm| vm.state)?;
        let wanted = match (arguments.number("RequestedState"), state) {
            (2, 3 | 32768 | 32769) => 2,
            (3, 2 | 32768 | 32769) | (4, 2) => 3,
            (6, 2 | 32768) => 32769,
            (9, 2) => 32768,
            (10 | 11, 2) => 2,
            (2 | 3 | 4 | 6 | 9 | 10 | 11, _) => return Some(Answer::code(INVALID_STATE)),
            _ => return Some(Answer::code(INVALID_PARAMETER)),
        };
        let caption = "Changing state of virtual machine".into();
        Some(self.begin("RequestStateChange", caption, Effect::ChangeState(vm, wanted), None))
    }

    /// Brings a VM into a state; its files are closed where it no longer runs.
    pub(crate) fn set_vm_state(&mut self, vm: Uuid, state: u16) -> Result<(), JobError> {
        let keys: Vec<u64> = match self.vms.get(&vm) {
            Some(vm) => {
                vm.configuration.disk_paths().filter_map(|(_, path)| self.disk_of(path)).collect()
            }
            None => return Err(super::snapshot::gone("the virtual machine")),
        };
        let opened = keys.iter().any(|key| {
            let live = self.disks[key].live.clone();
            self.is_open(&live)
        });
        if opened && state == 2 {
            return Err(JobError::new(32774, "A disk is in use (0x80070020)."));
        }
        for key in keys {
            self.close_writer(key).map_err(super::snapshot::internal)?;
        }
        if let Some(vm) = self.vms.get_mut(&vm) {
            vm.state = state;
        }
        Ok(())
    }

    pub(crate) fn job_method(
        &mut self,
        path: &ObjectPath,
        method: &str,
        arguments: &Arguments,
    ) -> Option<Answer> {
        let id: Uuid = path.key("InstanceID")?.parse().ok()?;
        Some(match method {
            "GetErrorEx" => {
                let errors = self.jobs.get(&id)?.errors();
                Answer::code(0).with("Errors", strings(errors))
            }
            "GetError" => {
                let error = self.jobs.get(&id)?.errors().pop();
                Answer::code(0).with("Error", error.map_or(CimValue::Null, CimValue::String))
            }
            "RequestStateChange" => match arguments.number("RequestedState") {
                // Terminate, kill.
                4 | 5 if self.terminate(id) => Answer::code(0),
                4 | 5 => Answer::code(4097),
                _ => Answer::code(INVALID_PARAMETER),
            },
            _ => return None,
        })
    }
}

/// An array of texts, also an empty one.
pub(crate) fn strings(items: Vec<String>) -> CimValue {
    CimValue::Array(CimType::String, items.into_iter().map(CimValue::String).collect())
}

/// The properties of an instance that are set.
pub(crate) fn set_properties(instance: &CimInstance) -> impl Iterator<Item = &(String, CimValue)> {
    instance.properties.iter().filter(|(_, value)| *value != CimValue::Null)
}
