//! VMs for tests.

use crate::images::NewImage;
use crate::services::snapshot::PHYSICAL_DRIVE;
use crate::state::{Configuration, Resource, State, Vm, Vss, guid};
use crate::world::World;
use std::collections::BTreeMap;
use uuid::Uuid;
use vmtide_cim::{CimInstance, CimType, CimValue};
use vmtide_image::Format;

/// A VM to be made.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// `ElementName`.
    pub name: String,
    /// The id; none for any.
    pub id: Option<Uuid>,
    /// 1 or 2.
    pub generation: u8,
    /// The version of the configuration, e.g. `10.0`.
    pub version: String,
    /// Whether it is running.
    pub running: bool,
    /// The disks.
    pub disks: Vec<DiskSpec>,
    /// The network adapters.
    pub adapters: Vec<AdapterSpec>,
    /// The state of VSS in the guest.
    pub vss: Vss,
    /// Whether the guest answers over the integration services.
    pub kvp: bool,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Virtual processors.
    pub processors: u64,
    /// The directory of the VM, as the host names it.
    pub directory: String,
    /// `Notes`.
    pub notes: Vec<String>,
}

/// A disk to be made.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// What it is.
    pub kind: DiskKind,
    /// The size in bytes.
    pub size_bytes: u64,
    /// Whether it hangs on an IDE controller (generation 1), not on a SCSI controller.
    pub ide: bool,
    /// The number of the controller.
    pub controller: u32,
    /// The location on it.
    pub location: u32,
    /// The block size of the file in bytes.
    pub block_bytes: u32,
    /// 512 or 4096.
    pub logical_sector_bytes: u32,
    /// Whether the allocation says that VMs share it.
    pub shared: bool,
    /// The id in the file, as of a copy of another disk; none for one of its own.
    pub disk_id: Option<Uuid>,
}

/// The kinds of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskKind {
    /// A VHDX file.
    Vhdx,
    /// A VHD file, which is not tracked.
    Vhd,
    /// A VHD set, which no checkpoint of a VM holds.
    VhdSet,
    /// A physical disk of the host.
    PassThrough,
}

/// A network adapter to be made.
#[derive(Clone, Debug)]
pub struct AdapterSpec {
    /// `ElementName`.
    pub name: String,
    /// 12 hexadecimal digits, and whether the address is static.
    pub mac: (String, bool),
    /// The switch it is connected to; none for one that is not connected.
    pub switch: Option<String>,
    /// The VLAN, where it has one.
    pub vlan: Option<u16>,
}

impl VmSpec {
    /// A running VM of generation 2 with VHDX disks of these sizes on one SCSI controller, and one adapter.
    pub fn new(name: &str, disk_bytes: &[u64]) -> Self {
        let disks = (0..).zip(disk_bytes).map(|(location, size)| DiskSpec::scsi(location, *size));
        Self {
            name: name.to_owned(),
            id: None,
            generation: 2,
            version: "10.0".into(),
            running: true,
            disks: disks.collect(),
            adapters: vec![AdapterSpec {
                name: "Network Adapter".into(),
                mac: ("00155D010203".into(), false),
                switch: Some("External".into()),
                vlan: None,
            }],
            vss: Vss::Works,
            kvp: true,
            memory_mib: 2048,
            processors: 2,
            directory: format!(r"C:\VMs\{name}"),
            notes: Vec::new(),
        }
    }
}

impl DiskSpec {
    /// A VHDX file on the first SCSI controller.
    pub const fn scsi(location: u32, size_bytes: u64) -> Self {
        Self {
            kind: DiskKind::Vhdx,
            size_bytes,
            ide: false,
            controller: 0,
            location,
            block_bytes: 1 << 20,
            logical_sector_bytes: 512,
            shared: false,
            disk_id: None,
        }
    }
}

/// `InstanceID` of the IDE controllers of all VMs.
pub(crate) const IDE_CONTROLLER: &str = "83F8638B-8DCA-4152-9EDA-2CA8B33039B4";

pub(crate) fn resource(class: &str, suffix: String, parent: Option<&str>) -> Resource {
    Resource {
        class: class.to_owned(),
        suffix,
        parent: parent.map(str::to_owned),
        values: CimInstance::new(class),
    }
}

fn kind(resource: Resource, number: u16, subtype: &str, name: &str) -> Resource {
    resource
        .set("ResourceType", CimValue::Uint16(number))
        .set("ResourceSubType", format!("Microsoft:Hyper-V:{subtype}"))
        .set("ElementName", name)
}

