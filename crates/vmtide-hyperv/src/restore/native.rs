//! What a restore point of a VM of Hyper-V keeps beside the portable configuration: all settings as the
//! host told them, and the host's own configuration files.

use super::host_path::extension_of;
use crate::model::disks::{controllers, host_resource};
use crate::model::types::{DiskLocation, Generation};
use vmtide_cim::CimInstance;
use vmtide_hypervisor::{NetworkAdapterConfig, Result, VmConfig};

/// `ResourceType` of DVD drives.
const DVD_DRIVE: u16 = 16;

/// The settings of a VM as its host told them.
#[derive(Clone, Debug)]
pub(super) struct NativeSettings {
    /// `Msvm_VirtualSystemSettingData`.
    pub system: CimInstance,
    /// Everything that belongs to it.
    pub resources: Vec<CimInstance>,
}

impl NativeSettings {
    /// Those that a restore point keeps; none where it keeps none.
    ///
    /// # Errors
    /// Where they cannot be read.
    pub fn find(config: &VmConfig) -> Result<Option<Self>> {
        let found = crate::config::native_settings(config)?;
        Ok(found.map(|(system, resources)| Self { system, resources }))
    }

    /// The generation; none where the settings do not say it.
    pub fn generation(&self) -> Option<Generation> {
        match self.system.optional_text("VirtualSystemSubType").ok().flatten() {
            Some("Microsoft:Hyper-V:SubType:1") => Some(Generation::One),
            Some("Microsoft:Hyper-V:SubType:2") => Some(Generation::Two),
            _ => None,
        }
    }

    /// The first resource of a class.
    pub fn first(&self, class: &str) -> Option<&CimInstance> {
        self.of_class(class).next()
    }

    fn of_class(&self, class: &str) -> impl Iterator<Item = &CimInstance> {
        self.resources.iter().filter(move |one| one.class.eq_ignore_ascii_case(class))
    }

    fn devices(&self) -> Vec<CimInstance> {
        self.of_class("Msvm_ResourceAllocationSettingData").cloned().collect()
    }

    /// Where its DVD drives are. Those whose controller is not known are left out.
    pub fn dvd_drives(&self) -> Vec<DiskLocation> {
        let devices = self.devices();
        let Ok(numbers) = controllers(&devices) else { return Vec::new() };
        let place = |drive: &CimInstance| {
            let parent = drive.optional_reference("Parent").ok()??;
            let key = parent.key("InstanceID")?.to_ascii_lowercase();
            let (controller, controller_number) = *numbers.get(&key)?;
            let location = drive.number("AddressOnParent").ok()?;
            Some(DiskLocation { controller, controller_number, location })
        };
        let is_dvd = |one: &&CimInstance| one.number::<u16>("ResourceType") == Ok(DVD_DRIVE);
        devices.iter().filter(is_dvd).filter_map(place).collect()
    }

    /// The port of an adapter: by its id, else by its hardware address.
    pub fn port_of(&self, adapter: &NetworkAdapterConfig) -> Option<&CimInstance> {
        let ports = || {
            self.of_class("Msvm_SyntheticEthernetPortSettingData")
                .chain(self.of_class("Msvm_EmulatedEthernetPortSettingData"))
        };
        let by_id =
            |port: &&CimInstance| port.text("InstanceID").is_ok_and(|id| same_id(id, &adapter.id));
        let address = adapter.mac.as_deref().and_then(super::network::address_text);
        let by_address = |port: &&CimInstance| {
            let found = port.optional_text("Address").ok().flatten();
            address.is_some() && found.and_then(super::network::address_text) == address
        };
        ports().find(by_id).or_else(|| ports().find(by_address))
    }

    /// The VLAN settings of the connection of a port: their id begins with the port's.
    pub fn vlan_of(&self, port: &CimInstance) -> Option<&CimInstance> {
        let owner = format!("{}\\", port.text("InstanceID").ok()?).to_lowercase();
        self.of_class("Msvm_EthernetSwitchPortVlanSettingData").find(|vlan| {
            vlan.text("InstanceID").is_ok_and(|id| id.to_lowercase().starts_with(&owner))
        })
    }

