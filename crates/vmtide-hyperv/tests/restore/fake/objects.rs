//! The objects of the host and queries for them.

use super::{HOST, Manners, State, fault};
use uuid::Uuid;
use vmtide_cim::{CimInstance, CimType, CimValue, ObjectPath, Result};

pub const SETTINGS: &str = "Msvm_VirtualSystemSettingData";
pub const RESOURCE: &str = "Msvm_ResourceAllocationSettingData";
pub const STORAGE: &str = "Msvm_StorageAllocationSettingData";
pub const CONNECTION: &str = "Msvm_EthernetPortAllocationSettingData";
pub const SYNTHETIC: &str = "Msvm_SyntheticEthernetPortSettingData";
pub const VLAN: &str = "Msvm_EthernetSwitchPortVlanSettingData";

/// A GUID as Hyper-V writes it.
pub fn guid(number: u128) -> String {
    Uuid::from_u128(number).to_string().to_uppercase()
}

/// A VM or a planned one.
#[derive(Clone)]
pub struct System {
    pub id: Uuid,
    pub planned: bool,
    pub running: bool,
    pub settings: CimInstance,
    pub resources: Vec<CimInstance>,
}

impl System {
    pub fn name(&self) -> &str {
        self.settings.text("ElementName").unwrap()
    }

    pub fn prefix(&self) -> String {
        format!("Microsoft:{}", self.id.to_string().to_uppercase())
    }

    pub fn of_class<'a>(&'a self, class: &'a str) -> impl Iterator<Item = &'a CimInstance> {
        self.resources.iter().filter(move |one| one.class == class)
    }

    pub fn disk_files(&self) -> Vec<String> {
        let files = self.of_class(STORAGE).flat_map(|one| one.texts("HostResource").unwrap());
        files.map(str::to_owned).collect()
    }

    /// The boot sources of generation 2: disks and adapters, in the order they were added.
    pub fn boot_devices(&self) -> Vec<String> {
        let boots = |one: &&CimInstance| {
            one.class == SYNTHETIC || one.number::<u16>("ResourceType") == Ok(17)
        };
        self.resources
            .iter()
            .filter(boots)
            .map(|one| one.text("InstanceID").unwrap().to_owned())
            .collect()
    }

    fn is_second(&self) -> bool {
        self.settings.text("VirtualSystemSubType") == Ok("Microsoft:Hyper-V:SubType:2")
    }

    /// Keeps the boot order's entries in step with the devices, as the host does.
    pub fn refresh_boot_sources(&mut self) {
        if !self.is_second() {
            return;
        }
        let devices = self.boot_devices();
        let old = self.settings.texts("BootSourceOrder").unwrap_or_default();
        let mut order: Vec<String> = old.iter().map(|text| (*text).to_owned()).collect();
        order.retain(|source| devices.iter().any(|device| boot_source(device) == *source));
        for device in &devices {
            let source = boot_source(device);
            if !order.contains(&source) {
                order.push(source);
            }
        }
        self.settings.set("BootSourceOrder", CimValue::strings(order));
    }

    /// The system under another id, as an import with a new one makes it.
    pub fn with_id(&self, id: Uuid) -> Self {
        let (old, new) = (self.id.to_string().to_uppercase(), id.to_string().to_uppercase());
        let rename = |instance: &CimInstance| {
            let mut copy = instance.clone();
            for (_, value) in &mut copy.properties {
                *value = renamed(value, &old, &new);
            }
            copy.path = None;
            with_path(copy)
        };
        Self {
            id,
            settings: rename(&self.settings),
            resources: self.resources.iter().map(rename).collect(),
            ..self.clone()
        }
    }
}

fn renamed(value: &CimValue, old: &str, new: &str) -> CimValue {
    match value {
        CimValue::String(text) => CimValue::String(text.replace(old, new)),
        CimValue::Array(kind, items) => {
            CimValue::Array(*kind, items.iter().map(|item| renamed(item, old, new)).collect())
        }
        other => other.clone(),
    }
}

/// The class of boot sources.
const BOOT_SOURCE: &str = "Msvm_BootSourceSettingData";

/// The path of the boot source of a device.
fn boot_source(device: &str) -> String {
    path(BOOT_SOURCE, &format!(r"{device}\boot")).to_string()
}

