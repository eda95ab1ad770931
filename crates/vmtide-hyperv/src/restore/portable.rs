//! The portable route: a VM is defined anew, and its devices are added one by one, as a person would. Works
//! across versions of Hyper-V and from other platforms; the host gives the VM a new id.
//!
//! Devices are told apart by what the host answers, and where it does not name what it made (an answer
//! that came by a job), by what is there now and was not before.

use super::boot;
use super::hardware::{Adapter, Hardware};
use super::management::Management;
use super::network::{Switches, adapter_settings, connection_settings};
use crate::host::{from_cim, path_of};
use crate::model::disks::controllers;
use crate::model::read::guid;
use crate::model::types::{ControllerKind, DiskLocation, Generation, VmRecord};
use std::collections::BTreeMap;
use vmtide_cim::{CimInstance, CimValue, ObjectPath};
use vmtide_hypervisor::{DiskId, HypervisorError, Result};

/// `Msvm_ResourceAllocationSettingData`: controllers and drives.
const RESOURCE: &str = "Msvm_ResourceAllocationSettingData";
/// `Msvm_StorageAllocationSettingData`: what is in a drive.
const STORAGE: &str = "Msvm_StorageAllocationSettingData";

/// `ResourceType` of SCSI controllers.
const SCSI_CONTROLLER: u16 = 6;
/// `ResourceType` of DVD drives.
const DVD_DRIVE: u16 = 16;
/// `ResourceType` of disk drives.
const DISK_DRIVE: u16 = 17;
/// `ResourceType` of what is in a drive.
pub(super) const LOGICAL_DISK: u16 = 31;

/// `ResourceSubType` of a virtual hard disk in a drive.
pub(super) const VIRTUAL_HARD_DISK: &str = "Microsoft:Hyper-V:Virtual Hard Disk";

/// Defines VMs.
pub(super) struct Portable<'a> {
    pub management: &'a Management<'a>,
    pub hardware: &'a Hardware,
    /// The file of each disk.
    pub files: &'a BTreeMap<DiskId, String>,
    /// The directory of the VM.
    pub directory: &'a str,
    /// The name until it is complete.
    pub name: &'a str,
}

