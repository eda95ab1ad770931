//! Settings of VMs and checkpoints, and their resources.

use super::{Named, number16};
use crate::schema::{Class, Schema};
use crate::state::{Configuration, State, guid};
use uuid::Uuid;
use vmtide_cim::{CimInstance, CimValue};

impl State {
    /// The configurations that there are: of VMs and of checkpoints.
    pub(crate) fn configurations(&self) -> impl Iterator<Item = (Uuid, Uuid, &Configuration)> {
        let vms = self.vms.values().map(|vm| (vm.id, vm.id, &vm.configuration));
        let snapshots = self.snapshots.values().map(|s| (s.id, s.vm, &s.configuration));
        vms.chain(snapshots)
    }

    pub(super) fn setting_instances(&self, class: &'static Class) -> Vec<CimInstance> {
        match class.name {
            "Msvm_VirtualSystemSettingData" => self
                .configurations()
                .map(|(id, vm, configuration)| self.settings_instance(class, id, vm, configuration))
                .collect(),
            "Msvm_DiskMergeSettingData" => self
                .vms
                .values()
                .map(|vm| {
                    let state = CimValue::Uint32(u32::from(!vm.merges_off));
                    let id = format!(r"Microsoft:{}\DiskMerge", guid(vm.id));
                    let values = vec![("InstanceID", id.into()), ("EnabledState", state)];
                    self.shape(class, values)
                })
                .collect(),
            "Msvm_GuestNetworkAdapterConfiguration" => self.guest_networks(class),
            "Msvm_VirtualSystemManagementServiceSettingData" => {
                vec![self.shape(class, self.service_settings())]
            }
            _ => {
                let all = self.configurations();
                all.flat_map(|(id, _, configuration)| {
                    let of_class = |r: &&crate::state::Resource| r.class == class.name;
                    let resources = configuration.resources.iter().filter(of_class);
                    resources.map(move |resource| self.resource_instance(class, id, resource))
                })
                .collect()
            }
        }
    }

    fn settings_instance(
        &self,
        class: &'static Class,
        id: Uuid,
        vm: Uuid,
        configuration: &Configuration,
    ) -> CimInstance {
        let mut values = named(class, &configuration.settings);
        values.retain(|(name, _)| !matches!(*name, "InstanceID" | "VirtualSystemIdentifier"));
        values.push(("InstanceID", format!("Microsoft:{}", guid(id)).into()));
        values.push(("VirtualSystemIdentifier", guid(vm).into()));
        let parent = match (self.snapshots.get(&id), self.vms.get(&id)) {
            (Some(snapshot), _) => snapshot.parent,
            (None, Some(vm)) => vm.current_parent,
            (None, None) => None,
        };
        if let Some(parent) = parent.filter(|parent| self.snapshots.contains_key(parent)) {
            values.push(("Parent", self.path_of_settings(parent).to_string().into()));
        }
        self.shape(class, values)
    }

    /// A resource, under the id of the VM or checkpoint that it belongs to.
    fn resource_instance(
        &self,
        class: &'static Class,
        owner: Uuid,
        resource: &crate::state::Resource,
    ) -> CimInstance {
        let mut values = named(class, &resource.values);
        values.retain(|(name, _)| !matches!(*name, "InstanceID" | "Parent"));
        let id = format!(r"Microsoft:{}\{}", guid(owner), resource.suffix);
        values.push(("InstanceID", id.into()));
        let configurations = self.configurations().find(|(id, _, _)| *id == owner);
        let parent = resource.parent.as_ref().and_then(|suffix| {
            let parent = configurations?.2.resource(suffix)?;
            let id = format!(r"Microsoft:{}\{}", guid(owner), parent.suffix);
            Some(self.path_of_id(&parent.class, &id).to_string())
        });
        if let Some(parent) = parent.filter(|_| class.property("Parent").is_some()) {
            values.push(("Parent", parent.into()));
        }
        self.shape(class, values)
    }

    /// What the guests say of their adapters, or that they take addresses from a server.
    fn guest_networks(&self, class: &'static Class) -> Vec<CimInstance> {
        let mut found = Vec::new();
        for vm in self.vms.values().filter(|vm| !vm.planned) {
            let adapters = vm.configuration.resources.iter();
            let is_adapter = |class: &str| class.ends_with("EthernetPortSettingData");
            for adapter in adapters.filter(|resource| is_adapter(&resource.class)) {
                let id = format!(r"Microsoft:GuestNetwork\{}\{}", guid(vm.id), adapter.suffix);
                let mut values = vec![
                    ("ProtocolIFType", number16(4096)),
                    ("DHCPEnabled", CimValue::Boolean(true)),
                ];
                if let Some(set) = vm.guest_networks.get(&adapter.suffix) {
                    values = named(class, set);
                    values.retain(|(name, _)| *name != "InstanceID");
                }
                values.push(("InstanceID", id.into()));
                found.push(self.shape(class, values));
            }
        }
        found
    }

    fn service_settings(&self) -> Vec<Named> {
        let host = self.options.host_name.as_str();
        vec![
            ("InstanceID", format!("Microsoft:{host}").into()),
            ("DefaultExternalDataRoot", r"C:\ProgramData\Microsoft\Windows\Hyper-V".into()),
            (
                "DefaultVirtualHardDiskPath",
                r"C:\Users\Public\Documents\Hyper-V\Virtual Hard Disks".into(),
            ),
            ("NumaSpanningEnabled", true.into()),
        ]
    }
}

/// The properties of an instance by the names of its class.
fn named(class: &'static Class, instance: &CimInstance) -> Vec<Named> {
    let values = instance.properties.iter();
    values.filter_map(|(name, value)| Some((class.property(name)?.name, value.clone()))).collect()
}

/// The class of that name, which the stand-in itself knows to be there.
pub(crate) fn class(name: &str) -> &'static Class {
    Schema::get().class(name).unwrap_or_else(|| panic!("there is no class {name}"))
}
