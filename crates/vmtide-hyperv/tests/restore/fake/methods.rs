//! The methods of the host.

use super::objects::{CONNECTION, RESOURCE, SETTINGS, STORAGE, SYNTHETIC, VLAN, path, with_path};
use super::{Content, State, SystemBuilder, fault};
use std::sync::Arc;
use uuid::Uuid;
use vmtide_cim::{CimInstance, CimType, CimValue, MethodOutput, ObjectPath, Result, xml};

/// Invalid state.
const INVALID_STATE: u32 = 32775;
/// Invalid parameter.
const INVALID_PARAMETER: u32 = 32773;
/// Failed.
const FAILED: u32 = 32768;

/// The types of what may be set, by property; the second says whether it is an array.
const TYPES: &[(&str, CimType, bool)] = &[
    ("InstanceID", CimType::String, false),
    ("ElementName", CimType::String, false),
    ("VirtualSystemSubType", CimType::String, false),
    ("ConfigurationDataRoot", CimType::String, false),
    ("SnapshotDataRoot", CimType::String, false),
    ("SuspendDataRoot", CimType::String, false),
    ("SwapFileDataRoot", CimType::String, false),
    ("Notes", CimType::String, true),
    ("BIOSGUID", CimType::String, false),
    ("BIOSSerialNumber", CimType::String, false),
    ("BIOSNumLock", CimType::Boolean, false),
    ("BootOrder", CimType::Uint16, true),
    ("BootSourceOrder", CimType::String, true),
    ("SecureBootEnabled", CimType::Boolean, false),
    ("SecureBootTemplateId", CimType::String, false),
    ("AutomaticStartupAction", CimType::Uint16, false),
    ("AutomaticStartupActionDelay", CimType::DateTime, false),
    ("UserSnapshotType", CimType::Uint16, false),
    ("ResourceType", CimType::Uint16, false),
    ("ResourceSubType", CimType::String, false),
    ("Parent", CimType::String, false),
    ("AddressOnParent", CimType::String, false),
    ("HostResource", CimType::String, true),
    ("Address", CimType::String, false),
    ("StaticMacAddress", CimType::Boolean, false),
    ("EnabledState", CimType::Uint16, false),
    ("VirtualQuantity", CimType::Uint64, false),
    ("Reservation", CimType::Uint64, false),
    ("Limit", CimType::Uint64, false),
    ("Weight", CimType::Uint32, false),
    ("DynamicMemoryEnabled", CimType::Boolean, false),
    ("TargetMemoryBuffer", CimType::Uint32, false),
    ("OperationMode", CimType::Uint32, false),
    ("AccessVlanId", CimType::Uint16, false),
    ("NativeVlanId", CimType::Uint16, false),
    ("ExposeVirtualizationExtensions", CimType::Boolean, false),
];

/// An embedded instance, checked.
fn embedded(value: &CimValue) -> Result<CimInstance> {
    let instance = xml::from_xml(value.as_str().ok_or_else(|| fault("no text"))?)?;
    for (name, value) in &instance.properties {
        let known = TYPES.iter().find(|(known, ..)| known == name);
        let Some((_, kind, is_array)) = known else {
            return Err(fault(format!("{} has no {name} that can be set here", instance.class)));
        };
        let fits =
            value.cim_type() == Some(*kind) && matches!(value, CimValue::Array(..)) == *is_array;
        if !fits {
            return Err(fault(format!("{}.{name} is {value:?}", instance.class)));
        }
    }
    Ok(instance)
}

fn code(code: u32) -> Result<MethodOutput> {
    Ok(MethodOutput { return_value: code, parameters: CimInstance::default() })
}