impl Portable<'_> {
    /// Defines the VM, with default devices only.
    pub fn define(&self) -> Result<VmRecord> {
        let mut settings = self.hardware.system.clone();
        settings.set("ElementName", self.name);
        let subtype = match self.hardware.generation {
            Generation::One => "Microsoft:Hyper-V:SubType:1",
            Generation::Two => "Microsoft:Hyper-V:SubType:2",
        };
        settings.set("VirtualSystemSubType", subtype);
        for root in ROOTS {
            settings.set(root, self.directory);
        }
        self.management.define(&settings)?;
        let vms = self.management.host.vms()?;
        vms.into_iter().find(|vm| vm.name == self.name).ok_or_else(|| {
            HypervisorError::protocol(
                self.management.host.peer(),
                "the VM that was defined is not there",
            )
        })
    }

    /// Gives the VM all its devices. Answers with warnings.
    pub fn equip(&self, vm: &VmRecord) -> Result<Vec<String>> {
        self.set_sizes(vm)?;
        let mut added = Added::new(self.management, vm)?;
        let controllers = self.add_controllers(&mut added)?;
        for (id, location) in &self.hardware.disks {
            self.add_disk(&mut added, &controllers, id, *location)?;
        }
        for location in &self.hardware.dvds {
            let drive = drive(self.management, &controllers, *location, DVD_DRIVE)?;
            added.add(&drive, "a DVD drive")?;
        }
        let mut warnings = self.add_adapters(&mut added)?;
        warnings.extend(boot::set_order(self.management, vm, self.hardware)?);
        Ok(warnings)
    }

    /// Memory and processors, which every VM has from the beginning.
    fn set_sizes(&self, vm: &VmRecord) -> Result<()> {
        let mut changed = Vec::new();
        for wanted in [&self.hardware.memory, &self.hardware.processor] {
            if wanted.properties.is_empty() {
                continue;
            }
            let present = self.management.host.resources_of_class(&vm.settings, &wanted.class)?;
            let present = present.first().ok_or_else(|| {
                HypervisorError::protocol(
                    self.management.host.peer(),
                    format!("a new VM has no {}", wanted.class),
                )
            })?;
            let id = present.text("InstanceID").map_err(from_cim)?;
            let mut settings = CimInstance::new(&wanted.class).with("InstanceID", id);
            settings.properties.extend(wanted.properties.iter().cloned());
            changed.push(settings);
        }
        self.management.modify_resources(&changed, "set memory and processors of the VM")
    }

    /// All controllers by kind and number; IDE ones are there, SCSI ones are made. They are numbered as a
    /// backup numbers them, which is not the order they were made in.
    fn add_controllers(&self, added: &mut Added<'_>) -> Result<Controllers> {
        let read = || self.management.host.resources_of_class(&added.vm.settings, RESOURCE);
        let is_scsi = |one: &CimInstance| one.number::<u16>("ResourceType") == Ok(SCSI_CONTROLLER);
        let present = read()?.iter().filter(|one| is_scsi(one)).count();
        for number in present..self.hardware.scsi_controllers as usize {
            let controller = CimInstance::new(RESOURCE)
                .with("ResourceType", CimValue::Uint16(SCSI_CONTROLLER))
                .with("ResourceSubType", "Microsoft:Hyper-V:Synthetic SCSI Controller");
            added.add(&controller, &format!("SCSI controller {number}"))?;
        }
        let devices = self.management.host.resources_of_class(&added.vm.settings, RESOURCE)?;
        let numbers = controllers(&devices)?;
        let mut found = Controllers::new();
        for device in &devices {
            let id = device.text("InstanceID").map_err(from_cim)?.to_ascii_lowercase();
            if let Some(place) = numbers.get(&id) {
                found.insert(*place, path_of(device, &["InstanceID"])?);
            }
        }
        Ok(found)
    }

    /// A drive with the disk in it.
    fn add_disk(
        &self,
        added: &mut Added<'_>,
        controllers: &Controllers,
        id: &DiskId,
        location: DiskLocation,
    ) -> Result<()> {
        let file = self.files.get(id).ok_or_else(|| {
            HypervisorError::failed("attach a disk", format!("disk {id} has no file"))
        })?;
        let drive = drive(self.management, controllers, location, DISK_DRIVE)?;
        let drive = added.add(&drive, &format!("the drive of disk {id}"))?;
        let disk = CimInstance::new(STORAGE)
            .with("ResourceType", CimValue::Uint16(LOGICAL_DISK))
            .with("ResourceSubType", VIRTUAL_HARD_DISK)
            .with("HostResource", CimValue::strings([file.as_str()]))
            .with("Parent", self.management.text_of(&drive));
        added.add(&disk, &format!("disk {id}")).map(drop)
    }

    fn add_adapters(&self, added: &mut Added<'_>) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        let mut switches = Switches::default();
        for adapter in &self.hardware.adapters {
            let port =
                added.add(&adapter_settings(adapter), &format!("adapter {}", adapter.name))?;
            if let Err(warning) = self.connect(added, &mut switches, adapter, &port)? {
                warnings.push(warning);
            }
        }
        Ok(warnings)
    }

    /// Connects an adapter where that is planned. The inner error says why it stays disconnected.
    fn connect(
        &self,
        added: &mut Added<'_>,
        switches: &mut Switches,
        adapter: &Adapter,
        port: &ObjectPath,
    ) -> Result<Result<(), String>> {
        let Some(network) = &adapter.connect_to else { return Ok(Ok(())) };
        let Some(switch) = switches.find(self.management, network)? else {
            return Ok(Err(switches.missing(&adapter.name, network)));
        };
        let connection = connection_settings(self.management, port, &switch);
        let connection =
            added.add(&connection, &format!("the connection of adapter {}", adapter.name))?;
        if let Some(feature) = &adapter.vlan {
            let what = format!("set the VLAN of adapter {}", adapter.name);
            self.management.add_feature(&connection, feature, &what)?;
        }
        Ok(Ok(()))
    }
}

