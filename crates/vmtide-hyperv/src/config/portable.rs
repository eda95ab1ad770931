//! From settings and resources to the portable model.

use super::{boot, native, network};
use crate::host::from_cim;
use crate::model::disks::{attachments, controllers};
use crate::{ControllerKind, DiskAttachment, FrozenFile, Generation, Host, VmRecord, VmSettings};
use std::collections::HashMap;
use vmtide_cim::CimInstance;
use vmtide_hypervisor::{
    ControllerConfig, DiskBus, DiskConfig, DiskId, DynamicMemory, Firmware, Result, VmConfig,
};

/// The unit of `VirtualQuantity`, `Reservation` and `Limit` of memory: `byte * 2^20`.
const MEMORY_UNIT_BYTES: u64 = 1 << 20;

/// The configuration of a VM at one moment.
#[derive(Clone, Debug)]
pub struct Configuration {
    /// The portable model, with the document of all settings. Sizes and formats of disks are there once
    /// [`set_disk`](Self::set_disk) or [`Host::describe_disks`] has told them.
    pub config: VmConfig,
    /// The disks, pass-through ones too; the model has the others.
    pub disks: Vec<DiskAttachment>,
    /// What a restore elsewhere will lack, one line each.
    pub warnings: Vec<String>,
}

impl Host {
    /// The configuration of a VM as `settings` say it: its own, or those of one of its checkpoints.
    ///
    /// # Errors
    /// As [`from_cim`] says.
    pub fn configuration(&self, vm: &VmRecord, settings: &VmSettings) -> Result<Configuration> {
        let resources = self.resources(settings)?;
        let switches = self.switches()?;
        let of_class = |class: &str| -> Vec<CimInstance> {
            resources.iter().filter(|one| one.class.eq_ignore_ascii_case(class)).cloned().collect()
        };
        let devices = of_class("Msvm_ResourceAllocationSettingData");
        let disks = attachments(&devices, &of_class("Msvm_StorageAllocationSettingData"))?;
        let first = |class: &str| of_class(class).into_iter().next().unwrap_or_default();
        let memory = first("Msvm_MemorySettingData");
        let security = first("Msvm_SecuritySettingData");
        let second = settings.generation == Generation::Two;
        let text = |name| settings.instance.optional_text(name).map_err(from_cim);
        let notes = settings.instance.texts("Notes").map_err(from_cim)?.join("\n");
        let mut config = VmConfig {
            name: vm.name.clone(),
            id: Some(vm.id.to_string()),
            platform: "hyper-v".into(),
            platform_version: self.os_version(),
            machine: Some(if second { "generation 2".into() } else { "generation 1".into() }),
            processors: first("Msvm_ProcessorSettingData")
                .optional_number("VirtualQuantity")
                .map_err(from_cim)?,
            memory_bytes: bytes(&memory, "VirtualQuantity")?,
            firmware: Some(if second { Firmware::Uefi } else { Firmware::Bios }),
            secure_boot: settings.secure_boot.filter(|_| second),
            secure_boot_template: text("SecureBootTemplateId")?
                .filter(|text| second && !text.is_empty())
                .map(str::to_owned),
            tpm: security.optional_bool("TpmEnabled").map_err(from_cim)?,
            dynamic_memory: dynamic_memory(&memory)?,
            controllers: controller_list(&devices)?,
            disks: disks.iter().filter(|disk| !disk.pass_through).map(disk_config).collect(),
            network_adapters: network::adapters(&resources, &switches)?,
            notes: Some(notes).filter(|notes| !notes.is_empty()),
            native: vec![native::settings_file(&settings.instance, &resources)?],
        };
        boot::set_boot_order(&mut config, settings, &resources, &disks);
        let mut warnings = Vec::new();
        if config.tpm == Some(true) {
            warnings.push(
                "the VM has a virtual TPM, whose keys only this host's certificates open: keep its key \
                 protector and the guardian's certificates, or what the TPM sealed (BitLocker) asks for \
                 its recovery key after a restore elsewhere"
                    .into(),
            );
        }
        Ok(Configuration { config, disks, warnings })
    }

