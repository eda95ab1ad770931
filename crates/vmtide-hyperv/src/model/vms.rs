//! VMs: found, by id and by name.

use super::read::{self, REALIZED, guid};
use super::types::{VmRecord, VmSettings};
use crate::Host;
use crate::host::{from_cim, path_of};
use std::collections::HashMap;
use uuid::Uuid;
use vmtide_cim::{CimInstance, wql};
use vmtide_hypervisor::{HypervisorError, Result};

/// The keys of a computer system.
const SYSTEM_KEYS: [&str; 2] = ["CreationClassName", "Name"];

/// What `Msvm_ComputerSystem.OperationalStatus` says of a VM beside "OK" while the host makes, applies or removes one of its
/// checkpoints, or merges its disks (page of the class in the "Hyper-V WMI provider (V2)"). An export (32773) and a migration
/// (32774) are not among them: they last for hours.
const AT_CHECKPOINTS: [u64; 4] = [32768, 32769, 32770, 32772];

impl Host {
    /// All VMs of the host, without planned ones and checkpoints; by name, then by id. A VM that is
    /// removed while they are read is left out.
    ///
    /// # Errors
    /// As [`from_cim`] says.
    pub fn vms(&self) -> Result<Vec<VmRecord>> {
        let (vms, unreadable) = self.all_vms()?;
        unreadable.into_iter().next().map_or(Ok(vms), |vm| Err(vm.error))
    }

    /// All VMs as [`vms`](Self::vms), and apart from them those that cannot be read.
    ///
    /// # Errors
    /// As [`from_cim`] says; not for a VM of which the host tells less than it should.
    pub(crate) fn all_vms(&self) -> Result<(Vec<VmRecord>, Vec<UnreadableVm>)> {
        let settings = self.query(&format!(
            "SELECT * FROM Msvm_VirtualSystemSettingData WHERE VirtualSystemType='{REALIZED}'"
        ))?;
        if settings.is_empty() {
            // To users without rights a host shows neither its VMs nor its services.
            if let Err(error @ HypervisorError::Denied { .. }) =
                self.service("Msvm_VirtualSystemManagementService")
            {
                return Err(error);
            }
            return Ok((Vec::new(), Vec::new()));
        }
        let systems = self.query("SELECT * FROM Msvm_ComputerSystem")?;
        let mut systems: HashMap<Uuid, CimInstance> = systems
            .into_iter()
            // The host itself is one too; its name is no GUID.
            .filter_map(|system| {
                let id = read::parse_uuid(system.text("Name").ok()?)?;
                Some((id, system))
            })
            .collect();
        let (mut vms, mut unreadable) = (Vec::new(), Vec::new());
        for instance in settings {
            let read = read::settings(instance.clone()).and_then(|settings| {
                let system = systems.remove(&settings.vm);
                system.map(|system| record(&system, settings)).transpose()
            });
            match read {
                Ok(vm) => vms.extend(vm),
                Err(error) => unreadable.push(UnreadableVm::of(instance, error)),
            }
        }
        vms.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        Ok((vms, unreadable))
    }

    /// One VM by its id.
    ///
    /// # Errors
    /// [`HypervisorError::NotFound`], or as [`from_cim`] says.
    pub fn vm(&self, id: Uuid) -> Result<VmRecord> {
        let id = guid(id);
        let not_found = || HypervisorError::NotFound {
            what: format!("the VM {id}"),
            detail: format!("{} has none with this id", self.peer()),
        };
        let settings = self.query(&format!(
            "SELECT * FROM Msvm_VirtualSystemSettingData WHERE VirtualSystemIdentifier={}",
            wql::quote(&id)
        ))?;
        let realized = |instance: &CimInstance| instance.text("VirtualSystemType") == Ok(REALIZED);
        let settings = settings.into_iter().find(realized).ok_or_else(not_found)?;
        let systems = self
            .query(&format!("SELECT * FROM Msvm_ComputerSystem WHERE Name={}", wql::quote(&id)))?;
        record(systems.first().ok_or_else(not_found)?, read::settings(settings)?)
    }

