//! The order in which a VM tries to boot from its devices.
//!
//! A generation 1 VM has an order of kinds of devices (`BootOrder`). A generation 2 VM has an order of boot
//! sources (`BootSourceOrder`), each an object whose `FirmwareDevicePath` names a disk by its controller and
//! location, or a network adapter by its address; or a boot manager in a file, which is inside of a disk
//! and comes back with it.

use crate::{ControllerKind, DiskAttachment, DiskLocation, Generation, VmSettings};
use std::collections::HashMap;
use vmtide_cim::{CimInstance, ObjectPath};
use vmtide_hypervisor::{NetworkAdapterConfig, VmConfig};

/// Sets the boot indexes of disks and network adapters. What cannot be told stays unset: the order is not
/// what a restore fails for.
pub(super) fn set_boot_order(
    config: &mut VmConfig,
    settings: &VmSettings,
    resources: &[CimInstance],
    disks: &[DiskAttachment],
) {
    let order = match settings.generation {
        Generation::One => of_kinds(&settings.instance, disks, &config.network_adapters),
        Generation::Two => {
            of_sources(&settings.instance, resources, disks, &config.network_adapters)
        }
    };
    for (index, device) in (0_u32..).zip(order) {
        match device {
            Some(Device::Disk(location)) => {
                let id = location.to_string();
                let disk = config.disks.iter_mut().find(|disk| disk.id.0 == id);
                if let Some(disk) = disk.filter(|disk| disk.boot_index.is_none()) {
                    disk.boot_index = Some(index);
                }
            }
            Some(Device::Adapter(id)) => {
                let adapter = config.network_adapters.iter_mut().find(|one| one.id == id);
                if let Some(adapter) = adapter.filter(|one| one.boot_index.is_none()) {
                    adapter.boot_index = Some(index);
                }
            }
            None => {}
        }
    }
}

enum Device {
    Disk(DiskLocation),
    Adapter(String),
}

/// By `BootOrder`: the first device of each kind.
fn of_kinds(
    system: &CimInstance,
    disks: &[DiskAttachment],
    adapters: &[NetworkAdapterConfig],
) -> Vec<Option<Device>> {
    let first = |kind: ControllerKind| {
        let found = disks.iter().map(|disk| disk.location).filter(|at| at.controller == kind).min();
        found.map(Device::Disk)
    };
    let device = |number: &u64| match number {
        2 => first(ControllerKind::Ide),
        3 => {
            // Only an emulated adapter boots from the network where there is one.
            let legacy = adapters.iter().find(|one| one.model.as_deref() == Some("legacy"));
            legacy.or(adapters.first()).map(|one| Device::Adapter(one.id.clone()))
        }
        4 => first(ControllerKind::Scsi),
        // 0 is the diskette drive, 1 the DVD drive.
        _ => None,
    };
    system.numbers("BootOrder").unwrap_or_default().iter().map(device).collect()
}

/// By `BootSourceOrder`.
fn of_sources(
    system: &CimInstance,
    resources: &[CimInstance],
    disks: &[DiskAttachment],
    adapters: &[NetworkAdapterConfig],
) -> Vec<Option<Device>> {
    let sources: HashMap<String, &CimInstance> = resources
        .iter()
        .filter(|one| one.class.eq_ignore_ascii_case("Msvm_BootSourceSettingData"))
        .filter_map(|one| Some((one.text("InstanceID").ok()?.to_lowercase(), one)))
        .collect();
    let controllers = controller_names(resources);
    let device = |text: &&str| {
        let path: ObjectPath = text.parse().ok()?;
        let source = sources.get(&path.key("InstanceID")?.to_lowercase())?;
        let firmware = source.optional_text("FirmwareDevicePath").ok()??;
        disk_of(firmware, disks, &controllers)
            .map(Device::Disk)
            .or_else(|| adapter_of(firmware, adapters).map(Device::Adapter))
    };
    system.texts("BootSourceOrder").unwrap_or_default().iter().map(device).collect()
}

/// The SCSI controllers as the firmware names them: hexadecimal digits of their GUID, in both byte orders,
/// with their numbers.
fn controller_names(resources: &[CimInstance]) -> Vec<(String, u32)> {
    let devices: Vec<_> = resources
        .iter()
        .filter(|one| one.class.eq_ignore_ascii_case("Msvm_ResourceAllocationSettingData"))
        .cloned()
        .collect();
    let mut names = Vec::new();
    for (id, (kind, number)) in crate::model::disks::controllers(&devices).unwrap_or_default() {
        let guid = id.split('\\').nth(1).and_then(crate::model::read::parse_uuid);
        if let (ControllerKind::Scsi, Some(guid)) = (kind, guid) {
            names.push((guid.simple().to_string(), number));
            names.push((hex(&guid.to_bytes_le()), number));
        }
    }
    names
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The disk of `…\VenHw(CLASS,CONTROLLER)\Scsi(0,LUN)…`. A path that goes on names a file on the disk, which
/// is the guest's own entry and not the disk's place in the order.
fn disk_of(
    firmware: &str,
    disks: &[DiskAttachment],
    controllers: &[(String, u32)],
) -> Option<DiskLocation> {
    let folded = firmware.to_lowercase();
    let (before, after) = folded.split_once("scsi(")?;
    let (numbers, rest) = after.split_once(')')?;
    if rest.trim_matches('\\').contains("hd(") {
        return None;
    }
    let location: u32 = numbers.split_once(',')?.1.trim().parse().ok()?;
    let named = controllers.iter().find(|(name, _)| before.replace('-', "").contains(name));
    let mut candidates = disks.iter().map(|disk| disk.location).filter(|at| {
        at.controller == ControllerKind::Scsi
            && at.location == location
            && named.is_none_or(|(_, number)| at.controller_number == *number)
    });
    // Without the controller's name only one candidate is an answer.
    candidates.next().filter(|_| candidates.next().is_none())
}

/// The adapter of `…\MAC(001122334455,0)…`.
fn adapter_of(firmware: &str, adapters: &[NetworkAdapterConfig]) -> Option<String> {
    let folded = firmware.to_lowercase();
    let address = folded.split_once("mac(")?.1.split([',', ')']).next()?.trim().to_owned();
    let is = |one: &&NetworkAdapterConfig| {
        one.mac.as_ref().is_some_and(|mac| address.starts_with(&mac.replace(':', "")))
    };
    adapters.iter().find(is).map(|one| one.id.clone())
}