/// The boot source of a device, with the path that the firmware knows it by.
fn boot_instance(system: &System, device: &str) -> CimInstance {
    let found = system.resources.iter().find(|one| one.text("InstanceID") == Ok(device)).unwrap();
    let firmware = match found.optional_reference("Parent").unwrap() {
        Some(parent) => {
            let controller =
                parent.key("InstanceID").unwrap().split('\\').nth(1).unwrap().to_owned();
            let controller = controller.replace('-', "");
            let lun = found.text("AddressOnParent").unwrap();
            format!(
                r"\AcpiEx(VMBus,0,0)\VenHw(9B17E5A2-0891-42DD-B653-80B5C22809BA,{controller})\Scsi(0,{lun})"
            )
        }
        None => format!(
            r"\AcpiEx(VMBus,0,0)\MAC({},0)",
            found.text("Address").unwrap_or("000000000000")
        ),
    };
    with_path(
        CimInstance::new(BOOT_SOURCE)
            .with("InstanceID", format!(r"{device}\boot"))
            .with("FirmwareDevicePath", firmware),
    )
}

pub fn path(class: &str, id: &str) -> ObjectPath {
    let mut path = ObjectPath::new(class, &[("InstanceID", id)]);
    path.host = Some(HOST.into());
    path
}

/// An instance with the path that its id gives.
pub fn with_path(mut instance: CimInstance) -> CimInstance {
    let id = instance.text("InstanceID").unwrap().to_owned();
    instance.path = Some(path(&instance.class, &id));
    instance
}

/// Builds VMs as an administrator would have made them.
pub struct SystemBuilder(pub System);

impl SystemBuilder {
    pub fn new(id: Uuid, name: &str, generation: u8) -> Self {
        let prefix = format!("Microsoft:{}", id.to_string().to_uppercase());
        let settings = CimInstance::new(SETTINGS)
            .with("InstanceID", prefix.as_str())
            .with("ElementName", name)
            .with("VirtualSystemIdentifier", id.to_string().to_uppercase())
            .with("VirtualSystemType", "Microsoft:Hyper-V:System:Realized")
            .with("VirtualSystemSubType", format!("Microsoft:Hyper-V:SubType:{generation}"))
            .with("Version", "10.0")
            .with("ConfigurationDataRoot", r"C:\Hyper-V")
            .with(
                "ConfigurationFile",
                format!(r"Virtual Machines\{}.vmcx", id.to_string().to_uppercase()),
            );
        let mut system = System {
            id,
            planned: false,
            running: false,
            settings: with_path(settings),
            resources: Vec::new(),
        };
        let memory = CimInstance::new("Msvm_MemorySettingData")
            .with("InstanceID", format!(r"{prefix}\4764334d-e001-4176-82ee-5594ec9b530e"))
            .with("ResourceType", CimValue::Uint16(4))
            .with("VirtualQuantity", CimValue::Uint64(1024))
            .with("Reservation", CimValue::Uint64(1024))
            .with("Limit", CimValue::Uint64(1024))
            .with("DynamicMemoryEnabled", false);
        let processor = CimInstance::new("Msvm_ProcessorSettingData")
            .with("InstanceID", format!(r"{prefix}\b637f346-6a0e-4dec-af52-bd70cb80a21d\0"))
            .with("ResourceType", CimValue::Uint16(3))
            .with("VirtualQuantity", CimValue::Uint64(1))
            .with("Limit", CimValue::Uint64(100_000));
        system.resources = vec![with_path(memory), with_path(processor)];
        if generation == 1 {
            for number in 0..2 {
                let id = format!(r"{prefix}\83f8638b-8dca-4152-9eda-2ca8b33039b4\{number}");
                system.resources.push(with_path(
                    CimInstance::new(RESOURCE)
                        .with("InstanceID", id)
                        .with("ResourceType", CimValue::Uint16(5))
                        .with("ResourceSubType", "Microsoft:Hyper-V:Emulated IDE Controller")
                        .with("Address", number.to_string()),
                ));
            }
        }
        Self(system)
    }

    pub fn scsi(mut self, number: u128) -> Self {
        let id = format!(r"{}\{}\0", self.0.prefix(), guid(number));
        self.0.resources.push(with_path(
            CimInstance::new(RESOURCE)
                .with("InstanceID", id)
                .with("ResourceType", CimValue::Uint16(6))
                .with("ResourceSubType", "Microsoft:Hyper-V:Synthetic SCSI Controller"),
        ));
        self
    }