impl Resource {
    fn set(mut self, name: &str, value: impl Into<CimValue>) -> Self {
        self.values.set(name, value);
        self
    }
}

impl World {
    /// Makes a virtual switch.
    pub fn add_switch(&self, name: &str) -> Uuid {
        let mut state = self.lock();
        let known = state.switches.iter().find(|(_, known)| *known == name).map(|(id, _)| *id);
        known.unwrap_or_else(|| {
            let id = state.random.guid();
            state.switches.insert(id, name.to_owned());
            id
        })
    }

    /// Makes a VM with its files.
    pub fn add_vm(&self, spec: &VmSpec) -> Uuid {
        let switches: BTreeMap<String, Uuid> = spec
            .adapters
            .iter()
            .filter_map(|adapter| adapter.switch.clone())
            .map(|name| (name.clone(), self.add_switch(&name)))
            .collect();
        let mut state = self.lock();
        let id = spec.id.unwrap_or_else(|| state.random.guid());
        let mut resources = base_resources(spec);
        state.add_controllers(spec, &mut resources);
        for disk in &spec.disks {
            state.add_disk_resources(id, spec, disk, &mut resources);
        }
        for adapter in &spec.adapters {
            state.add_adapter(adapter, &switches, &mut resources);
        }
        let configuration =
            Configuration { settings: settings_of(spec, id, state.unix_s()), resources };
        let vm = Vm {
            id,
            planned: false,
            state: if spec.running { 2 } else { 3 },
            configuration,
            vss: spec.vss,
            kvp: spec.kvp,
            merges_off: false,
            guest_networks: BTreeMap::new(),
            last_applied: None,
            current_parent: None,
        };
        state.write_vm_files(&vm).expect("the configuration of the VM");
        state.vms.insert(id, vm);
        id
    }

    /// Makes a disk and attaches it to a VM, as an administrator does while it runs.
    pub fn attach_disk(&self, vm: Uuid, disk: &DiskSpec) {
        self.lock().attach_disk(vm, disk);
    }
}

fn settings_of(spec: &VmSpec, id: Uuid, unix_s: u64) -> CimInstance {
    let file = format!(r"Virtual Machines\{}", guid(id));
    let mut settings = CimInstance::new("Msvm_VirtualSystemSettingData")
        .with("Caption", "Virtual Machine Settings")
        .with("Description", "Active settings for the virtual machine")
        .with("ElementName", spec.name.as_str())
        .with("VirtualSystemType", "Microsoft:Hyper-V:System:Realized")
        .with("VirtualSystemSubType", format!("Microsoft:Hyper-V:SubType:{}", spec.generation))
        .with("Version", spec.version.as_str())
        .with("Notes", crate::services::system::strings(spec.notes.clone()))
        .with("CreationTime", crate::instances::timestamp(unix_s))
        .with("ConfigurationID", guid(id))
        .with("ConfigurationDataRoot", spec.directory.as_str())
        .with("ConfigurationFile", format!("{file}.vmcx"))
        .with("SnapshotDataRoot", spec.directory.as_str())
        .with("SuspendDataRoot", spec.directory.as_str())
        .with("SwapFileDataRoot", spec.directory.as_str())
        .with("LogDataRoot", spec.directory.as_str())
        .with("UserSnapshotType", CimValue::Uint16(3))
        .with("AutomaticStartupAction", CimValue::Uint16(3))
        .with("AutomaticShutdownAction", CimValue::Uint16(3))
        .with("IncrementalBackupEnabled", true)
        .with("IsAutomaticSnapshot", false)
        .with("BIOSNumLock", false)
        .with("BIOSGUID", format!("{{{}}}", guid(id)));
    if spec.generation == 2 {
        settings.set("GuestStateDataRoot", spec.directory.as_str());
        settings.set("GuestStateFile", format!("{file}.vmgs"));
        settings.set("SecureBootEnabled", true);
        settings.set("SecureBootTemplateId", "1734c6e8-3154-4dda-ba5f-a874cc483422");
    } else {
        let order = [1, 2, 3, 0].map(CimValue::Uint16).to_vec();
        settings.set("BootOrder", CimValue::Array(CimType::Uint16, order));
    }
    settings
}

