//! Configuration files: what the host writes beside its VMs, and reads when one is imported.
//!
//! The real `.vmcx` is an undocumented binary format. The stand-in's is text of its own, and says so in its
//! first line: whoever looks into the file instead of handing it back notices.

use crate::embedded;
use crate::images::{local_path, name_of};
use crate::state::{Configuration, Resource, Snapshot, State, Vm, guid};
use std::io;
use std::path::PathBuf;
use uuid::Uuid;
use vmtide_cim::CimInstance;

/// The first line of a configuration file.
const MAGIC: &str = "configuration of the stand-in Hyper-V host, not a real vmcx";

/// A configuration as a file holds it.
pub(crate) struct Definition {
    pub(crate) vm: Uuid,
    pub(crate) configuration: Configuration,
}

impl Definition {
    /// Writes it.
    pub(crate) fn to_text(&self) -> String {
        let line = |text: String| text.replace('\r', "&#13;").replace('\n', "&#10;");
        let mut text = format!("{MAGIC}\n{}\n", guid(self.vm));
        text.push_str(&line(embedded::write(&self.configuration.settings)));
        text.push('\n');
        for resource in &self.configuration.resources {
            let parent = resource.parent.as_deref().unwrap_or_default();
            let values = line(embedded::write(&resource.values));
            text.push_str(&format!("{}\t{parent}\t{values}\n", resource.suffix));
        }
        text
    }

    /// Reads it.
    pub(crate) fn from_text(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        if lines.next() != Some(MAGIC) {
            return None;
        }
        let vm = lines.next()?.parse().ok()?;
        let settings = without_nulls(embedded::read(lines.next()?).ok()?);
        let mut resources = Vec::new();
        for line in lines {
            let mut parts = line.splitn(3, '\t');
            let (suffix, parent) = (parts.next()?, parts.next()?);
            let values = without_nulls(embedded::read(parts.next()?).ok()?);
            resources.push(Resource {
                class: values.class.clone(),
                suffix: suffix.to_owned(),
                parent: (!parent.is_empty()).then(|| parent.to_owned()),
                values,
            });
        }
        Some(Self { vm, configuration: Configuration { settings, resources } })
    }
}

fn without_nulls(mut instance: CimInstance) -> CimInstance {
    instance.properties.retain(|(_, value)| *value != vmtide_cim::CimValue::Null);
    instance
}

/// The files of a configuration, as the host names them: `.vmcx`, `.vmrs`, and `.vmgs` where there is one.
pub(crate) fn files_of(configuration: &Configuration) -> Vec<String> {
    let root = configuration.text("ConfigurationDataRoot");
    let file = configuration.text("ConfigurationFile");
    let stem = file.strip_suffix(".vmcx").unwrap_or(file);
    let mut files = vec![format!(r"{root}\{file}"), format!(r"{root}\{stem}.vmrs")];
    let state = configuration.text("GuestStateFile");
    if !state.is_empty() {
        files.push(format!(r"{}\{state}", configuration.text("GuestStateDataRoot")));
    }
    files
}

impl State {
    /// Writes the configuration files of a VM.
    pub(crate) fn write_vm_files(&self, vm: &Vm) -> io::Result<()> {
        self.write_files(vm.id, &vm.configuration)
    }

    /// Writes the configuration files of a checkpoint.
    pub(crate) fn write_snapshot_files(&self, snapshot: &Snapshot) -> io::Result<()> {
        self.write_files(snapshot.vm, &snapshot.configuration)
    }

    fn write_files(&self, vm: Uuid, configuration: &Configuration) -> io::Result<()> {
        let definition = Definition { vm, configuration: configuration.clone() };
        let text = definition.to_text();
        for (number, file) in files_of(configuration).iter().enumerate() {
            let local = self.file(file)?;
            if let Some(directory) = local.parent() {
                std::fs::create_dir_all(directory)?;
            }
            // Of the state of the running VM and of its firmware nothing is known but that they are there.
            let other = format!("{} of {}", name_of(file), guid(vm));
            std::fs::write(local, if number == 0 { text.as_str() } else { other.as_str() })?;
        }
        Ok(())
    }

    /// Removes the files of a configuration; those that are gone are no matter.
    pub(crate) fn remove_configuration_files(&self, configuration: &Configuration) {
        for file in files_of(configuration) {
            if let Some(local) = self.local(&file) {
                drop(std::fs::remove_file(local));
            }
        }
    }

    /// Writes the configuration of a VM into a directory, as an export without disks does.
    pub(crate) fn export_configuration(&self, vm: Uuid, directory: &str) -> io::Result<()> {
        let Some(found) = self.vms.get(&vm) else { return Err(io::ErrorKind::NotFound.into()) };
        let mut configuration = found.configuration.clone();
        let name = configuration.text("ElementName").to_owned();
        configuration.settings.set("ConfigurationDataRoot", format!(r"{directory}\{name}"));
        self.write_files(vm, &configuration)
    }

    fn file(&self, path: &str) -> io::Result<PathBuf> {
        local_path(&self.root, path).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}