/// Where a VM keeps its files.
pub(super) const ROOTS: [&str; 4] =
    ["ConfigurationDataRoot", "SnapshotDataRoot", "SuspendDataRoot", "SwapFileDataRoot"];

/// Controllers by kind and number.
type Controllers = BTreeMap<(ControllerKind, u32), ObjectPath>;

/// The settings of a drive of `kind` at `location`.
fn drive(
    management: &Management<'_>,
    controllers: &Controllers,
    location: DiskLocation,
    kind: u16,
) -> Result<CimInstance> {
    let DiskLocation { controller, controller_number, location } = location;
    let parent = controllers.get(&(controller, controller_number)).ok_or_else(|| {
        HypervisorError::failed(
            "attach a drive",
            format!("the new VM has no {controller:?} controller {controller_number}"),
        )
    })?;
    let subtype = if kind == DVD_DRIVE {
        "Microsoft:Hyper-V:Synthetic DVD Drive"
    } else {
        "Microsoft:Hyper-V:Synthetic Disk Drive"
    };
    Ok(CimInstance::new(RESOURCE)
        .with("ResourceType", CimValue::Uint16(kind))
        .with("ResourceSubType", subtype)
        .with("Parent", management.text_of(parent))
        .with("AddressOnParent", location.to_string()))
}

/// Adds resources to one VM and knows what came of each.
pub(super) struct Added<'a> {
    management: &'a Management<'a>,
    vm: &'a VmRecord,
    /// The `InstanceID`s known per class.
    known: BTreeMap<String, Vec<String>>,
}

impl<'a> Added<'a> {
    fn new(management: &'a Management<'a>, vm: &'a VmRecord) -> Result<Self> {
        let mut added = Self { management, vm, known: BTreeMap::new() };
        // What the host made by itself.
        for class in [RESOURCE, STORAGE] {
            let instances = management.host.resources_of_class(&vm.settings, class)?;
            added.note(class, &instances);
        }
        Ok(added)
    }

    fn note(&mut self, class: &str, instances: &[CimInstance]) {
        let ids = instances.iter().filter_map(|one| one.text("InstanceID").ok());
        self.known.entry(class.to_owned()).or_default().extend(ids.map(str::to_owned));
    }

    /// Adds `resource`. Answers with its path.
    fn add(&mut self, resource: &CimInstance, what: &str) -> Result<ObjectPath> {
        let known = self.known.entry(resource.class.clone()).or_default();
        let named = self.management.add(&self.vm.settings.path, resource, what)?;
        // A job's results may name what was there before, as the controller of a drive.
        let id = named.as_ref().and_then(|path| path.key("InstanceID"));
        if let (Some(path), Some(id)) = (&named, id)
            && !known.iter().any(|old| old == id)
        {
            known.push(id.to_owned());
            return Ok(path.clone());
        }
        let present =
            self.management.host.resources_of_class(&self.vm.settings, &resource.class)?;
        let is_new = |one: &CimInstance| {
            one.text("InstanceID").is_ok_and(|id| !known.iter().any(|old| old == id))
        };
        let mut new = present.into_iter().filter(is_new);
        let (Some(instance), None) = (new.next(), new.next()) else {
            return Err(HypervisorError::protocol(
                self.management.host.peer(),
                format!("{what} of VM {} was added and cannot be found", guid(self.vm.id)),
            ));
        };
        known.push(instance.text("InstanceID").map_err(from_cim)?.to_owned());
        path_of(&instance, &["InstanceID"])
    }
}