/// Processor, memory, security and integration services.
fn base_resources(spec: &VmSpec) -> Vec<Resource> {
    let processor = resource(
        "Msvm_ProcessorSettingData",
        r"b637f346-6a0e-4dec-af52-bd70cb80a21d\0".into(),
        None,
    );
    let memory =
        resource("Msvm_MemorySettingData", "4764334d-e001-4176-82ee-5594ec9b530e".into(), None);
    let quantity = |value: u64| CimValue::Uint64(value);
    vec![
        kind(processor, 3, "Processor", "Processor")
            .set("VirtualQuantity", quantity(spec.processors))
            .set("Reservation", quantity(0))
            .set("Limit", quantity(100_000))
            .set("Weight", CimValue::Uint32(100)),
        kind(memory, 4, "Memory", "Memory")
            .set("VirtualQuantity", quantity(spec.memory_mib))
            .set("Reservation", quantity(spec.memory_mib / 2))
            .set("Limit", quantity(spec.memory_mib * 2))
            .set("DynamicMemoryEnabled", true)
            .set("TargetMemoryBuffer", CimValue::Uint32(20)),
        resource("Msvm_SecuritySettingData", "b56ab9e4-0000-4000-8000-000000000000".into(), None)
            .set("TpmEnabled", false)
            .set("ShieldingRequested", false),
        resource(
            "Msvm_VssComponentSettingData",
            "5CED1297-4598-4915-A5FC-AD21BB4D02A4".into(),
            None,
        )
        .set("ElementName", "VSS")
        .set("EnabledState", CimValue::Uint16(2)),
    ]
}

impl State {
    /// Makes a disk and attaches it to a VM.
    pub(crate) fn attach_disk(&mut self, vm: Uuid, disk: &DiskSpec) {
        let configuration = self.vms[&vm].configuration.clone();
        let mut spec = VmSpec::new(configuration.text("ElementName"), &[]);
        configuration.text("ConfigurationDataRoot").clone_into(&mut spec.directory);
        spec.name = format!("{}-{}", spec.name, self.number());
        let mut resources = configuration.resources;
        self.add_disk_resources(vm, &spec, disk, &mut resources);
        let found = self.vms.get_mut(&vm).expect("the VM is there");
        found.configuration.resources = resources;
    }

    /// The controllers that the disks of a VM need.
    fn add_controllers(&mut self, spec: &VmSpec, resources: &mut Vec<Resource>) {
        if spec.generation == 1 {
            for number in 0..2 {
                let suffix = format!(r"{IDE_CONTROLLER}\{number}");
                let controller = resource("Msvm_ResourceAllocationSettingData", suffix, None);
                let name = format!("IDE Controller {number}");
                let controller = kind(controller, 5, "Emulated IDE Controller", &name);
                resources.push(controller.set("Address", number.to_string()));
            }
        }
        let last = spec.disks.iter().filter(|disk| !disk.ide).map(|disk| disk.controller).max();
        // SCSI controllers are numbered in the order of their ids.
        let mut ids: Vec<String> =
            (0..last.map_or(0, |last| last + 1)).map(|_| guid(self.random.guid())).collect();
        ids.sort();
        for id in ids {
            let suffix = format!(r"{id}\0");
            let controller = resource("Msvm_ResourceAllocationSettingData", suffix, None);
            resources.push(kind(controller, 6, "Synthetic SCSI Controller", "SCSI Controller"));
        }
    }