pub fn invoke(
    state: &mut State,
    target: &ObjectPath,
    method: &str,
    parameters: &[(&str, CimValue)],
) -> Result<MethodOutput> {
    let names: Vec<_> = parameters.iter().map(|(name, _)| *name).collect();
    let value = |index: usize| parameters.get(index).map_or(&CimValue::Null, |(_, value)| value);
    let reference = |index: usize| value(index).as_reference().ok_or_else(|| fault("no reference"));
    let service = target.class == "Msvm_VirtualSystemManagementService";
    match (method, names.as_slice()) {
        ("DefineSystem", ["SystemSettings"]) if service => define(state, &embedded(value(0))?),
        ("AddResourceSettings", ["AffectedConfiguration", "ResourceSettings"]) if service => {
            let [one] = value(1).elements() else { return Err(fault("one at a time here")) };
            add(state, &reference(0)?, embedded(one)?)
        }
        ("AddFeatureSettings", ["AffectedConfiguration", "FeatureSettings"]) if service => {
            let [one] = value(1).elements() else { return Err(fault("one at a time here")) };
            add_feature(state, &reference(0)?, embedded(one)?)
        }
        ("ModifyResourceSettings", ["ResourceSettings"]) if service => {
            let changes: Vec<_> =
                value(0).elements().iter().map(embedded).collect::<Result<_>>()?;
            modify(state, &changes)
        }
        ("RemoveResourceSettings", ["ResourceSettings"]) if service => {
            for resource in value(0).elements() {
                let path = resource.as_reference().ok_or_else(|| fault("no reference"))?;
                for system in &mut state.systems {
                    system.resources.retain(|one| one.path.as_ref() != Some(&path));
                }
            }
            Ok(state.done("", Vec::new(), false))
        }
        ("ModifySystemSettings", ["SystemSettings"]) if service => {
            modify_system(state, &embedded(value(0))?)
        }
        (
            "ImportSystemDefinition",
            ["SystemDefinitionFile", "SnapshotFolder", "GenerateNewSystemIdentifier"],
        ) if service => {
            let file = value(0).as_str().ok_or_else(|| fault("no file"))?.to_owned();
            import(state, &file, value(2) == &CimValue::Boolean(true))
        }
        ("ValidatePlannedSystem", ["PlannedSystem"]) if service => {
            let index = system_of(state, &reference(0)?, true)?;
            let missing = missing_files(state, index);
            if missing.is_empty() { Ok(state.done("", Vec::new(), false)) } else { code(FAILED) }
        }
        ("RealizePlannedSystem", ["PlannedSystem"]) if service => realize(state, &reference(0)?),
        ("DestroySystem", ["AffectedSystem"]) if service => destroy(state, &reference(0)?),
        ("DestroyReferencePoint", ["AffectedReferencePoint"])
            if target.class == "Msvm_VirtualSystemReferencePointService" =>
        {
            let id = reference(0)?.key("InstanceID").unwrap_or_default().to_owned();
            state.points.retain(|point| point.text("InstanceID") != Ok(&id));
            Ok(state.done("", Vec::new(), false))
        }
        ("RequestStateChange", ["RequestedState"]) if target.class == "Msvm_ComputerSystem" => {
            let index = system_of(state, target, false)?;
            assert_eq!(value(0), &CimValue::Uint16(2));
            if !missing_files(state, index).is_empty() {
                return code(FAILED);
            }
            state.systems[index].running = true;
            Ok(state.done("", Vec::new(), false))
        }
        _ => Err(fault(format!("{} has no {method} {names:?}", target.class))),
    }
}

fn define(state: &mut State, settings: &CimInstance) -> Result<MethodOutput> {
    if settings.class != SETTINGS || settings.value("InstanceID").is_some() {
        return Err(fault("no settings of a new VM"));
    }
    let generation = match settings.text("VirtualSystemSubType") {
        Ok("Microsoft:Hyper-V:SubType:2") => 2,
        _ => 1,
    };
    if generation == 1 && settings.value("SecureBootEnabled").is_some() {
        return code(INVALID_PARAMETER);
    }
    let id = state.new_id();
    let mut system = SystemBuilder::new(id, settings.text("ElementName")?, generation).build();
    for (name, value) in &settings.properties {
        system.settings.set(name, value.clone());
    }
    state.systems.push(system);
    make_configuration_file(state, state.systems.len() - 1);
    Ok(state.done("ResultingSystem", vec![system_path(id)], false))
}

fn system_path(id: Uuid) -> ObjectPath {
    let class = "Msvm_ComputerSystem";
    let id = id.to_string().to_uppercase();
    ObjectPath::new(class, &[("CreationClassName", class), ("Name", &id)])
}

fn configuration_path(state: &State, index: usize) -> String {
    let settings = &state.systems[index].settings;
    let root = settings.text("ConfigurationDataRoot").unwrap();
    let file = settings.text("ConfigurationFile").unwrap();
    format!(r"{}\{file}", root.trim_end_matches('\\'))
}

