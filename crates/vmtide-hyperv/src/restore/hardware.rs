//! What a VM that is made anew consists of: worked out from the configuration of a restore point before
//! anything is made, so that what cannot be is said at once.
//!
//! A VM of Hyper-V gets every device where it was. One of another platform gets the generation that its
//! firmware asks for and its disks in the order they booted: on generation 1 the first on IDE, from which
//! alone it boots, everything else on SCSI. Guests find their disks by content and not by controller; what
//! they need are drivers, which Windows and Linux have had for many years.

use super::native::NativeSettings;
use super::network::address_text;
use super::typed::{BOOT_ORDER, MEMORY, PROCESSOR, SYSTEM, SYSTEM_IDENTITY, VLAN, copy_properties};
use crate::model::types::{ControllerKind, DiskLocation, Generation};
use std::collections::BTreeSet;
use vmtide_cim::{CimInstance, CimValue};
use vmtide_hypervisor::{
    DiskBus, DiskId, Firmware, HypervisorError, NetworkAdapterConfig, NetworkPlan, Result, VmConfig,
};

/// The IDE controllers of a generation 1 VM, and the places on each.
const IDE_CONTROLLERS: u32 = 2;
/// See [`IDE_CONTROLLERS`].
const IDE_LOCATIONS: u32 = 2;
/// The SCSI controllers a VM can have, and the places on each.
const SCSI_CONTROLLERS: u32 = 4;
/// See [`SCSI_CONTROLLERS`].
const SCSI_LOCATIONS: u32 = 64;

/// The adapters a VM can have of both kinds: 8 synthetic and 4 emulated; with failover clusters and newer
/// versions more. A bound on what a damaged configuration makes us do, not a check for the host.
const MAX_ADAPTERS: usize = 68;

/// The platform whose disks are named by their places.
pub(super) const PLATFORM: &str = "hyper-v";

/// `OperationMode` of an untagged port in one VLAN.
const VLAN_ACCESS: u32 = 1;

/// Memory comes in steps of this many bytes.
const MEMORY_STEP_BYTES: u64 = 2 << 20;
/// The least memory of a VM, in bytes.
const MIN_MEMORY_BYTES: u64 = 32 << 20;

/// The devices and settings of a VM.
#[derive(Clone, Debug)]
pub(super) struct Hardware {
    /// Which generation.
    pub generation: Generation,
    /// Properties of `Msvm_VirtualSystemSettingData`.
    pub system: CimInstance,
    /// Properties of `Msvm_MemorySettingData`.
    pub memory: CimInstance,
    /// Properties of `Msvm_ProcessorSettingData`.
    pub processor: CimInstance,
    /// How many SCSI controllers.
    pub scsi_controllers: u32,
    /// Which disk where.
    pub disks: Vec<(DiskId, DiskLocation)>,
    /// DVD drives, empty.
    pub dvds: Vec<DiskLocation>,
    /// The network adapters.
    pub adapters: Vec<Adapter>,
    /// The disks it booted from, the first first.
    pub boot: Vec<DiskId>,
    /// What will not be as it was, one line each.
    pub warnings: Vec<String>,
}

/// A network adapter.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Adapter {
    /// Its name, as people see it.
    pub name: String,
    /// Which kind.
    pub kind: AdapterKind,
    /// Its hardware address, where it has its own; none has the host give one.
    pub address: Option<String>,
    /// The switch to connect it to; none leaves it disconnected.
    pub connect_to: Option<String>,
    /// `Msvm_EthernetSwitchPortVlanSettingData` of its connection.
    pub vlan: Option<CimInstance>,
}

/// The kinds of adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AdapterKind {
    /// For guests with drivers: all of today.
    Synthetic,
    /// "Legacy", for booting generation 1 from the network.
    Emulated,
}

