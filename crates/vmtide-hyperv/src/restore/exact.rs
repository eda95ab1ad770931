//! The exact route: the VM's own configuration files are imported as a planned VM, whose disks, network
//! connections and places are changed before the host makes a VM of it. Every setting is as it was.
//!
//! Files of a checkpoint are imported as well as those of a VM; a planned VM is found by what its import
//! answered, else by what was not there before.

use super::host_path::join;
use super::journal::{RestoreJournal, Step};
use super::management::{Management, PlannedVm};
use super::native::ConfigurationFiles;
use super::network::{self, CONNECTION_CLASS, Switches};
use super::portable::{LOGICAL_DISK, ROOTS, VIRTUAL_HARD_DISK};
use crate::files::HostFiles;
use crate::host::{from_cim, path_of};
use crate::model::disks::host_resource;
use std::collections::BTreeMap;
use uuid::Uuid;
use vmtide_cim::{CimInstance, CimValue, ObjectPath};
use vmtide_hypervisor::{DiskId, HypervisorError, NetworkPlan, Result, VmConfig};

/// The class of what is in drives.
const STORAGE: &str = "Msvm_StorageAllocationSettingData";

/// An address that tells the host to give one.
const NO_ADDRESS: &str = "000000000000";

/// Imports VMs.
pub(super) struct Exact<'a> {
    pub management: &'a Management<'a>,
    pub files: &'a dyn HostFiles,
    pub configuration: &'a ConfigurationFiles,
    pub config: &'a VmConfig,
    /// The file of each disk.
    pub disks: &'a BTreeMap<DiskId, String>,
    /// The directory of the VM.
    pub directory: &'a str,
    /// Where the configuration files are put to be imported.
    pub import_directory: &'a str,
    /// The name until it is complete.
    pub name: &'a str,
    /// The id to keep; none has the host give a new one.
    pub keeps_id: Option<Uuid>,
    pub networks: &'a NetworkPlan,
}