    /// Whether the host says that it is at a VM's checkpoints, or merges its disks.
    ///
    /// # Errors
    /// As [`from_cim`] says. A VM that is not there is at nothing.
    pub(crate) fn is_at_checkpoints(&self, id: Uuid) -> Result<bool> {
        let systems = self.query(&format!(
            "SELECT * FROM Msvm_ComputerSystem WHERE Name={}",
            wql::quote(&guid(id))
        ))?;
        let Some(system) = systems.first() else { return Ok(false) };
        let status = system.numbers("OperationalStatus").unwrap_or_default();
        Ok(status.iter().any(|one| AT_CHECKPOINTS.contains(one)))
    }

    /// One VM by its id, or else by its name: as it is written, or else without regard to case.
    ///
    /// # Errors
    /// [`HypervisorError::NotFound`]; [`HypervisorError::Failed`] where several VMs have the name, with
    /// their ids; or as [`from_cim`] says.
    pub fn find(&self, name_or_id: &str) -> Result<VmRecord> {
        if let Some(id) = read::parse_uuid(name_or_id) {
            match self.vm(id) {
                Err(HypervisorError::NotFound { .. }) => {}
                found => return found,
            }
        }
        // One whose storage is offline may tell nothing of itself; the others are worth finding all the same.
        let (vms, unreadable) = self.all_vms()?;
        for UnreadableVm { name, is_named, error, .. } in unreadable {
            if !is_named || name.to_lowercase() == name_or_id.to_lowercase() {
                return Err(error);
            }
            tracing::warn!(name, %error, "a VM cannot be read");
        }
        let exact: Vec<_> = vms.iter().filter(|vm| vm.name == name_or_id).collect();
        let folded = name_or_id.to_lowercase();
        let found = match exact.is_empty() {
            true => vms.iter().filter(|vm| vm.name.to_lowercase() == folded).collect(),
            false => exact,
        };
        match found.as_slice() {
            [vm] => Ok((*vm).clone()),
            [] => Err(HypervisorError::NotFound {
                what: format!("the VM {name_or_id}"),
                detail: format!("{} has no VM of this name or id", self.peer()),
            }),
            several => {
                let ids: Vec<_> = several.iter().map(|vm| guid(vm.id)).collect();
                Err(HypervisorError::failed(
                    format!("finding the VM {name_or_id}"),
                    format!("several VMs have this name: name one by its id: {}", ids.join(", ")),
                ))
            }
        }
    }
}

/// A VM that is there and of which the host tells less than it should, as where its storage is offline.
#[derive(Debug)]
pub(crate) struct UnreadableVm {
    /// Its name, or what else names it.
    pub name: String,
    /// Whether that is its name.
    pub is_named: bool,
    /// Its id, where that is told.
    pub id: Option<Uuid>,
    /// Its settings, as far as they go.
    pub settings: CimInstance,
    /// Why it cannot be read.
    pub error: HypervisorError,
}

impl UnreadableVm {
    fn of(settings: CimInstance, error: HypervisorError) -> Self {
        let text =
            |name| settings.optional_text(name).ok().flatten().filter(|text| !text.is_empty());
        let id = text("VirtualSystemIdentifier").and_then(read::parse_uuid);
        let named = text("ElementName").map(str::to_owned);
        let is_named = named.is_some();
        let name = named.or_else(|| id.map(|id| id.to_string()));
        let name = name.unwrap_or_else(|| "a VM without a name".into());
        Self { name, is_named, id, settings, error }
    }
}

fn record(system: &CimInstance, settings: VmSettings) -> Result<VmRecord> {
    // A computer system's key over WS-Management comes with the class it was made of.
    let path = match &system.path {
        Some(path) => path.clone(),
        None => {
            let mut keyed = system.clone();
            if keyed.value("CreationClassName").is_none() {
                keyed.set("CreationClassName", "Msvm_ComputerSystem");
            }
            path_of(&keyed, &SYSTEM_KEYS)?
        }
    };
    let name = system.optional_text("ElementName").map_err(from_cim)?;
    Ok(VmRecord {
        id: settings.vm,
        name: name.unwrap_or(&settings.name).to_owned(),
        state: read::state(system)?,
        path,
        settings,
    })
}
