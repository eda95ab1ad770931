//! VMs that are made: defined from settings, or imported from a configuration file, planned and realized.

use super::arguments::Arguments;
use super::{FILE_NOT_FOUND, INVALID_PARAMETER, INVALID_STATE};
use crate::build::{IDE_CONTROLLER, resource};
use crate::definition::Definition;
use crate::images::{directory_of, name_of};
use crate::jobs::{Answer, EFFECT_CREATE, Effect, JobError};
use crate::state::{Configuration, Resource, State, Vm, Vss, guid};
use std::collections::BTreeMap;
use uuid::Uuid;
use vmtide_cim::{CimInstance, CimValue};

/// What the settings of a new VM cannot say: the host decides it.
const IGNORED: [&str; 6] = [
    "InstanceID",
    "VirtualSystemIdentifier",
    "VirtualSystemType",
    "ConfigurationID",
    "ConfigurationFile",
    "CreationTime",
];

impl State {
    fn new_vm(&self, id: Uuid, planned: bool, configuration: Configuration) -> Vm {
        Vm {
            id,
            planned,
            state: 3,
            configuration,
            vss: Vss::Works,
            kvp: true,
            merges_off: false,
            guest_networks: BTreeMap::new(),
            last_applied: None,
            current_parent: None,
        }
    }

    pub(crate) fn define_system(&mut self, arguments: &Arguments) -> Answer {
        let class = "CIM_ResourceAllocationSettingData";
        let settings = arguments.embedded("SystemSettings", "Msvm_VirtualSystemSettingData");
        let resources = arguments.all_embedded("ResourceSettings", class);
        let (Ok(settings), Ok(resources)) = (settings, resources) else {
            return Answer::code(INVALID_PARAMETER);
        };
        if arguments.reference("ReferenceConfiguration").is_some() {
            return Answer::code(super::NOT_SUPPORTED);
        }
        let id = self.random.guid();
        let Some(mut configuration) = new_configuration(id, settings.as_ref()) else {
            return Answer::code(INVALID_PARAMETER);
        };
        configuration.settings.set("CreationTime", crate::instances::timestamp(self.unix_s()));
        let vm = self.new_vm(id, false, configuration);
        self.vms.insert(id, vm);
        for wanted in &resources {
            let kind = wanted.value("ResourceType").and_then(CimValue::as_u64);
            let usual = match kind {
                Some(3 | 4) => {
                    let all = self.vms[&id].configuration.resources.iter();
                    let mut own = all.filter(|r| r.class == wanted.class);
                    own.next().map(|resource| resource.suffix.clone())
                }
                _ => None,
            };
            let done = match usual {
                Some(suffix) => self.modify_resource(id, &suffix, wanted),
                None => self.add_resource(id, wanted).map(|_| ()),
            };
            if let Err(code) = done {
                self.vms.remove(&id);
                return Answer::code(code);
            }
        }
        let path = self.path_of_vm(&self.vms[&id]);
        let written = self.write_configuration(id);
        let done = Effect::Done(written.map(|_| vec![(path, EFFECT_CREATE)]));
        self.begin("DefineSystem", "Creating virtual machine".into(), done, Some("ResultingSystem"))
    }

    pub(crate) fn import_system(&mut self, arguments: &Arguments) -> Answer {
        let file = arguments.text("SystemDefinitionFile").to_owned();
        let Some(local) = self.local(&file) else { return Answer::code(INVALID_PARAMETER) };
        if !local.is_file() {
            return Answer::code(FILE_NOT_FOUND);
        }
        let text = std::fs::read_to_string(local).unwrap_or_default();
        let Some(definition) = Definition::from_text(&text) else {
            return Answer::code(INVALID_PARAMETER);
        };
        let anew = arguments.truth("GenerateNewSystemIdentifier");
        let id = if anew { self.random.guid() } else { definition.vm };
        if self.vms.contains_key(&id) {
            let error = JobError::new(
                32768,
                "Import failed. A virtual machine with the same identifier already exists.",
            );
            let effect = Effect::Done(Err(error));
            return self.begin("ImportSystemDefinition", "Importing".into(), effect, None);
        }
        let mut configuration = definition.configuration;
        // The files lie in `Virtual Machines` or `Snapshots` of the directory of the VM.
        let directory = directory_of(&file);
        let root = match name_of(directory) {
            "Virtual Machines" | "Snapshots" => directory_of(directory),
            _ => directory,
        };
        let settings = &mut configuration.settings;
        settings.set("VirtualSystemType", "Microsoft:Hyper-V:System:Planned");
        name_files(settings, id, root);
        let vm = self.new_vm(id, true, configuration);
        let path = self.path_of_vm(&vm);
        self.vms.insert(id, vm);
        let effect = Effect::Done(Ok(vec![(path, EFFECT_CREATE)]));
        let caption = "Importing virtual machine".into();
        self.begin("ImportSystemDefinition", caption, effect, Some("ImportedSystem"))
    }

