//! Resources of a VM: added, changed, removed.

use super::arguments::Arguments;
use super::{IN_USE, INVALID_PARAMETER, INVALID_STATE};
use crate::jobs::{Answer, EFFECT_CREATE, Effect};
use crate::state::{Resource, State, guid};
use uuid::Uuid;
use vmtide_cim::{CimInstance, CimType, CimValue, ObjectPath};

/// The properties of resources that are told and cannot be changed.
const FIXED: [&str; 6] =
    ["InstanceID", "ResourceType", "ResourceSubType", "Caption", "Description", "PoolID"];

/// A resource by its owner and its suffix, of `Microsoft:GUID\suffix`.
pub(crate) fn split_id(id: &str) -> Option<(Uuid, &str)> {
    let (owner, suffix) = id.strip_prefix("Microsoft:")?.split_once('\\')?;
    Some((owner.parse().ok()?, suffix))
}

fn number(instance: &CimInstance, name: &str) -> Option<u64> {
    instance.value(name).and_then(CimValue::as_u64)
}

fn text<'a>(instance: &'a CimInstance, name: &str) -> &'a str {
    instance.value(name).and_then(CimValue::as_str).unwrap_or_default()
}

impl State {
    pub(crate) fn add_resources(&mut self, arguments: &Arguments) -> Answer {
        let class = "CIM_ResourceAllocationSettingData";
        let vm = arguments.settings("AffectedConfiguration");
        let (Some(vm), Ok(wanted)) = (vm, arguments.all_embedded("ResourceSettings", class)) else {
            return Answer::code(INVALID_PARAMETER);
        };
        if !self.vms.contains_key(&vm) || wanted.is_empty() {
            return Answer::code(INVALID_PARAMETER);
        }
        // All or nothing.
        let before = self.vms[&vm].configuration.clone();
        let mut made = Vec::new();
        for instance in &wanted {
            match self.add_resource(vm, instance) {
                Ok(path) => made.push(path),
                Err(code) => {
                    if let Some(vm) = self.vms.get_mut(&vm) {
                        vm.configuration = before;
                    }
                    return Answer::code(code);
                }
            }
        }
        self.changed(vm, "AddResourceSettings", "ResultingResourceSettings", made)
    }

    /// Writes the configuration anew and answers with a job and the objects.
    fn changed(
        &mut self,
        vm: Uuid,
        method: &str,
        result: &'static str,
        made: Vec<ObjectPath>,
    ) -> Answer {
        let written = self.write_configuration(vm);
        let effects = made.iter().map(|path| (path.clone(), EFFECT_CREATE)).collect();
        let done = Effect::Done(written.map(|_| effects));
        let answer = self.begin(method, "Modifying virtual machine".into(), done, None);
        let paths = made.into_iter().map(CimValue::Reference).collect();
        answer.with(result, CimValue::Array(CimType::Reference, paths))
    }

    /// Adds one resource to a VM.
    pub(crate) fn add_resource(
        &mut self,
        vm: Uuid,
        wanted: &CimInstance,
    ) -> Result<ObjectPath, u32> {
        let found = self.vms.get(&vm).ok_or(INVALID_PARAMETER)?;
        let running = found.state != 3;
        let parent = self.parent_of(vm, wanted)?;
        let parent_type = parent.as_ref().and_then(|p| number(&p.values, "ResourceType"));
        let kind = number(wanted, "ResourceType").ok_or(INVALID_PARAMETER)?;
        let class = match kind {
            5 | 6 | 16 | 17 => "Msvm_ResourceAllocationSettingData",
            10 => "Msvm_SyntheticEthernetPortSettingData",
            31 => "Msvm_StorageAllocationSettingData",
            33 => "Msvm_EthernetPortAllocationSettingData",
            _ => return Err(INVALID_PARAMETER),
        };
        let emulated = kind == 10 && wanted.class == "Msvm_EmulatedEthernetPortSettingData";
        if wanted.class != class && !emulated {
            return Err(INVALID_PARAMETER);
        }
        let suffix = match (kind, &parent, parent_type) {
            (6, None, _) if running => return Err(INVALID_STATE),
            (6, None, _) => format!(r"{}\0", guid(self.random.guid())),
            (10, None, _) => guid(self.random.guid()),
            (16 | 17, Some(controller), Some(5 | 6)) => {
                let location = self.free_location(vm, controller, wanted)?;
                format!(r"{}\{location}\D", controller.suffix)
            }
            (31, Some(drive), Some(16 | 17)) => {
                let start = drive.suffix.strip_suffix('D').ok_or(INVALID_PARAMETER)?;
                format!("{start}L")
            }
            (33, Some(port), Some(10)) => format!(r"{}\C", port.suffix),
            _ => return Err(INVALID_PARAMETER),
        };
        if self.vms[&vm].configuration.resource(&suffix).is_some() {
            return Err(IN_USE);
        }
        self.check_values(vm, wanted, kind)?;
        let mut values = CimInstance::new(wanted.class.as_str());
        for (name, value) in super::system::set_properties(wanted) {
            if !matches!(name.as_str(), "InstanceID" | "Parent") {
                values.set(name, value.clone());
            }
        }
        if kind == 10 && text(&values, "Address").is_empty() {
            let tail = self.random.below(1 << 24);
            values.set("Address", format!("00155D{tail:06X}"));
        }
        let resource = Resource {
            class: wanted.class.clone(),
            suffix,
            parent: parent.map(|parent| parent.suffix),
            values,
        };
        let id = format!(r"Microsoft:{}\{}", guid(vm), resource.suffix);
        let path = self.path_of_id(&resource.class, &id);
        if let Some(vm) = self.vms.get_mut(&vm) {
            vm.configuration.resources.push(resource);
        }
        Ok(path)
    }