/// What a restore wants of the hardware.
pub(super) struct Wishes<'a> {
    /// The disks that there will be.
    pub disks: &'a [DiskId],
    /// Whether the VM itself comes back, with its serial numbers and addresses.
    pub is_original: bool,
    /// Which adapters are connected.
    pub networks: &'a NetworkPlan,
    /// How it boots, against the configuration.
    pub firmware: Option<Firmware>,
}

impl Hardware {
    /// The hardware for a configuration.
    ///
    /// # Errors
    /// [`HypervisorError::Unsupported`] where a VM of Hyper-V cannot have all of the disks.
    pub fn plan(
        config: &VmConfig,
        native: Option<&NativeSettings>,
        wishes: &Wishes<'_>,
    ) -> Result<Self> {
        let mut warnings = Vec::new();
        let generation = generation_of(config, wishes.firmware, &mut warnings);
        let was = native.and_then(NativeSettings::generation);
        let was = was.or_else(|| config.firmware.map(generation_for));
        let is_same_generation = was == Some(generation);
        let boot = boot_order(config, wishes.disks);
        let disks = if config.platform == PLATFORM && is_same_generation {
            own_places(wishes.disks)?
        } else {
            new_places(generation, wishes.disks, &boot)?
        };
        let mut hardware = Self {
            generation,
            system: system_of(config, native, wishes, generation, &mut warnings),
            memory: memory_of(config, native),
            processor: processor_of(config, native),
            scsi_controllers: 0,
            dvds: Vec::new(),
            adapters: adapters_of(config, native, wishes),
            disks,
            boot,
            warnings,
        };
        let is_own = native.is_some() || config.platform == PLATFORM;
        if is_own && is_same_generation {
            let scsi = config.controllers.iter().filter(|one| one.bus == DiskBus::Scsi);
            let scsi = u32::try_from(scsi.count()).unwrap_or(u32::MAX);
            hardware.scsi_controllers = scsi.min(SCSI_CONTROLLERS);
        }
        if let Some(native) = native.filter(|_| is_same_generation) {
            hardware.dvds = native.dvd_drives();
            let taken: BTreeSet<_> = hardware.disks.iter().map(|(_, place)| *place).collect();
            hardware.dvds.retain(|place| !taken.contains(place));
            hardware.warnings.extend(native.not_made_again());
        }
        hardware.count_controllers()?;
        Ok(hardware)
    }

    /// As many SCSI controllers as its devices need, at least.
    fn count_controllers(&mut self) -> Result<()> {
        let places = self.disks.iter().map(|(_, place)| place).chain(&self.dvds);
        for place in places {
            let (controllers, locations) = match place.controller {
                ControllerKind::Ide if self.generation == Generation::One => {
                    (IDE_CONTROLLERS, IDE_LOCATIONS)
                }
                ControllerKind::Ide => (0, 0),
                ControllerKind::Scsi => (SCSI_CONTROLLERS, SCSI_LOCATIONS),
            };
            if place.controller_number >= controllers || place.location >= locations {
                return Err(too_many(&format!(
                    "a generation {} VM has no place {:?} {}:{}",
                    number_of(self.generation),
                    place.controller,
                    place.controller_number,
                    place.location
                )));
            }
            if place.controller == ControllerKind::Scsi {
                self.scsi_controllers = self.scsi_controllers.max(place.controller_number + 1);
            }
        }
        Ok(())
    }
}

fn too_many(detail: &str) -> HypervisorError {
    HypervisorError::Unsupported {
        what: "a VM of Hyper-V with these disks".into(),
        detail: format!("{detail}; restore fewer of them (--disk), or to files"),
    }
}

fn number_of(generation: Generation) -> u8 {
    match generation {
        Generation::One => 1,
        Generation::Two => 2,
    }
}