    pub(crate) fn validate_system(&mut self, arguments: &Arguments) -> Answer {
        let vm = arguments.vm("PlannedSystem").filter(|id| self.is_planned(*id));
        let Some(vm) = vm else { return Answer::code(INVALID_PARAMETER) };
        let effect = Effect::Done(self.validate(vm).map(|()| Vec::new()));
        let caption = "Validating virtual machine".into();
        self.begin("ValidatePlannedSystem", caption, effect, None)
    }

    pub(crate) fn realize_system(&mut self, arguments: &Arguments) -> Answer {
        let vm = arguments.vm("PlannedSystem").filter(|id| self.is_planned(*id));
        let Some(vm) = vm else { return Answer::code(INVALID_PARAMETER) };
        let done = self.validate(vm).and_then(|()| {
            let found = self.vms.get_mut(&vm).ok_or_else(|| super::snapshot::gone("it"))?;
            found.planned = false;
            found
                .configuration
                .settings
                .set("VirtualSystemType", "Microsoft:Hyper-V:System:Realized");
            let path = self.path_of_vm(&self.vms[&vm]);
            self.write_configuration(vm)?;
            Ok(vec![(path, EFFECT_CREATE)])
        });
        let caption = "Realizing virtual machine".into();
        self.begin("RealizePlannedSystem", caption, Effect::Done(done), Some("ResultingSystem"))
    }

    fn is_planned(&self, vm: Uuid) -> bool {
        self.vms.get(&vm).is_some_and(|vm| vm.planned)
    }

    /// Whether all that a VM needs is there: its disks, and the switches it is connected to.
    fn validate(&mut self, vm: Uuid) -> Result<(), JobError> {
        let configuration = self.vms[&vm].configuration.clone();
        for (_, path) in configuration.disk_paths() {
            let used = self.vms.values().any(|other| {
                let mut paths = other.configuration.disk_paths();
                !other.planned && other.id != vm && paths.any(|(_, used)| used == path)
            });
            if used || self.is_open(path) {
                return Err(JobError::new(32774, format!("The disk {path} is in use.")));
            }
            self.adopt_disk(path).map_err(|error| JobError::new(32779, error))?;
        }
        let connected = |resource: &&Resource| {
            resource.class == "Msvm_EthernetPortAllocationSettingData"
                && resource.values.value("EnabledState").and_then(CimValue::as_u64) == Some(2)
        };
        for resource in configuration.resources.iter().filter(connected) {
            let path: Option<vmtide_cim::ObjectPath> =
                resource.host_resource().and_then(|path| path.parse().ok());
            let switch = path.as_ref().and_then(|path| path.key("Name")?.parse().ok());
            if !switch.is_some_and(|id: Uuid| self.switches.contains_key(&id)) {
                let text = "Could not find the Ethernet switch of an adapter.";
                return Err(JobError::new(32773, text));
            }
        }
        Ok(())
    }

    pub(crate) fn destroy_system(&mut self, arguments: &Arguments) -> Answer {
        let vm = arguments.vm("AffectedSystem").filter(|id| self.vms.contains_key(id));
        let Some(vm) = vm else { return Answer::code(INVALID_PARAMETER) };
        let planned = arguments.reference("AffectedSystem").map(|path| path.class);
        let is_right = match planned.as_deref() {
            Some("Msvm_PlannedComputerSystem") => self.vms[&vm].planned,
            _ => !self.vms[&vm].planned,
        };
        if !is_right {
            return Answer::code(INVALID_PARAMETER);
        }
        if self.vms[&vm].state == 2 {
            return Answer::code(INVALID_STATE);
        }
        let snapshots: Vec<Uuid> =
            self.snapshots.values().filter(|s| s.vm == vm).map(|s| s.id).collect();
        let done = self.destroy_snapshots(&snapshots);
        self.points.retain(|_, point| point.vm != vm);
        self.end_late_work_on(vm);
        if let Some(vm) = self.vms.remove(&vm) {
            // A planned VM has written nothing yet: what it was imported from is the caller's.
            if !vm.planned {
                self.remove_configuration_files(&vm.configuration);
            }
        }
        self.forget_ids();
        self.begin("DestroySystem", "Deleting virtual machine".into(), Effect::Done(done), None)
    }
}

