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
    /// Defines the VM, with default devices only. Answers with it and warnings.
    ///
    /// A host does not take settings that its version does not know. So where it refuses them, the VM is defined
    /// with what all versions have, and then given all, or else those that it shows.
    pub fn define(&self) -> Result<(VmRecord, Vec<String>)> {
        let wanted = &self.hardware.system;
        let error = match self.define_with(wanted) {
            Ok(()) => return Ok((self.defined()?, Vec::new())),
            Err(error) if is_refusal(&error) && !wanted.properties.is_empty() => error,
            Err(error) => return Err(error),
        };
        tracing::info!(%error, "the host does not take all settings of the VM at once");
        self.define_with(&CimInstance::new(&wanted.class))?;
        let vm = self.defined()?;
        let set = |settings: &CimInstance| {
            let mut settings = settings.clone();
            settings.set("InstanceID", vm.settings.instance_id.as_str());
            self.management.modify_system(&settings, "give the VM its settings")
        };
        let mut warnings = Vec::new();
        if let Err(error) = set(wanted) {
            let (known, unknown) = split_known(wanted, &vm.settings.instance);
            if !is_refusal(&error) || unknown.is_empty() {
                return Err(error);
            }
            set(&known)?;
            warnings.push(not_known(&unknown));
        }
        Ok((self.management.host.vm(vm.id)?, warnings))
    }

    fn define_with(&self, settings: &CimInstance) -> Result<()> {
        let mut settings = settings.clone();
        settings.set("ElementName", self.name);
        let subtype = match self.hardware.generation {
            Generation::One => "Microsoft:Hyper-V:SubType:1",
            Generation::Two => "Microsoft:Hyper-V:SubType:2",
        };
        settings.set("VirtualSystemSubType", subtype);
        for root in ROOTS {
            settings.set(root, self.directory);
        }
        self.management.define(&settings)
    }

    /// The VM that was defined.
    fn defined(&self) -> Result<VmRecord> {
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
        let mut warnings = self.set_sizes(vm)?;
        let mut added = Added::new(self.management, vm)?;
        let controllers = self.add_controllers(&mut added)?;
        for (id, location) in &self.hardware.disks {
            self.add_disk(&mut added, &controllers, id, *location)?;
        }
        for location in &self.hardware.dvds {
            let drive = drive(self.management, &controllers, *location, DVD_DRIVE)?;
            added.add(&drive, "a DVD drive")?;
        }
        warnings.extend(self.add_adapters(&mut added)?);
        warnings.extend(boot::set_order(self.management, vm, self.hardware)?);
        Ok(warnings)
    }

    /// Memory and processors, which every VM has from the beginning. Answers with warnings.
    fn set_sizes(&self, vm: &VmRecord) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
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
            let set = |settings: &CimInstance| {
                let mut settings = settings.clone();
                settings.set("InstanceID", id);
                let what = "set memory and processors of the VM";
                self.management.modify_resources(std::slice::from_ref(&settings), what)
            };
            let Err(error) = set(wanted) else { continue };
            let (known, unknown) = split_known(wanted, present);
            if !is_refusal(&error) || unknown.is_empty() {
                return Err(error);
            }
            set(&known)?;
            warnings.push(not_known(&unknown));
        }
        Ok(warnings)
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
            warnings.extend(self.connect(added, &mut switches, adapter, &port)?);
        }
        Ok(warnings)
    }

    /// Connects an adapter where that is planned. One in a VLAN has a connection in any case, switched off, so
    /// that it is in its VLAN when somebody connects it. Answers with warnings.
    fn connect(
        &self,
        added: &mut Added<'_>,
        switches: &mut Switches,
        adapter: &Adapter,
        port: &ObjectPath,
    ) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        let switch = match &adapter.connect_to {
            Some(network) => {
                let found = switches.find(self.management, network)?;
                if found.is_none() {
                    warnings.push(switches.missing(&adapter.name, network));
                }
                found
            }
            None => None,
        };
        if switch.is_none() && adapter.vlan.is_none() {
            return Ok(warnings);
        }
        let connection = connection_settings(self.management, port, switch.as_ref());
        let what = format!("the connection of adapter {}", adapter.name);
        let connection = match added.add(&connection, &what) {
            Ok(connection) => connection,
            Err(error) if switch.is_none() && is_refusal(&error) => {
                warnings.push(format!(
                    "adapter {} was in a VLAN, which a host that takes no disconnected connection does not \
                     keep ({error}): set it before you connect it (Set-VMNetworkAdapterVlan)",
                    adapter.name
                ));
                return Ok(warnings);
            }
            Err(error) => return Err(error),
        };
        if let Some(feature) = &adapter.vlan {
            let what = format!("set the VLAN of adapter {}", adapter.name);
            self.management.add_feature(&connection, feature, &what)?;
        }
        Ok(warnings)
    }
}

/// Whether the host has refused something, and will not do it later.
fn is_refusal(error: &HypervisorError) -> bool {
    matches!(
        error,
        HypervisorError::Failed { .. }
            | HypervisorError::Unsupported { .. }
            | HypervisorError::NotFound { .. }
    )
}

/// The settings that `shown`, an instance of the host, has as well, and the names of those that it has not.
fn split_known(wanted: &CimInstance, shown: &CimInstance) -> (CimInstance, Vec<String>) {
    let is_known =
        |name: &str| shown.properties.iter().any(|(known, _)| known.eq_ignore_ascii_case(name));
    let mut known = CimInstance::new(&wanted.class);
    let mut unknown = Vec::new();
    for (name, value) in &wanted.properties {
        if is_known(name) {
            known.properties.push((name.clone(), value.clone()));
        } else {
            unknown.push(name.clone());
        }
    }
    (known, unknown)
}

fn not_known(names: &[String]) -> String {
    format!(
        "the host does not know {}: these settings of the VM are the host's defaults now",
        names.join(", ")
    )
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