    /// A drive of `kind` (17 disk, 16 DVD) on the controller with this end of its id, with `file` in it.
    pub fn drive(mut self, controller: &str, location: u32, kind: u16, file: Option<&str>) -> Self {
        let parent = format!(r"{}\{controller}", self.0.prefix());
        let id = format!(r"{parent}\{location}\D");
        let drive = if kind == 17 { "Synthetic Disk Drive" } else { "Synthetic DVD Drive" };
        self.0.resources.push(with_path(
            CimInstance::new(RESOURCE)
                .with("InstanceID", id.as_str())
                .with("ResourceType", CimValue::Uint16(kind))
                .with("ResourceSubType", format!("Microsoft:Hyper-V:{drive}"))
                .with("Parent", path(RESOURCE, &parent).to_string())
                .with("AddressOnParent", location.to_string()),
        ));
        if let Some(file) = file {
            let medium = if kind == 17 { "Virtual Hard Disk" } else { "Virtual CD/DVD Disk" };
            self.0.resources.push(with_path(
                CimInstance::new(STORAGE)
                    .with("InstanceID", format!(r"{parent}\{location}\L"))
                    .with("ResourceType", CimValue::Uint16(31))
                    .with("ResourceSubType", format!("Microsoft:Hyper-V:{medium}"))
                    .with("Parent", path(RESOURCE, &id).to_string())
                    .with("HostResource", CimValue::strings([file])),
            ));
        }
        self
    }

    pub fn adapter(
        mut self,
        number: u128,
        name: &str,
        mac: &str,
        is_static: bool,
        switch: Option<&str>,
    ) -> Self {
        let id = format!(r"{}\{}", self.0.prefix(), guid(number));
        self.0.resources.push(with_path(
            CimInstance::new(SYNTHETIC)
                .with("InstanceID", id.as_str())
                .with("ResourceType", CimValue::Uint16(10))
                .with("ResourceSubType", "Microsoft:Hyper-V:Synthetic Ethernet Port")
                .with("ElementName", name)
                .with("Address", mac)
                .with("StaticMacAddress", is_static),
        ));
        let connection = CimInstance::new(CONNECTION)
            .with("InstanceID", format!(r"{id}\C"))
            .with("ResourceType", CimValue::Uint16(33))
            .with("ResourceSubType", "Microsoft:Hyper-V:Ethernet Connection")
            .with("Parent", path(SYNTHETIC, &id).to_string())
            .with("LastKnownSwitchName", switch.unwrap_or_default())
            .with("EnabledState", CimValue::Uint16(if switch.is_some() { 2 } else { 3 }));
        self.0.resources.push(with_path(connection));
        self
    }

    pub fn build(mut self) -> System {
        self.0.refresh_boot_sources();
        self.0
    }
}

/// Classes without instances here.
const EMPTY: &[&str] = &["Msvm_EmulatedEthernetPortSettingData", "Msvm_SecuritySettingData", VLAN];

/// A service of the host.
fn service(class: &str) -> CimInstance {
    let mut path = ObjectPath::new(
        class,
        &[
            ("CreationClassName", class),
            ("Name", "vmms"),
            ("SystemCreationClassName", "Msvm_ComputerSystem"),
            ("SystemName", HOST),
        ],
    );
    path.host = Some(HOST.into());
    CimInstance { path: Some(path), ..CimInstance::new(class) }
}

fn computer_systems(state: &State) -> Vec<CimInstance> {
    let class = "Msvm_ComputerSystem";
    let host = CimInstance::new(class).with("Name", HOST).with("EnabledState", CimValue::Uint16(2));
    let vms = state.systems.iter().filter(|system| !system.planned).map(|system| {
        let name = system.id.to_string().to_uppercase();
        let mut path = ObjectPath::new(class, &[("CreationClassName", class), ("Name", &name)]);
        path.host = Some(HOST.into());
        let state = if system.running { 2 } else { 3 };
        let mut instance = CimInstance::new(class)
            .with("Name", name)
            .with("ElementName", system.name())
            .with("EnabledState", CimValue::Uint16(state));
        instance.path = Some(path);
        instance
    });
    std::iter::once(host).chain(vms).collect()
}