fn make_configuration_file(state: &mut State, index: usize) {
    let path = configuration_path(state, index);
    let file = super::File { path: path.clone(), content: Content::Bytes(b"live".to_vec()) };
    state.files.insert(path.to_lowercase(), file);
}

fn system_of(state: &State, path: &ObjectPath, planned: bool) -> Result<usize> {
    let class = if planned { "Msvm_PlannedComputerSystem" } else { "Msvm_ComputerSystem" };
    let found = state.systems.iter().position(|system| {
        path.class == class
            && system.planned == planned
            && path.key("CreationClassName") == Some(class)
            && path.key("Name").and_then(|id| Uuid::parse_str(id).ok()) == Some(system.id)
    });
    found.ok_or_else(|| fault(format!("no system {path}")))
}

fn system_of_settings(state: &State, settings: &ObjectPath) -> Result<usize> {
    let found =
        state.systems.iter().position(|system| system.settings.path.as_ref() == Some(settings));
    found.ok_or_else(|| fault(format!("no settings {settings}")))
}

fn missing_files(state: &State, index: usize) -> Vec<String> {
    let mut files = state.systems[index].disk_files();
    files.retain(|file| !is_closed_disk(state, file));
    files
}

/// Whether the host can open the disk: it is there, and nobody writes it.
fn is_closed_disk(state: &State, file: &str) -> bool {
    match state.files.get(&file.to_lowercase()).map(|file| &file.content) {
        Some(Content::Disk { open, .. }) => Arc::strong_count(open) == 1,
        _ => false,
    }
}

fn add(state: &mut State, settings: &ObjectPath, resource: CimInstance) -> Result<MethodOutput> {
    let index = system_of_settings(state, settings)?;
    let parent = resource.optional_reference("Parent")?;
    if resource.value("InstanceID").is_some() {
        return code(INVALID_PARAMETER);
    }
    let kind: u16 = resource.number("ResourceType")?;
    let parent_kind = |state: &State| {
        let parent = parent.as_ref()?;
        assert_eq!(parent.host.as_deref(), Some(super::HOST), "{parent}");
        let mut all = state.systems[index].resources.iter();
        let found = all.find(|one| one.path.as_ref() == Some(parent))?;
        found.number::<u16>("ResourceType").ok()
    };
    let fits = match (resource.class.as_str(), kind) {
        (RESOURCE, 6) => parent.is_none(),
        (RESOURCE, 16 | 17) => {
            matches!(parent_kind(state), Some(5 | 6)) && is_free(state, index, &resource)
        }
        (STORAGE, 31) => {
            let files = resource.texts("HostResource")?;
            matches!(parent_kind(state), Some(17))
                && files.iter().all(|file| is_closed_disk(state, file))
        }
        (SYNTHETIC, 10) => parent.is_none(),
        (CONNECTION, 33) => {
            let is_off = resource.number::<u16>("EnabledState") == Ok(3);
            matches!(parent_kind(state), Some(10)) && (is_off || has_switch(state, &resource))
        }
        _ => false,
    };
    if !fits {
        return code(INVALID_PARAMETER);
    }
    let number = state.new_id();
    let prefix = state.systems[index].prefix();
    // Ids are no order: what was added first need not sort first.
    let number =
        Uuid::from_u128(number.as_u128().wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835));
    let id = match &parent {
        Some(parent) if resource.class == CONNECTION => {
            format!(r"{}\C", parent.key("InstanceID").unwrap_or_default())
        }
        _ => format!(r"{prefix}\{}\0", number.to_string().to_uppercase()),
    };
    let mut resource = resource;
    resource.set("InstanceID", id);
    let resource = with_path(resource);
    let made = resource.path.clone().into_iter().collect();
    state.systems[index].resources.push(resource);
    state.systems[index].refresh_boot_sources();
    Ok(state.done("ResultingResourceSettings", made, true))
}

fn is_free(state: &State, index: usize, resource: &CimInstance) -> bool {
    let place = |one: &CimInstance| {
        Some((
            one.optional_reference("Parent").ok()??,
            one.text("AddressOnParent").ok()?.to_owned(),
        ))
    };
    place(resource).is_some()
        && !state.systems[index].resources.iter().any(|one| place(one) == place(resource))
}