    fn add_disk_resources(
        &mut self,
        vm: Uuid,
        spec: &VmSpec,
        disk: &DiskSpec,
        resources: &mut Vec<Resource>,
    ) {
        let wanted = if disk.ide { 5 } else { 6 };
        let mut controllers: Vec<String> = resources
            .iter()
            .filter(|r| r.values.value("ResourceType").and_then(CimValue::as_u64) == Some(wanted))
            .map(|r| r.suffix.clone())
            .collect();
        controllers.sort();
        let controller = controllers.get(usize::try_from(disk.controller).unwrap_or(usize::MAX));
        let controller = controller.expect("the VM has that controller").clone();
        let (location, suffix) =
            (disk.location, |end| format!(r"{controller}\{}\{end}", disk.location));
        let drive = resource("Msvm_ResourceAllocationSettingData", suffix("D"), Some(&controller))
            .set("AddressOnParent", location.to_string());
        let directory = format!(r"{}\Virtual Hard Disks", spec.directory);
        let place = if disk.ide { "ide" } else { "scsi" };
        let path = |end: &str| {
            format!(r"{directory}\{}-{place}{}-{location}.{end}", spec.name, disk.controller)
        };
        let format = match disk.kind {
            DiskKind::PassThrough => {
                resources.push(self.physical_drive(drive));
                return;
            }
            DiskKind::VhdSet => None,
            DiskKind::Vhdx => Some((Format::Vhdx, path("vhdx"))),
            DiskKind::Vhd => Some((Format::Vhd, path("vhd"))),
        };
        resources.push(kind(drive, 17, "Synthetic Disk Drive", "Hard Drive"));
        let path = match format {
            Some((format, path)) => {
                let new = NewImage {
                    format,
                    size_bytes: disk.size_bytes,
                    block_bytes: disk.block_bytes,
                    logical_sector_bytes: disk.logical_sector_bytes,
                    physical_sector_bytes: 4096,
                    fixed: false,
                    disk_id: Some(disk.disk_id.unwrap_or_else(|| self.random.guid())),
                };
                self.new_disk(&path, &new).expect("the disk of the VM");
                path
            }
            None => {
                let path = path("vhds");
                std::fs::create_dir_all(self.own(&directory)).expect("the directory of the VM");
                std::fs::write(self.own(&path), b"stand-in of a VHD set").expect("the VHD set");
                path
            }
        };
        self.note(format!("disk {path} of {}", guid(vm)));
        let allocation =
            resource("Msvm_StorageAllocationSettingData", suffix("L"), Some(&suffix("D")));
        let allocation = kind(allocation, 31, "Virtual Hard Disk", "Hard Disk Image");
        let shared = disk.shared || disk.kind == DiskKind::VhdSet;
        resources.push(
            allocation
                .set("HostResource", CimValue::strings([path]))
                .set("PersistentReservationsSupported", shared)
                .set("Access", CimValue::Uint16(3)),
        );
    }

    /// A drive that is the first physical disk of the host.
    fn physical_drive(&self, drive: Resource) -> Resource {
        let host = self.options.host_name.clone();
        let keys = [
            ("CreationClassName", "Msvm_DiskDrive"),
            ("DeviceID", &format!(r"Microsoft:{host}\0")),
            ("SystemCreationClassName", "Msvm_ComputerSystem"),
            ("SystemName", &host),
        ];
        let path = self.path("Msvm_DiskDrive", &keys).to_string();
        drive
            .set("ResourceType", CimValue::Uint16(17))
            .set("ResourceSubType", PHYSICAL_DRIVE)
            .set("ElementName", "Hard Drive")
            .set("HostResource", CimValue::strings([path]))
    }

    fn add_adapter(
        &mut self,
        adapter: &AdapterSpec,
        switches: &BTreeMap<String, Uuid>,
        resources: &mut Vec<Resource>,
    ) {
        let id = guid(self.random.guid());
        let port = resource("Msvm_SyntheticEthernetPortSettingData", id.clone(), None);
        resources.push(
            kind(port, 10, "Synthetic Ethernet Port", &adapter.name)
                .set("Address", adapter.mac.0.as_str())
                .set("StaticMacAddress", adapter.mac.1)
                .set("VirtualSystemIdentifiers", CimValue::strings([format!("{{{id}}}")])),
        );
        let suffix = format!(r"{id}\C");
        let connection =
            resource("Msvm_EthernetPortAllocationSettingData", suffix.clone(), Some(&id));
        let mut connection =
            kind(connection, 33, "Ethernet Connection", "Dynamic Ethernet Switch Port").set(
                "EnabledState",
                CimValue::Uint16(if adapter.switch.is_some() { 2 } else { 3 }),
            );
        if let Some(name) = &adapter.switch {
            let switch = guid(switches[name]);
            let class = "Msvm_VirtualEthernetSwitch";
            let path = self.path(class, &[("CreationClassName", class), ("Name", &switch)]);
            connection = connection
                .set("HostResource", CimValue::strings([path.to_string()]))
                .set("LastKnownSwitchName", name.as_str());
        }
        resources.push(connection);
        if let Some(vlan) = adapter.vlan {
            let feature = format!(r"{suffix}\952C5004-4465-451C-8CB8-FA9AB382B773");
            resources.push(
                resource("Msvm_EthernetSwitchPortVlanSettingData", feature, Some(&suffix))
                    .set("OperationMode", CimValue::Uint32(1))
                    .set("AccessVlanId", CimValue::Uint16(vlan)),
            );
        }
    }
}
