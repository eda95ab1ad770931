//! Associations: what belongs to what.

use super::settings::class as class_of;
use super::{Named, numbers16};
use crate::schema::{Class, Schema};
use crate::state::{State, guid};
use vmtide_cim::{Association, CimInstance, CimType, CimValue, ObjectPath};

impl State {
    /// The instances of an association class; none for any other class.
    pub(super) fn association_instances(&self, class: &'static Class) -> Vec<CimInstance> {
        let pairs: Vec<Vec<Named>> = match class.name {
            "Msvm_AffectedJobElement" => self.affected_elements(),
            "Msvm_SettingsDefineState" => {
                let vms = self.vms.values().filter(|vm| !vm.planned);
                vms.map(|vm| {
                    let settings = self.path_of_settings(vm.id);
                    pair("ManagedElement", self.path_of_vm(vm), "SettingData", settings)
                })
                .collect()
            }
            "Msvm_SnapshotOfVirtualSystem" => self
                .snapshots
                .values()
                .filter_map(|snapshot| {
                    let vm = self.path_of_vm(self.vms.get(&snapshot.vm)?);
                    let settings = self.path_of_settings(snapshot.id);
                    Some(pair("Antecedent", vm, "Dependent", settings))
                })
                .collect(),
            "Msvm_MostCurrentSnapshotInBranch" => self
                .vms
                .values()
                .filter_map(|vm| {
                    let settings = self.path_of_settings(vm.current_parent?);
                    Some(pair("Antecedent", self.path_of_vm(vm), "Dependent", settings))
                })
                .collect(),
            "Msvm_LastAppliedSnapshot" => self
                .vms
                .values()
                .filter_map(|vm| {
                    let settings = self.path_of_settings(vm.last_applied?);
                    Some(pair("Antecedent", settings, "Dependent", self.path_of_vm(vm)))
                })
                .collect(),
            "Msvm_ReferencePointOfVirtualSystem" => self
                .points
                .values()
                .filter_map(|point| {
                    let vm = self.path_of_vm(self.vms.get(&point.vm)?);
                    Some(pair("Antecedent", vm, "Dependent", self.path_of_point(point)))
                })
                .collect(),
            "Msvm_VirtualSystemSettingDataComponent" => self.components(),
            "Msvm_SettingDataComponent" => self.guest_components(),
            "Msvm_EthernetPortSettingDataComponent" => self.port_features(),
            _ => Vec::new(),
        };
        pairs.into_iter().map(|values| self.shape(class, values)).collect()
    }

    fn affected_elements(&self) -> Vec<Vec<Named>> {
        let mut rows = Vec::new();
        for job in self.jobs.values() {
            for (element, effect) in &job.affected {
                let job = self.path_of_id("Msvm_ConcreteJob", &guid(job.id));
                let mut row = pair("AffectedElement", element.clone(), "AffectingElement", job);
                row.push(("ElementEffects", numbers16(&[*effect])));
                let none = CimValue::Array(CimType::String, vec!["".into()]);
                row.push(("OtherElementEffectsDescriptions", none));
                rows.push(row);
            }
        }
        rows
    }

    fn components(&self) -> Vec<Vec<Named>> {
        let mut rows = Vec::new();
        for (owner, _, configuration) in self.configurations() {
            let settings = self.path_of_settings(owner);
            for resource in &configuration.resources {
                let id = format!(r"Microsoft:{}\{}", guid(owner), resource.suffix);
                let part = self.path_of_id(&resource.class, &id);
                rows.push(pair("GroupComponent", settings.clone(), "PartComponent", part));
            }
        }
        rows
    }