/// Gives the configuration its place and the names of its files.
fn name_files(settings: &mut CimInstance, id: Uuid, root: &str) {
    settings.set("ConfigurationID", guid(id));
    for name in ["ConfigurationDataRoot", "SnapshotDataRoot", "SuspendDataRoot"] {
        settings.set(name, root);
    }
    settings.set("ConfigurationFile", format!(r"Virtual Machines\{}.vmcx", guid(id)));
    let second = settings.value("VirtualSystemSubType").and_then(CimValue::as_str)
        == Some("Microsoft:Hyper-V:SubType:2");
    if second {
        settings.set("GuestStateDataRoot", root);
        settings.set("GuestStateFile", format!(r"Virtual Machines\{}.vmgs", guid(id)));
    }
}

/// The configuration of a new VM as its settings say; none where they say what cannot be.
fn new_configuration(id: Uuid, wanted: Option<&CimInstance>) -> Option<Configuration> {
    let mut settings = CimInstance::new("Msvm_VirtualSystemSettingData")
        .with("Caption", "Virtual Machine Settings")
        .with("ElementName", "New Virtual Machine")
        .with("VirtualSystemSubType", "Microsoft:Hyper-V:SubType:1")
        .with("Version", "10.0")
        .with("UserSnapshotType", CimValue::Uint16(3));
    for (name, value) in wanted.into_iter().flat_map(super::system::set_properties) {
        if !IGNORED.contains(&name.as_str()) {
            settings.set(name, value.clone());
        }
    }
    let text = |name: &str| settings.value(name).and_then(CimValue::as_str).unwrap_or_default();
    let generation = match text("VirtualSystemSubType") {
        "Microsoft:Hyper-V:SubType:1" => 1,
        "Microsoft:Hyper-V:SubType:2" => 2,
        _ => return None,
    };
    if generation == 1
        && settings.value("SecureBootEnabled").and_then(CimValue::as_bool) == Some(true)
    {
        return None;
    }
    let root = match text("ConfigurationDataRoot") {
        "" => r"C:\ProgramData\Microsoft\Windows\Hyper-V".to_owned(),
        root => root.to_owned(),
    };
    settings.set("VirtualSystemType", "Microsoft:Hyper-V:System:Realized");
    name_files(&mut settings, id, &root);
    let mut resources = vec![
        numbered(
            resource(
                "Msvm_ProcessorSettingData",
                r"b637f346-6a0e-4dec-af52-bd70cb80a21d\0".into(),
                None,
            ),
            3,
            "Processor",
            1,
        ),
        numbered(
            resource("Msvm_MemorySettingData", "4764334d-e001-4176-82ee-5594ec9b530e".into(), None),
            4,
            "Memory",
            1024,
        ),
        resource("Msvm_SecuritySettingData", "b56ab9e4-0000-4000-8000-000000000000".into(), None),
    ];
    if generation == 1 {
        for number in 0..2 {
            let suffix = format!(r"{IDE_CONTROLLER}\{number}");
            let mut controller = resource("Msvm_ResourceAllocationSettingData", suffix, None);
            let values = &mut controller.values;
            values.set("ResourceType", CimValue::Uint16(5));
            values.set("ResourceSubType", "Microsoft:Hyper-V:Emulated IDE Controller");
            values.set("ElementName", format!("IDE Controller {number}"));
            values.set("Address", number.to_string());
            resources.push(controller);
        }
    }
    Some(Configuration { settings, resources })
}

fn numbered(mut resource: Resource, kind: u16, name: &str, quantity: u64) -> Resource {
    let values = &mut resource.values;
    values.set("ResourceType", CimValue::Uint16(kind));
    values.set("ResourceSubType", format!("Microsoft:Hyper-V:{name}"));
    values.set("ElementName", name);
    values.set("VirtualQuantity", CimValue::Uint64(quantity));
    resource
}