    /// The resource that `Parent` names, which must belong to the same VM; none where it names none.
    fn parent_of(&self, vm: Uuid, wanted: &CimInstance) -> Result<Option<Resource>, u32> {
        let parent = text(wanted, "Parent");
        if parent.is_empty() {
            return Ok(None);
        }
        let path: ObjectPath = parent.parse().map_err(|_| INVALID_PARAMETER)?;
        let id = path.key("InstanceID").and_then(split_id);
        let (owner, suffix) = id.ok_or(INVALID_PARAMETER)?;
        let resource = self.vms[&vm].configuration.resource(suffix);
        match resource.filter(|resource| owner == vm && resource.class == path.class) {
            Some(resource) => Ok(Some(resource.clone())),
            None => Err(INVALID_PARAMETER),
        }
    }

    /// Where a drive hangs on its controller: where it wants to, or the first place that is free.
    fn free_location(
        &self,
        vm: Uuid,
        controller: &Resource,
        wanted: &CimInstance,
    ) -> Result<u64, u32> {
        let places = if number(&controller.values, "ResourceType") == Some(5) { 2 } else { 64 };
        let configuration = &self.vms[&vm].configuration;
        let taken: Vec<u64> = configuration
            .resources
            .iter()
            .filter(|r| r.parent.as_deref() == Some(controller.suffix.as_str()))
            .filter_map(|r| number(&r.values, "AddressOnParent"))
            .collect();
        match number(wanted, "AddressOnParent") {
            Some(place) if place >= places => Err(INVALID_PARAMETER),
            Some(place) if taken.contains(&place) => Err(IN_USE),
            Some(place) => Ok(place),
            None => Err(INVALID_PARAMETER),
        }
    }