fn generation_of(
    config: &VmConfig,
    wanted: Option<Firmware>,
    warnings: &mut Vec<String>,
) -> Generation {
    let firmware = wanted.or(config.firmware);
    if firmware.is_none() {
        warnings.push(
            "the restore point does not say how the VM boots: it was made as generation 1 (BIOS); if it \
             does not boot, restore it with --generation 2"
                .into(),
        );
    }
    firmware.map_or(Generation::One, generation_for)
}

fn generation_for(firmware: Firmware) -> Generation {
    match firmware {
        Firmware::Uefi => Generation::Two,
        Firmware::Bios => Generation::One,
    }
}

/// The disks that are there, in the order they were booted from, those without a place in it left out.
fn boot_order(config: &VmConfig, disks: &[DiskId]) -> Vec<DiskId> {
    let mut order: Vec<_> = config
        .disks
        .iter()
        .filter(|disk| disks.contains(&disk.id))
        .filter_map(|disk| Some((disk.boot_index?, disk.id.clone())))
        .collect();
    order.sort_by_key(|(index, _)| *index);
    order.into_iter().map(|(_, id)| id).collect()
}

/// Where the disks of a VM of Hyper-V were: their ids say it.
fn own_places(disks: &[DiskId]) -> Result<Vec<(DiskId, DiskLocation)>> {
    disks
        .iter()
        .map(|id| {
            let place = id.0.parse::<DiskLocation>().map_err(|_| {
                HypervisorError::failed(
                    "make the VM again",
                    format!("the id of disk {id} is no place of a controller (scsi0:1)"),
                )
            })?;
            Ok((id.clone(), place))
        })
        .collect()
}

/// Where the disks of another platform go.
fn new_places(
    generation: Generation,
    disks: &[DiskId],
    boot: &[DiskId],
) -> Result<Vec<(DiskId, DiskLocation)>> {
    let rest = disks.iter().filter(|id| !boot.contains(id));
    let ordered = boot.iter().chain(rest);
    let mut places = Vec::with_capacity(disks.len());
    let mut scsi = 0;
    for (index, id) in ordered.enumerate() {
        let place = if generation == Generation::One && index == 0 {
            DiskLocation { controller: ControllerKind::Ide, controller_number: 0, location: 0 }
        } else {
            let place = DiskLocation {
                controller: ControllerKind::Scsi,
                controller_number: scsi / SCSI_LOCATIONS,
                location: scsi % SCSI_LOCATIONS,
            };
            scsi += 1;
            place
        };
        if place.controller_number >= SCSI_CONTROLLERS {
            return Err(too_many(&format!(
                "a VM has room for {} disks",
                SCSI_CONTROLLERS * SCSI_LOCATIONS
            )));
        }
        places.push((id.clone(), place));
    }
    Ok(places)
}

fn system_of(
    config: &VmConfig,
    native: Option<&NativeSettings>,
    wishes: &Wishes<'_>,
    generation: Generation,
    warnings: &mut Vec<String>,
) -> CimInstance {
    let mut system = CimInstance::new("Msvm_VirtualSystemSettingData");
    let Some(native) = native else {
        if let Some(notes) = &config.notes {
            system.set("Notes", CimValue::strings([notes.as_str()]));
        }
        if generation == Generation::Two {
            // Which of the templates fits is the guest's matter, which nobody knows here; with the wrong
            // one it does not boot.
            system.set("SecureBootEnabled", false);
            if config.secure_boot == Some(true) {
                warnings.push(
                    "secure boot was on and is off now: switch it on with the template that fits the \
                     guest (Set-VMFirmware -EnableSecureBoot On -SecureBootTemplate …)"
                        .into(),
                );
            }
        }
        return system;
    };
    copy_properties(&mut system, &native.system, SYSTEM);
    if wishes.is_original {
        copy_properties(&mut system, &native.system, SYSTEM_IDENTITY);
    }
    match generation {
        Generation::One => {
            copy_properties(&mut system, &native.system, BOOT_ORDER);
            // Only generation 2 has them.
            system.properties.retain(|(name, _)| !name.starts_with("SecureBoot"));
        }
        Generation::Two => system.properties.retain(|(name, _)| name != "BIOSNumLock"),
    }
    system
}

