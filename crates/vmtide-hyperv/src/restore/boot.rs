//! The boot order of a generation 2 VM.
//!
//! `BootSourceOrder` of the settings lists the boot sources that the host makes for each device that can
//! boot. Which disk is which is read as a backup reads it, so that what a backup recorded and what a restore
//! sets mean the same. What was first comes first again; entries of files (a boot manager that the guest put
//! there) are in the firmware's own variables and are written again by the guest.

use super::hardware::Hardware;
use super::management::Management;
use crate::model::types::{Generation, VmRecord};
use vmtide_cim::{CimInstance, CimValue};
use vmtide_hypervisor::Result;

/// Puts the disks that booted first to the front. Answers with a warning where that cannot be done: the VM
/// boots all the same as long as it finds its disk.
pub(super) fn set_order(
    management: &Management<'_>,
    vm: &VmRecord,
    hardware: &Hardware,
) -> Result<Option<String>> {
    if hardware.generation == Generation::One || hardware.boot.is_empty() {
        return Ok(None);
    }
    let vm = management.host.vm(vm.id)?;
    let settings = &vm.settings;
    let present: Vec<String> = match settings.instance.texts("BootSourceOrder") {
        Ok(texts) => texts.into_iter().map(str::to_owned).collect(),
        Err(error) => return Ok(Some(cannot_set(&error.to_string()))),
    };
    let config = management.host.configuration(&vm, settings)?.config;
    let place = |index: usize| {
        let index = u32::try_from(index).ok();
        let disk =
            config.disks.iter().find(|disk| disk.boot_index.is_some() && disk.boot_index == index);
        disk.and_then(|disk| hardware.boot.iter().position(|id| *id == disk.id))
    };
    // What did not boot keeps its order behind what did.
    let mut ranked: Vec<_> = present
        .iter()
        .enumerate()
        .map(|(index, source)| (place(index).unwrap_or(usize::MAX), index, source.clone()))
        .collect();
    if ranked.iter().all(|(place, ..)| *place == usize::MAX) {
        return Ok(Some(cannot_set("the host lists none of its disks as a boot source")));
    }
    ranked.sort();
    let ranked: Vec<_> = ranked.into_iter().map(|(.., source)| source).collect();
    if ranked == present {
        return Ok(None);
    }
    let change = CimInstance::new("Msvm_VirtualSystemSettingData")
        .with("InstanceID", settings.instance_id.as_str())
        .with("BootSourceOrder", CimValue::strings(ranked));
    management.modify_system(&change, "set the boot order of the VM")?;
    Ok(None)
}

fn cannot_set(why: &str) -> String {
    format!("the boot order could not be set ({why}): look at it with Get-VMFirmware")
}