    /// What a VM that is defined anew does not have, one line each.
    pub fn not_made_again(&self) -> Vec<String> {
        let mut missing = Vec::new();
        let security = self.first("Msvm_SecuritySettingData");
        if security.is_some_and(|one| one.optional_bool("TpmEnabled") == Ok(Some(true))) {
            missing.push(
                "the VM had a virtual TPM, whose keys only its own configuration files and its host's \
                 guardian hold: it has none now, and what was sealed (BitLocker) asks for its recovery key"
                    .into(),
            );
        }
        let media = self.of_class("Msvm_StorageAllocationSettingData").filter(|one| {
            let subtype = one.optional_text("ResourceSubType").ok().flatten();
            subtype.is_some_and(|text| text != super::portable::VIRTUAL_HARD_DISK)
        });
        for medium in media {
            if let Ok(Some(file)) = host_resource(medium) {
                missing.push(format!("{file} is not in its drive any more"));
            }
        }
        for (class, what) in [
            ("Msvm_SyntheticFcPortSettingData", "virtual Fibre Channel adapters"),
            ("Msvm_PciExpressSettingData", "assigned devices of its host"),
            ("Msvm_GpuPartitionSettingData", "GPU partitions"),
        ] {
            if self.first(class).is_some() {
                missing.push(format!("the VM had {what}, which it has not any more"));
            }
        }
        missing.extend(self.port_settings_not_made_again());
        missing
    }

    /// What is set for adapters and disks beyond what connects them, where it is not what every VM has.
    fn port_settings_not_made_again(&self) -> Vec<String> {
        let is_set = |one: &CimInstance, names: &[&str]| {
            names.iter().any(|name| {
                let value = one.value(name);
                value.is_some_and(|value| {
                    value.as_bool() == Some(true) || value.as_u64().is_some_and(|number| number > 0)
                })
            })
        };
        let mut missing = Vec::new();
        for (class, names, what) in [
            (
                "Msvm_EthernetSwitchPortSecuritySettingData",
                &[
                    "AllowMacSpoofing",
                    "EnableDhcpGuard",
                    "EnableRouterGuard",
                    "AllowTeaming",
                    "MonitorMode",
                ][..],
                "security settings of network adapters (Set-VMNetworkAdapter)",
            ),
            (
                "Msvm_EthernetSwitchPortBandwidthSettingData",
                &["Limit", "Reservation"][..],
                "bandwidth settings of network adapters (Set-VMNetworkAdapter)",
            ),
            (
                "Msvm_StorageAllocationSettingData",
                &["IOPSLimit", "IOPSReservation"][..],
                "quality of service of disks (Set-VMHardDiskDrive)",
            ),
        ] {
            if self.of_class(class).any(|one| is_set(one, names)) {
                missing.push(format!("the VM had {what}, which are not set any more"));
            }
        }
        missing
    }
}

/// Whether two ids of resources are the same, or one is the end of the other.
fn same_id(one: &str, other: &str) -> bool {
    let own = |id: &str| id.rsplit('\\').next().unwrap_or(id).to_lowercase();
    one.eq_ignore_ascii_case(other) || (!other.is_empty() && own(one) == own(other))
}

/// The configuration files of a VM, by name.
#[derive(Clone, Debug, Default)]
pub(super) struct ConfigurationFiles {
    /// `.vmcx`, `.vmrs`, `.vmgs`: the name and the content.
    pub files: Vec<(String, Vec<u8>)>,
}

impl ConfigurationFiles {
    /// Those that a restore point has; none where it has no `.vmcx`.
    ///
    /// # Errors
    /// Where one of them is not what its name says.
    pub fn find(config: &VmConfig) -> Result<Option<Self>> {
        let files = crate::config::configuration_files(config)?;
        let has_definition =
            files.iter().any(|(name, _)| extension_of(name).eq_ignore_ascii_case("vmcx"));
        Ok(has_definition.then_some(Self { files }))
    }

    /// The name of the definition.
    pub fn definition(&self) -> &str {
        let found =
            self.files.iter().find(|(name, _)| extension_of(name).eq_ignore_ascii_case("vmcx"));
        found.map_or("", |(name, _)| name)
    }
}