fn memory_of(config: &VmConfig, native: Option<&NativeSettings>) -> CimInstance {
    let class = "Msvm_MemorySettingData";
    let mut memory = CimInstance::new(class);
    if let Some(known) = native.and_then(|native| native.first(class)) {
        copy_properties(&mut memory, known, MEMORY);
    } else if let Some(bytes) = config.memory_bytes {
        let bytes = bytes.max(MIN_MEMORY_BYTES);
        let mib = bytes.div_ceil(MEMORY_STEP_BYTES).saturating_mul(MEMORY_STEP_BYTES >> 20);
        let bounds =
            config.dynamic_memory.map(|dynamic| (dynamic.minimum_bytes, dynamic.maximum_bytes));
        let (least, most) = bounds.map_or((mib, mib), |(least, most)| (least >> 20, most >> 20));
        memory.set("VirtualQuantity", CimValue::Uint64(mib));
        memory.set("Reservation", CimValue::Uint64(least.min(mib)));
        memory.set("Limit", CimValue::Uint64(most.max(mib)));
        memory.set("DynamicMemoryEnabled", bounds.is_some());
        if let Some(percent) = config.dynamic_memory.and_then(|dynamic| dynamic.buffer_percent) {
            memory.set("TargetMemoryBuffer", CimValue::Uint32(percent));
        }
    }
    memory
}

fn processor_of(config: &VmConfig, native: Option<&NativeSettings>) -> CimInstance {
    let class = "Msvm_ProcessorSettingData";
    let mut processor = CimInstance::new(class);
    if let Some(known) = native.and_then(|native| native.first(class)) {
        copy_properties(&mut processor, known, PROCESSOR);
    } else if let Some(count) = config.processors {
        processor.set("VirtualQuantity", CimValue::Uint64(count.max(1).into()));
    }
    processor
}

fn adapters_of(
    config: &VmConfig,
    native: Option<&NativeSettings>,
    wishes: &Wishes<'_>,
) -> Vec<Adapter> {
    let adapters = config.network_adapters.iter().take(MAX_ADAPTERS);
    adapters
        .enumerate()
        .map(|(index, known)| {
            let port = native.and_then(|native| native.port_of(known));
            adapter_of(index, known, port, native, wishes)
        })
        .collect()
}

fn adapter_of(
    index: usize,
    known: &NetworkAdapterConfig,
    port: Option<&CimInstance>,
    native: Option<&NativeSettings>,
    wishes: &Wishes<'_>,
) -> Adapter {
    let is_emulated = known.model.as_deref() == Some("legacy");
    // An address that the host gave once is given anew: it comes from that host's own range.
    let was_given = known.static_mac == Some(false);
    let address = known.mac.as_deref().and_then(address_text);
    let vlan_class = "Msvm_EthernetSwitchPortVlanSettingData";
    let vlan = match port.and_then(|port| native?.vlan_of(port)) {
        Some(vlan) => {
            let mut feature = CimInstance::new(vlan_class);
            copy_properties(&mut feature, vlan, VLAN);
            Some(feature)
        }
        None => known.vlan.map(|id| {
            CimInstance::new(vlan_class)
                .with("OperationMode", CimValue::Uint32(VLAN_ACCESS))
                .with("AccessVlanId", CimValue::Uint16(id))
        }),
    };
    let name = known.name.clone().filter(|name| !name.is_empty());
    Adapter {
        name: name.unwrap_or_else(|| format!("Network Adapter {}", index + 1)),
        kind: if is_emulated { AdapterKind::Emulated } else { AdapterKind::Synthetic },
        address: address.filter(|_| wishes.is_original && !was_given),
        connect_to: wishes.networks.target_of(known.network.as_deref()).map(str::to_owned),
        vlan,
    }
}