    /// What a disk, an adapter or a connection may be set to.
    fn check_values(&mut self, vm: Uuid, wanted: &CimInstance, kind: u64) -> Result<(), u32> {
        let first =
            wanted.value("HostResource").and_then(|value| value.elements().first().cloned());
        let first = first.as_ref().and_then(CimValue::as_str).unwrap_or_default().to_owned();
        let planned = self.vms[&vm].planned;
        match kind {
            31 => {
                if first.is_empty() {
                    return Err(INVALID_PARAMETER);
                }
                // While a VM is planned its disks may still have to come.
                if planned {
                    return self.local(&first).map(|_| ()).ok_or(INVALID_PARAMETER);
                }
                if self.local(&first).is_none_or(|local| !local.is_file()) {
                    return Err(super::FILE_NOT_FOUND);
                }
                let attached = self.vms.values().any(|other| {
                    !other.planned
                        && other.id != vm
                        && other.configuration.disk_paths().any(|(_, path)| path == first)
                });
                if attached || self.is_open(&first) {
                    return Err(IN_USE);
                }
                self.adopt_disk(&first).map(|_| ()).map_err(|_| 32768)
            }
            10 => {
                let mac = text(wanted, "Address");
                let is_mac = mac.len() == 12 && mac.bytes().all(|b| b.is_ascii_hexdigit());
                if mac.is_empty() || is_mac { Ok(()) } else { Err(INVALID_PARAMETER) }
            }
            // One that is not in force may remember a switch of another host.
            33 if !first.is_empty() && number(wanted, "EnabledState") != Some(3) => {
                let path: ObjectPath = first.parse().map_err(|_| INVALID_PARAMETER)?;
                let known = path.class == "Msvm_VirtualEthernetSwitch"
                    && path
                        .key("Name")
                        .and_then(|id| id.parse().ok())
                        .is_some_and(|id: Uuid| self.switches.contains_key(&id));
                if known { Ok(()) } else { Err(INVALID_PARAMETER) }
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn modify_resources(&mut self, arguments: &Arguments) -> Answer {
        let class = "CIM_ResourceAllocationSettingData";
        let Ok(wanted) = arguments.all_embedded("ResourceSettings", class) else {
            return Answer::code(INVALID_PARAMETER);
        };
        let mut changed = Vec::new();
        let mut owner = None;
        for instance in &wanted {
            let id = text(instance, "InstanceID").to_owned();
            let known = split_id(&id).and_then(|(vm, suffix)| {
                let resource = self.vms.get(&vm)?.configuration.resource(suffix)?;
                Some((vm, resource.suffix.clone(), resource.class.clone()))
            });
            let Some((vm, suffix, class)) = known.filter(|(_, _, class)| *class == instance.class)
            else {
                return Answer::code(INVALID_PARAMETER);
            };
            if let Err(code) = self.modify_resource(vm, &suffix, instance) {
                return Answer::code(code);
            }
            owner = Some(vm);
            changed.push(self.path_of_id(&class, &id));
        }
        match owner {
            Some(vm) => {
                self.changed(vm, "ModifyResourceSettings", "ResultingResourceSettings", changed)
            }
            None => Answer::code(INVALID_PARAMETER),
        }
    }

    pub(crate) fn modify_resource(
        &mut self,
        vm: Uuid,
        suffix: &str,
        wanted: &CimInstance,
    ) -> Result<(), u32> {
        let found = &self.vms[&vm];
        let resource = found.configuration.resource(suffix).ok_or(INVALID_PARAMETER)?;
        let current = resource.values.clone();
        let changes: Vec<(String, CimValue)> = super::system::set_properties(wanted)
            .filter(|(name, value)| {
                !matches!(name.as_str(), "InstanceID" | "Parent")
                    && current.value(name) != Some(value)
            })
            .cloned()
            .collect();
        if changes.iter().any(|(name, _)| FIXED.contains(&name.as_str())) {
            return Err(INVALID_PARAMETER);
        }
        let kind = number(&current, "ResourceType").unwrap_or(0);
        // What a running guest has of processors, memory and adapters does not change.
        if found.state != 3 && !changes.is_empty() && !matches!(kind, 31 | 33) {
            return Err(INVALID_STATE);
        }
        if kind == 31 && self.snapshots.values().any(|snapshot| snapshot.vm == vm) {
            return Err(INVALID_STATE);
        }
        let mut next = current;
        for (name, value) in changes {
            next.set(&name, value);
        }
        self.check_values(vm, &next, kind)?;
        let vm = self.vms.get_mut(&vm);
        if let Some(resource) = vm.and_then(|vm| vm.configuration.resource_mut(suffix)) {
            resource.values = next;
        }
        Ok(())
    }

    pub(crate) fn remove_resources(&mut self, arguments: &Arguments) -> Answer {
        let mut ids = Vec::new();
        for path in arguments.references("ResourceSettings") {
            let id = path.key("InstanceID").and_then(split_id);
            let known = id.filter(|(vm, suffix)| {
                let vm = self.vms.get(vm);
                vm.is_some_and(|vm| vm.configuration.resource(suffix).is_some())
            });
            match known {
                Some((vm, suffix)) => ids.push((vm, suffix.to_owned())),
                None => return Answer::code(INVALID_PARAMETER),
            }
        }
        let Some((vm, _)) = ids.first().cloned() else { return Answer::code(INVALID_PARAMETER) };
        for (owner, suffix) in &ids {
            let resources = &self.vms[owner].configuration.resources;
            let has_children = resources.iter().any(|resource| {
                resource.parent.as_ref() == Some(suffix)
                    && !ids.iter().any(|(_, other)| *other == resource.suffix)
            });
            if has_children || self.snapshots.values().any(|snapshot| snapshot.vm == *owner) {
                return Answer::code(INVALID_STATE);
            }
        }
        for (owner, suffix) in &ids {
            if let Some(vm) = self.vms.get_mut(owner) {
                vm.configuration.resources.retain(|resource| resource.suffix != *suffix);
            }
        }
        let done = Effect::Done(self.write_configuration(vm));
        self.begin("RemoveResourceSettings", "Modifying virtual machine".into(), done, None)
    }

    /// Features of a switch port; VLANs are the only ones there are.
    pub(crate) fn add_features(&mut self, arguments: &Arguments) -> Answer {
        let class = "Msvm_EthernetSwitchPortVlanSettingData";
        let port = arguments.reference("AffectedConfiguration");
        let port = port.as_ref().and_then(|path| path.key("InstanceID")).and_then(split_id);
        let known = port.filter(|(vm, suffix)| {
            self.vms.get(vm).is_some_and(|vm| vm.configuration.resource(suffix).is_some())
        });
        let features = arguments.all_embedded("FeatureSettings", class);
        let (Some((vm, suffix)), Ok(features)) = (known, features) else {
            return Answer::code(INVALID_PARAMETER);
        };
        let mut made = Vec::new();
        for feature in features {
            let own = format!(r"{suffix}\952C5004-4465-451C-8CB8-FA9AB382B773");
            if self.vms[&vm].configuration.resource(&own).is_some() {
                return Answer::code(INVALID_STATE);
            }
            let mut values = feature;
            values
                .properties
                .retain(|(name, value)| name != "InstanceID" && *value != CimValue::Null);
            made.push(self.path_of_id(class, &format!(r"Microsoft:{}\{own}", guid(vm))));
            if let Some(vm) = self.vms.get_mut(&vm) {
                vm.configuration.resources.push(Resource {
                    class: class.to_owned(),
                    suffix: own,
                    parent: Some(suffix.to_owned()),
                    values,
                });
            }
        }
        self.changed(vm, "AddFeatureSettings", "ResultingFeatureSettings", made)
    }
}
