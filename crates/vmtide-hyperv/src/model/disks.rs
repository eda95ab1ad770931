//! Resources of a VM or a checkpoint, and its disks among them.

use super::types::{ControllerKind, DiskAttachment, DiskLocation, VmSettings};
use crate::Host;
use crate::host::{from_cim, path_of};
use std::collections::HashMap;
use vmtide_cim::{CimInstance, ObjectPath, wql};
use vmtide_hypervisor::{HypervisorError, Result};

/// `ResourceType` of the resources that disks consist of.
mod resource_type {
    pub(super) const IDE_CONTROLLER: u16 = 5;
    pub(super) const SCSI_CONTROLLER: u16 = 6;
    pub(super) const DISK_DRIVE: u16 = 17;
    pub(super) const STORAGE_EXTENT: u16 = 31;
}

/// `ResourceSubType` of a virtual disk.
const VIRTUAL_HARD_DISK: &str = "Microsoft:Hyper-V:Virtual Hard Disk";

/// `ResourceSubType` of the drive of a pass-through disk.
const PHYSICAL_DRIVE: &str = "Microsoft:Hyper-V:Physical Disk Drive";

/// The classes of the resources of a VM. Each is asked for by its own name: whether a query for a class
/// also finds those made of it depends on the transport. Classes that the host's Windows does not know
/// have no instances.
const RESOURCE_CLASSES: [&str; 25] = [
    "Msvm_ProcessorSettingData",
    "Msvm_MemorySettingData",
    "Msvm_SecuritySettingData",
    "Msvm_ResourceAllocationSettingData",
    "Msvm_StorageAllocationSettingData",
    "Msvm_SyntheticEthernetPortSettingData",
    "Msvm_EmulatedEthernetPortSettingData",
    "Msvm_EthernetPortAllocationSettingData",
    "Msvm_EthernetSwitchPortVlanSettingData",
    "Msvm_EthernetSwitchPortSecuritySettingData",
    "Msvm_EthernetSwitchPortBandwidthSettingData",
    "Msvm_EthernetSwitchPortOffloadSettingData",
    "Msvm_GuestNetworkAdapterConfiguration",
    "Msvm_SerialPortSettingData",
    "Msvm_SyntheticFcPortSettingData",
    "Msvm_FcPortAllocationSettingData",
    "Msvm_SyntheticDisplayControllerSettingData",
    "Msvm_ShutdownComponentSettingData",
    "Msvm_TimeSyncComponentSettingData",
    "Msvm_HeartbeatComponentSettingData",
    "Msvm_KvpExchangeComponentSettingData",
    "Msvm_VssComponentSettingData",
    "Msvm_GuestServiceInterfaceComponentSettingData",
    "Msvm_RdvComponentSettingData",
    "Msvm_BootSourceSettingData",
];

impl Host {
    /// The instances of one class of resources that belong to a VM or a checkpoint; none where the host
    /// does not know the class.
    ///
    /// # Errors
    /// As [`from_cim`] says.
    pub fn resources_of_class(
        &self,
        settings: &VmSettings,
        class: &str,
    ) -> Result<Vec<CimInstance>> {
        // The id of every resource begins with that of its settings.
        let owner = settings.instance_id.as_str();
        let found = self.query_if_known(&format!(
            "SELECT * FROM {class} WHERE InstanceID LIKE {}",
            wql::quote_prefix(owner)
        ))?;
        let belongs = |instance: &CimInstance| {
            let id = instance.text("InstanceID").unwrap_or_default();
            let (start, rest) = (id.get(..owner.len()), id.get(owner.len()..));
            start.is_some_and(|start| start.eq_ignore_ascii_case(owner))
                && rest.is_some_and(|rest| rest.starts_with('\\'))
        };
        Ok(found.unwrap_or_default().into_iter().filter(belongs).collect())
    }

    /// All resources of a VM or a checkpoint of the classes that its configuration consists of, class
    /// by class.
    ///
    /// # Errors
    /// As [`from_cim`] says.
    pub fn resources(&self, settings: &VmSettings) -> Result<Vec<CimInstance>> {
        let mut all = Vec::new();
        for class in RESOURCE_CLASSES {
            all.append(&mut self.resources_of_class(settings, class)?);
        }
        Ok(all)
    }

    /// The disks of a VM or a checkpoint, pass-through ones too, by their locations. Drives without a disk
    /// are left out, and so are DVD and diskette drives.
    ///
    /// # Errors
    /// [`HypervisorError::Protocol`] where a disk's drive or controller is not among the resources, or as
    /// [`from_cim`] says.
    pub fn disks(&self, settings: &VmSettings) -> Result<Vec<DiskAttachment>> {
        let devices = self.resources_of_class(settings, "Msvm_ResourceAllocationSettingData")?;
        let extents = self.resources_of_class(settings, "Msvm_StorageAllocationSettingData")?;
        attachments(&devices, &extents)
    }
}