fn instances(state: &State, class: &str) -> Result<Vec<CimInstance>> {
    Ok(match class {
        "Msvm_VirtualSystemManagementService" | "Msvm_VirtualSystemReferencePointService" => {
            vec![service(class)]
        }
        "Msvm_VirtualSystemManagementServiceSettingData" => {
            vec![CimInstance::new(class).with("DefaultExternalDataRoot", r"C:\Hyper-V")]
        }
        "Msvm_ComputerSystem" => computer_systems(state),
        SETTINGS => {
            let own = state.systems.iter().map(|system| system.settings.clone());
            own.chain(state.checkpoints.iter().cloned()).collect()
        }
        "Msvm_VirtualEthernetSwitch" => state
            .switches
            .iter()
            .map(|(name, id)| {
                let keys = [("CreationClassName", class), ("Name", id.as_str())];
                let mut instance = CimInstance::new(class)
                    .with("ElementName", name.as_str())
                    .with("Name", id.as_str());
                instance.path = Some(ObjectPath::new(class, &keys));
                instance
            })
            .collect(),
        "Msvm_VirtualSystemReferencePoint" => state.points.clone(),
        BOOT_SOURCE => {
            let of = |system: &System| {
                let devices = if system.is_second() { system.boot_devices() } else { Vec::new() };
                devices.iter().map(|device| boot_instance(system, device)).collect::<Vec<_>>()
            };
            state.systems.iter().flat_map(of).collect()
        }
        _ => {
            let all = state.systems.iter().flat_map(|system| &system.resources);
            let found: Vec<_> = all.filter(|one| one.class == class).cloned().collect();
            let known = [
                RESOURCE,
                STORAGE,
                CONNECTION,
                SYNTHETIC,
                "Msvm_MemorySettingData",
                "Msvm_ProcessorSettingData",
            ];
            if found.is_empty() && !known.contains(&class) && !EMPTY.contains(&class) {
                return Err(vmtide_cim::CimError::Fault {
                    action: "a query".into(),
                    detail: format!("no class {class}"),
                    code: Some(0x8004_1010),
                });
            }
            found
        }
    })
}

/// `SELECT * FROM class [WHERE property = 'x' | property LIKE 'x%']`.
pub fn query(state: &State, wql: &str) -> Result<Vec<CimInstance>> {
    let rest = wql.strip_prefix("SELECT * FROM ").ok_or_else(|| fault(wql))?;
    let (class, condition) = match rest.split_once(" WHERE ") {
        Some((class, condition)) => (class, Some(condition)),
        None => (rest, None),
    };
    let found = instances(state, class)?;
    let Some(condition) = condition else { return Ok(found) };
    let (name, value, is_prefix) = match condition.split_once(" LIKE ") {
        Some((name, value)) => (name, value, true),
        None => {
            let (name, value) = condition.split_once('=').ok_or_else(|| fault(wql))?;
            (name, value, false)
        }
    };
    let value = value.strip_prefix('\'').and_then(|value| value.strip_suffix('\''));
    let mut plain = String::new();
    let mut characters = value.ok_or_else(|| fault(wql))?.chars();
    while let Some(c) = characters.next() {
        plain.push(if c == '\\' { characters.next().ok_or_else(|| fault(wql))? } else { c });
    }
    let fits = |one: &CimInstance| {
        let text = one.text(name).unwrap_or_default();
        if is_prefix {
            text.to_lowercase().starts_with(&plain.trim_end_matches('%').to_lowercase())
        } else {
            text.eq_ignore_ascii_case(&plain)
        }
    };
    Ok(found.into_iter().filter(fits).collect())
}

/// An instance as the transport delivers it.
pub fn answered(mut instance: CimInstance, manners: Manners) -> CimInstance {
    if manners.text {
        for (_, value) in &mut instance.properties {
            *value = as_text(value);
        }
    }
    instance
}

fn as_text(value: &CimValue) -> CimValue {
    match value {
        CimValue::Array(_, items) => match items.as_slice() {
            [one] => as_text(one),
            many => CimValue::Array(CimType::String, many.iter().map(as_text).collect()),
        },
        CimValue::Boolean(truth) => truth.to_string().into(),
        CimValue::Null => CimValue::Null,
        other => match other.as_u64() {
            Some(number) if !matches!(other, CimValue::String(_)) => number.to_string().into(),
            _ => other.clone(),
        },
    }
}