    fn guest_components(&self) -> Vec<Vec<Named>> {
        let class = class_of("Msvm_GuestNetworkAdapterConfiguration");
        let rows = self.instances(class).into_iter().filter_map(|instance| {
            let path = instance.path.clone()?;
            let rest = path.key("InstanceID")?.strip_prefix(r"Microsoft:GuestNetwork\")?.to_owned();
            let (vm, suffix) = rest.split_once('\\')?;
            let resource = self.vms.get(&vm.parse().ok()?)?.configuration.resource(suffix)?;
            let port = self.path_of_id(&resource.class, &format!("Microsoft:{rest}"));
            Some(pair("GroupComponent", port, "PartComponent", path))
        });
        rows.collect()
    }

    /// Features of switch ports (VLANs): they hang on the connection of an adapter.
    fn port_features(&self) -> Vec<Vec<Named>> {
        let mut rows = Vec::new();
        for (owner, _, configuration) in self.configurations() {
            for feature in &configuration.resources {
                let base = "Msvm_EthernetSwitchPortFeatureSettingData";
                let port =
                    feature.parent.as_ref().and_then(|suffix| configuration.resource(suffix));
                let Some(port) = port.filter(|_| Schema::get().is_a(&feature.class, base)) else {
                    continue;
                };
                let id = |suffix: &str| format!(r"Microsoft:{}\{suffix}", guid(owner));
                let group = self.path_of_id(&port.class, &id(&port.suffix));
                let part = self.path_of_id(&feature.class, &id(&feature.suffix));
                rows.push(pair("GroupComponent", group, "PartComponent", part));
            }
        }
        rows
    }

    /// The association instances that refer to `path`, each with the name of its role.
    fn rows_of(&self, path: &ObjectPath, class: Option<&str>) -> Vec<(CimInstance, String)> {
        let is_association = |class: &Class| {
            class.properties.iter().any(|property| property.kind == CimType::Reference)
        };
        let classes: Vec<&'static Class> = match class {
            Some(name) => Schema::get().family(name),
            None => Schema::get().classes().collect(),
        };
        let mut rows = Vec::new();
        for class in classes.into_iter().filter(|class| is_association(class)) {
            for row in self.association_instances(class) {
                let role = row.properties.iter().find_map(|(name, value)| {
                    let here = value.as_reference()?;
                    same_object(&here, path).then(|| name.clone())
                });
                if let Some(role) = role {
                    rows.push((row, role));
                }
            }
        }
        rows
    }

    /// `REFERENCES OF`.
    pub(crate) fn references_of(&self, path: &ObjectPath, how: &Association) -> Vec<CimInstance> {
        let rows = self.rows_of(path, how.class.as_deref()).into_iter();
        let fits = |role: &str| how.role.as_deref().is_none_or(|wanted| wanted == role);
        rows.filter(|(_, role)| fits(role)).map(|(row, _)| row).collect()
    }

    /// `ASSOCIATORS OF`.
    pub(crate) fn associators_of(&self, path: &ObjectPath, how: &Association) -> Vec<CimInstance> {
        let mut found: Vec<CimInstance> = Vec::new();
        for (row, role) in self.rows_of(path, how.class.as_deref()) {
            if how.role.as_deref().is_some_and(|wanted| wanted != role) {
                continue;
            }
            for (name, value) in &row.properties {
                let Some(end) = value.as_reference().filter(|_| *name != role) else { continue };
                if !matches!(value, CimValue::Reference(_)) {
                    continue;
                }
                let class = how.result_class.as_deref();
                if class.is_some_and(|class| !Schema::get().is_a(&end.class, class)) {
                    continue;
                }
                if let Some(instance) = self.instance_at(&end)
                    && !found.iter().any(|known| known.path == instance.path)
                {
                    found.push(instance);
                }
            }
        }
        found
    }
}

fn pair(a: &'static str, first: ObjectPath, b: &'static str, second: ObjectPath) -> Vec<Named> {
    vec![(a, CimValue::Reference(first)), (b, CimValue::Reference(second))]
}

/// Whether two paths mean one object; the values of keys without regard to case.
fn same_object(a: &ObjectPath, b: &ObjectPath) -> bool {
    a.class == b.class
        && a.keys.len() == b.keys.len()
        && a.keys
            .iter()
            .all(|(name, value)| b.key(name).is_some_and(|other| other.eq_ignore_ascii_case(value)))
}