/// The disks among the devices (controllers, drives) and storage extents of a VM.
pub(crate) fn attachments(
    devices: &[CimInstance],
    extents: &[CimInstance],
) -> Result<Vec<DiskAttachment>> {
    let places = Places::new(devices)?;
    let mut disks = Vec::new();
    for extent in extents {
        let kind: Option<u16> = extent.optional_number("ResourceType").map_err(from_cim)?;
        let subtype = extent.optional_text("ResourceSubType").map_err(from_cim)?;
        if kind != Some(resource_type::STORAGE_EXTENT) || subtype != Some(VIRTUAL_HARD_DISK) {
            continue;
        }
        let Some(host_resource) = host_resource(extent)? else {
            continue;
        };
        let drive = parent(extent)?.ok_or_else(|| broken(extent, "names no drive"))?;
        let shared = extent.optional_bool("PersistentReservationsSupported").map_err(from_cim)?;
        disks.push(DiskAttachment {
            instance_id: extent.text("InstanceID").map_err(from_cim)?.to_owned(),
            path: path_of(extent, &["InstanceID"])?,
            host_resource,
            location: places
                .of_drive(&drive)
                .ok_or_else(|| broken(extent, "has no known drive"))?,
            pass_through: false,
            shared: shared.unwrap_or(false),
            instance: extent.clone(),
        });
    }
    for device in devices {
        let subtype = device.optional_text("ResourceSubType").map_err(from_cim)?;
        if subtype != Some(PHYSICAL_DRIVE) {
            continue;
        }
        let Some(host_resource) = host_resource(device)? else {
            continue;
        };
        let id = device.text("InstanceID").map_err(from_cim)?;
        let location = places.drives.get(&id.to_ascii_lowercase());
        disks.push(DiskAttachment {
            instance_id: id.to_owned(),
            path: path_of(device, &["InstanceID"])?,
            host_resource,
            location: *location.ok_or_else(|| broken(device, "has no known controller"))?,
            pass_through: true,
            shared: false,
            instance: device.clone(),
        });
    }
    disks.sort_by_key(|disk| disk.location);
    Ok(disks)
}

/// Where drives are, by the lower-case `InstanceID` of the drive.
struct Places {
    drives: HashMap<String, DiskLocation>,
}

impl Places {
    fn new(devices: &[CimInstance]) -> Result<Self> {
        let controllers = controllers(devices)?;
        let mut drives = HashMap::new();
        for drive in devices {
            let kind: Option<u16> = drive.optional_number("ResourceType").map_err(from_cim)?;
            if kind != Some(resource_type::DISK_DRIVE) {
                continue;
            }
            let Some(controller) = parent(drive)? else { continue };
            let Some((controller, controller_number)) = key_of(&controller)
                .and_then(|key| controllers.get(&key.to_ascii_lowercase()).copied())
            else {
                continue;
            };
            let location = drive.number("AddressOnParent").map_err(from_cim)?;
            let id = drive.text("InstanceID").map_err(from_cim)?.to_ascii_lowercase();
            drives.insert(id, DiskLocation { controller, controller_number, location });
        }
        Ok(Self { drives })
    }

    fn of_drive(&self, drive: &ObjectPath) -> Option<DiskLocation> {
        self.drives.get(&key_of(drive)?.to_ascii_lowercase()).copied()
    }
}

/// The controllers by their lower-case `InstanceID`, numbered among their kind. IDE controllers have their
/// number as `Address`. SCSI controllers have none that lasts, so they are numbered in the order of their
/// ids: the same in a VM and its checkpoints, whatever order a query answers in.
pub(crate) fn controllers(
    devices: &[CimInstance],
) -> Result<HashMap<String, (ControllerKind, u32)>> {
    let mut numbered = HashMap::new();
    for (number, kind) in [
        (resource_type::IDE_CONTROLLER, ControllerKind::Ide),
        (resource_type::SCSI_CONTROLLER, ControllerKind::Scsi),
    ] {
        let mut found = Vec::new();
        for device in devices {
            if device.optional_number::<u16>("ResourceType").map_err(from_cim)? != Some(number) {
                continue;
            }
            let id = device.text("InstanceID").map_err(from_cim)?;
            let address = match kind {
                ControllerKind::Ide => device.optional_number::<u32>("Address").ok().flatten(),
                ControllerKind::Scsi => None,
            };
            // Of a checkpoint's controller only the beginning of the id differs from the VM's.
            let own = id.split_once('\\').map_or(id, |(_, own)| own);
            found.push((address, own.to_ascii_lowercase(), id.to_ascii_lowercase()));
        }
        found.sort();
        for (index, (address, _, id)) in found.into_iter().enumerate() {
            let by_order = u32::try_from(index).unwrap_or(u32::MAX);
            numbered.insert(id, (kind, address.unwrap_or(by_order)));
        }
    }
    Ok(numbered)
}

/// The `Parent` of a resource; none where it has none.
fn parent(resource: &CimInstance) -> Result<Option<ObjectPath>> {
    resource.optional_reference("Parent").map_err(from_cim)
}

fn key_of(path: &ObjectPath) -> Option<&str> {
    path.key("InstanceID")
}

/// The first `HostResource`; none for an empty drive.
pub(crate) fn host_resource(resource: &CimInstance) -> Result<Option<String>> {
    let texts = resource.texts("HostResource").map_err(from_cim)?;
    Ok(texts.first().filter(|text| !text.is_empty()).map(|text| (*text).to_owned()))
}

fn broken(resource: &CimInstance, what: &str) -> HypervisorError {
    let id = resource.text("InstanceID").unwrap_or("?");
    HypervisorError::protocol(&resource.class, format!("{id} {what}"))
}