fn has_switch(state: &State, connection: &CimInstance) -> bool {
    let host = connection.texts("HostResource").unwrap_or_default();
    let switch = host.first().and_then(|text| text.parse::<ObjectPath>().ok());
    switch.is_some_and(|path| state.switches.iter().any(|(_, id)| path.key("Name") == Some(id)))
}

fn add_feature(state: &mut State, port: &ObjectPath, feature: CimInstance) -> Result<MethodOutput> {
    let owner = state.systems.iter_mut().find(|system| {
        system
            .resources
            .iter()
            .any(|one| one.class == CONNECTION && one.path.as_ref() == Some(port))
    });
    let owner = owner.ok_or_else(|| fault("no port"))?;
    let mut feature = feature;
    feature.set("InstanceID", format!(r"{}\VLAN", port.key("InstanceID").unwrap_or_default()));
    if feature.class != VLAN {
        return code(INVALID_PARAMETER);
    }
    owner.resources.push(with_path(feature));
    Ok(state.done("", Vec::new(), false))
}

fn modify(state: &mut State, changes: &[CimInstance]) -> Result<MethodOutput> {
    for change in changes {
        let id = change.text("InstanceID")?;
        if change.class == STORAGE
            && !change.texts("HostResource")?.iter().all(|file| is_closed_disk(state, file))
        {
            return code(INVALID_PARAMETER);
        }
        if change.number::<u16>("EnabledState") == Ok(2) && !has_switch(state, change) {
            return code(INVALID_PARAMETER);
        }
        let mut all = state.systems.iter_mut().flat_map(|system| &mut system.resources);
        let found = all.find(|one| one.class == change.class && one.text("InstanceID") == Ok(id));
        let found = found.ok_or_else(|| fault(format!("no resource {id}")))?;
        for (name, value) in &change.properties {
            found.set(name, value.clone());
        }
    }
    Ok(state.done("ResultingResourceSettings", Vec::new(), true))
}

fn modify_system(state: &mut State, change: &CimInstance) -> Result<MethodOutput> {
    let index = system_of_settings(state, &path(SETTINGS, change.text("InstanceID")?))?;
    for (name, value) in &change.properties {
        state.systems[index].settings.set(name, value.clone());
    }
    Ok(state.done("", Vec::new(), false))
}

fn import(state: &mut State, file: &str, new_id: bool) -> Result<MethodOutput> {
    if let Some(refused) = state.manners.refuses_imports {
        return code(refused);
    }
    let Some(Content::Bytes(bytes)) =
        state.files.get(&file.to_lowercase()).map(|file| &file.content)
    else {
        return code(32779);
    };
    let number: usize = String::from_utf8_lossy(bytes).trim_start_matches("vmcx ").parse().unwrap();
    let export = state.exports[number].clone();
    let id = if new_id { state.new_id() } else { export.id };
    if state.systems.iter().any(|system| system.id == id) {
        return code(INVALID_STATE);
    }
    let mut system = export.with_id(id);
    system.planned = true;
    system.settings.set("VirtualSystemType", "Microsoft:Hyper-V:System:Planned");
    state.systems.push(system);
    let class = "Msvm_PlannedComputerSystem";
    let name = id.to_string().to_uppercase();
    let path = ObjectPath::new(class, &[("CreationClassName", class), ("Name", &name)]);
    Ok(state.done("ImportedSystem", vec![path], false))
}

fn realize(state: &mut State, planned: &ObjectPath) -> Result<MethodOutput> {
    let index = system_of(state, planned, true)?;
    if !missing_files(state, index).is_empty() {
        return code(FAILED);
    }
    let system = &mut state.systems[index];
    system.planned = false;
    system.settings.set("VirtualSystemType", "Microsoft:Hyper-V:System:Realized");
    let id = system.id;
    make_configuration_file(state, index);
    Ok(state.done("ResultingSystem", vec![system_path(id)], false))
}

fn destroy(state: &mut State, system: &ObjectPath) -> Result<MethodOutput> {
    let planned = system.class == "Msvm_PlannedComputerSystem";
    let index = system_of(state, system, planned)?;
    if state.systems[index].running {
        return code(INVALID_STATE);
    }
    if !planned {
        let path = configuration_path(state, index);
        state.files.remove(&path.to_lowercase());
    }
    state.systems.remove(index);
    Ok(state.done("", Vec::new(), false))
}