impl Exact<'_> {
    /// Plans the VM and gives it the name that tells it is not complete. Answers with it and warnings.
    pub fn plan(&self, journal: &mut RestoreJournal) -> Result<(PlannedVm, Vec<String>)> {
        self.write_files(journal)?;
        let before: Vec<_> =
            self.management.planned()?.iter().map(|planned| planned.settings.vm).collect();
        let disks = self.config.disks.iter().filter_map(|disk| disk.path.clone());
        journal.record(&Step::Import {
            before: before.clone(),
            keeps_id: self.keeps_id,
            disks: disks.collect(),
            directory: self.directory.to_owned(),
        })?;
        let file = join(self.import_directory, self.configuration.definition());
        let named =
            self.management.import(&file, self.import_directory, self.keeps_id.is_none())?;
        let planned = self.find(named, &before)?;
        journal.record(&Step::System { id: planned.settings.vm })?;
        self.move_and_rename(&planned)?;
        let warnings = self.adapt(&planned)?;
        Ok((planned, warnings))
    }

    fn write_files(&self, journal: &mut RestoreJournal) -> Result<()> {
        journal.record(&Step::Directory { path: self.import_directory.into(), temporary: true })?;
        self.files.create_directory(self.import_directory)?;
        for (name, content) in &self.configuration.files {
            let path = join(self.import_directory, name);
            journal.record(&Step::File { path: path.clone(), temporary: true })?;
            self.files.write_file(&path, content)?;
        }
        Ok(())
    }

    fn find(&self, named: Option<Uuid>, before: &[Uuid]) -> Result<PlannedVm> {
        let is_ours = |planned: &PlannedVm| match named.or(self.keeps_id) {
            Some(id) => planned.settings.vm == id,
            None => !before.contains(&planned.settings.vm),
        };
        let mut found = self.management.planned()?.into_iter().filter(is_ours);
        match (found.next(), found.next()) {
            (Some(planned), None) => Ok(planned),
            (None, _) => Err(HypervisorError::protocol(
                self.management.host.peer(),
                "the VM that was imported is not among the planned ones",
            )),
            (Some(_), Some(_)) => Err(HypervisorError::failed(
                "import the configuration",
                "the host does not say which planned VM is ours, and somebody else plans one just now; \
                 try again",
            )),
        }
    }

    fn move_and_rename(&self, planned: &PlannedVm) -> Result<()> {
        let mut change = CimInstance::new("Msvm_VirtualSystemSettingData")
            .with("InstanceID", planned.settings.instance_id.as_str())
            .with("ElementName", self.name);
        let name_only = change.clone();
        for root in ROOTS {
            change.set(root, self.directory);
        }
        match self.management.modify_system(&change, "give the planned VM its place") {
            // The pages call these places read-only. A host that keeps to that has them from where the
            // files lie, which is in the VM's directory too.
            Err(HypervisorError::Failed { .. }) => {
                self.management.modify_system(&name_only, "mark the planned VM as incomplete")
            }
            done => done,
        }
    }

    /// Disks, media and network connections.
    fn adapt(&self, planned: &PlannedVm) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        self.disconnect(planned, &mut warnings)?;
        self.replace_disks(planned, &mut warnings)?;
        self.eject_media(planned, &mut warnings)?;
        Ok(warnings)
    }

    fn replace_disks(&self, planned: &PlannedVm, warnings: &mut Vec<String>) -> Result<()> {
        let mut changed = Vec::new();
        let mut removed = Vec::new();
        let mut placed = Vec::new();
        for disk in self.management.host.disks(&planned.settings)? {
            let id = DiskId(disk.location.to_string());
            match self.disks.get(&id) {
                Some(file) if !disk.pass_through => {
                    changed.push(
                        CimInstance::new(STORAGE)
                            .with("InstanceID", disk.instance_id.as_str())
                            .with("ResourceType", CimValue::Uint16(LOGICAL_DISK))
                            .with("ResourceSubType", VIRTUAL_HARD_DISK)
                            .with("HostResource", CimValue::strings([file.as_str()])),
                    );
                    placed.push(id);
                }
                _ => {
                    warnings.push(format!(
                        "disk {id} ({}) was not restored: it is not attached any more",
                        disk.host_resource
                    ));
                    removed.push(disk.path.clone());
                }
            }
        }
        if let Some(missing) = self.disks.keys().find(|id| !placed.contains(id)) {
            return Err(HypervisorError::failed(
                "attach the disks",
                format!(
                    "the configuration that was imported has no virtual disk at {missing}; restore with \
                     --route portable"
                ),
            ));
        }
        self.management.modify_resources(&changed, "attach the restored disks")?;
        self.management.remove_resources(&removed, "detach disks that were not restored")
    }

    /// Takes media out of DVD and diskette drives: their files may not be on this host, and then the VM
    /// would not start.
    fn eject_media(&self, planned: &PlannedVm, warnings: &mut Vec<String>) -> Result<()> {
        let mut media = Vec::new();
        for one in self.management.host.resources_of_class(&planned.settings, STORAGE)? {
            let subtype = one.optional_text("ResourceSubType").map_err(from_cim)?;
            if subtype.is_none_or(|subtype| subtype == VIRTUAL_HARD_DISK) {
                continue;
            }
            if let Some(file) = host_resource(&one)? {
                warnings.push(format!("{file} is not in its drive any more"));
                media.push(path_of(&one, &["InstanceID"])?);
            }
        }
        self.management.remove_resources(&media, "take media out of drives")
    }

    /// Connections: none but those asked for; addresses: a copy's are the host's to give.
    fn disconnect(&self, planned: &PlannedVm, warnings: &mut Vec<String>) -> Result<()> {
        let host = self.management.host;
        let mut switches = Switches::default();
        let mut changes = Vec::new();
        for connection in host.resources_of_class(&planned.settings, CONNECTION_CLASS)? {
            let id = connection.text("InstanceID").map_err(from_cim)?;
            let old = self.network_of(&connection)?;
            let wanted = self.networks.target_of(old.as_deref());
            let switch = match wanted {
                Some(name) => switches.find(self.management, name)?,
                None => None,
            };
            if let (Some(wanted), None) = (wanted, &switch) {
                let adapter = connection.optional_text("ElementName").ok().flatten();
                warnings.push(switches.missing(adapter.unwrap_or(id), wanted));
            }
            changes.push(match &switch {
                Some(switch) => network::connected(self.management, id, switch),
                None => network::disconnected(id),
            });
        }
        if self.keeps_id.is_none() {
            for class in
                ["Msvm_SyntheticEthernetPortSettingData", "Msvm_EmulatedEthernetPortSettingData"]
            {
                for port in host.resources_of_class(&planned.settings, class)? {
                    changes.push(
                        CimInstance::new(class)
                            .with("InstanceID", port.text("InstanceID").map_err(from_cim)?)
                            .with("StaticMacAddress", false)
                            .with("Address", NO_ADDRESS),
                    );
                }
            }
        }
        self.management.modify_resources(&changes, "disconnect the network adapters")
    }

    /// The network that a connection of the imported VM was connected to: what the restore point says of
    /// its adapter, else what the connection remembers.
    fn network_of(&self, connection: &CimInstance) -> Result<Option<String>> {
        let parent: Option<ObjectPath> =
            connection.optional_reference("Parent").map_err(from_cim)?;
        let port = parent.as_ref().and_then(|path| path.key("InstanceID"));
        let own = |id: &str| id.rsplit('\\').next().unwrap_or(id).to_lowercase();
        let known = self.config.network_adapters.iter();
        let adapter =
            port.and_then(|port| known.clone().find(|adapter| own(&adapter.id) == own(port)));
        if let Some(adapter) = adapter {
            return Ok(adapter.network.clone());
        }
        let remembered = connection.optional_text("LastKnownSwitchName").map_err(from_cim)?;
        Ok(remembered.filter(|name| !name.is_empty()).map(str::to_owned))
    }
}