    /// The host's virtual switches: their names by their lower-case ids.
    fn switches(&self) -> Result<HashMap<String, String>> {
        let found = self.query_if_known("SELECT * FROM Msvm_VirtualEthernetSwitch")?;
        let name = |one: &CimInstance| {
            let id = one.text("Name").ok()?.to_lowercase();
            Some((id, one.text("ElementName").ok()?.to_owned()))
        };
        Ok(found.unwrap_or_default().iter().filter_map(name).collect())
    }

    /// Fills in what the host says about the files of the disks, e.g. while the VM runs and nobody else
    /// may open them. What it does not say of one stays unknown.
    pub fn describe_disks(&self, configuration: &mut Configuration) {
        for disk in &configuration.disks {
            if disk.pass_through {
                continue;
            }
            match self.virtual_hard_disk(&disk.host_resource) {
                Ok(file) => {
                    if let Some(config) = find(&mut configuration.config, disk) {
                        config.size_bytes = file.size_bytes;
                        config.format = Some(file.format);
                        config.logical_sector_bytes = file.logical_sector_bytes;
                        config.physical_sector_bytes = file.physical_sector_bytes;
                        config.fixed = Some(file.subtype == "fixed");
                        config.block_bytes = file.block_bytes;
                        config.image_id = file.disk_id.map(|id| id.to_string());
                    }
                }
                Err(error) => tracing::debug!(%error, "a disk cannot be described"),
            }
        }
    }
}

impl Configuration {
    /// Fills in what an opened disk says of itself. `fixed` of a differencing file is that of the file it
    /// grew from, which is not known here; then it stays unset.
    pub fn set_disk(&mut self, disk: &DiskAttachment, file: &FrozenFile) {
        if let Some(config) = find(&mut self.config, disk) {
            config.size_bytes = file.device.size_bytes();
            config.format = Some(file.format.clone());
            config.logical_sector_bytes = Some(file.logical_sector_bytes);
            config.physical_sector_bytes = Some(file.physical_sector_bytes);
            config.fixed = match file.subtype.as_str() {
                "fixed" => Some(true),
                "dynamic" => Some(false),
                _ => None,
            };
            config.block_bytes = Some(file.block_bytes).filter(|bytes| *bytes > 0);
            config.image_id = file.disk_id.map(|id| id.to_string());
        }
    }
}

fn find<'a>(config: &'a mut VmConfig, disk: &DiskAttachment) -> Option<&'a mut DiskConfig> {
    let id = disk.location.to_string();
    config.disks.iter_mut().find(|known| known.id.0 == id)
}

fn disk_config(disk: &DiskAttachment) -> DiskConfig {
    let extension = disk.host_resource.rsplit_once('.').map(|(_, end)| end.to_lowercase());
    DiskConfig {
        id: DiskId(disk.location.to_string()),
        bus: bus(disk.location.controller),
        format: extension.map(|end| match end.as_str() {
            "avhdx" => "vhdx".into(),
            "avhd" => "vhd".into(),
            _ => end,
        }),
        path: Some(disk.host_resource.clone()),
        ..DiskConfig::default()
    }
}

const fn bus(controller: ControllerKind) -> DiskBus {
    match controller {
        ControllerKind::Ide => DiskBus::Ide,
        ControllerKind::Scsi => DiskBus::Scsi,
    }
}

fn controller_list(devices: &[CimInstance]) -> Result<Vec<ControllerConfig>> {
    let mut list: Vec<_> = controllers(devices)?.into_values().collect();
    list.sort_unstable();
    Ok(list.into_iter().map(|(kind, number)| ControllerConfig { bus: bus(kind), number }).collect())
}

fn bytes(memory: &CimInstance, name: &str) -> Result<Option<u64>> {
    let units: Option<u64> = memory.optional_number(name).map_err(from_cim)?;
    Ok(units.map(|units| units.saturating_mul(MEMORY_UNIT_BYTES)))
}

fn dynamic_memory(memory: &CimInstance) -> Result<Option<DynamicMemory>> {
    if memory.optional_bool("DynamicMemoryEnabled").map_err(from_cim)? != Some(true) {
        return Ok(None);
    }
    let bounds = bytes(memory, "Reservation")?.zip(bytes(memory, "Limit")?);
    let buffer_percent = memory.optional_number("TargetMemoryBuffer").map_err(from_cim)?;
    Ok(bounds.map(|(minimum_bytes, maximum_bytes)| DynamicMemory {
        minimum_bytes,
        maximum_bytes,
        buffer_percent,
    }))
}
