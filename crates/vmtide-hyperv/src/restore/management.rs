//! The calls of `Msvm_VirtualSystemManagementService` that make VMs. Names and order of their parameters
//! are those of its method pages.

use super::host_path::is_within;
use crate::host::{Host, from_cim};
use crate::job::{JobEnd, JobOutcome, vanished};
use crate::model::codes;
use crate::model::read::{self, guid};
use crate::model::types::VmSettings;
use uuid::Uuid;
use vmtide_block::CancelToken;
use vmtide_cim::{CimInstance, CimType, CimValue, ObjectPath, wql};
use vmtide_hypervisor::{HypervisorError, Result};

/// The class of planned VMs.
const PLANNED_SYSTEM: &str = "Msvm_PlannedComputerSystem";

/// `RequestedState` of a VM that is to run.
const STATE_RUNNING: u16 = 2;

/// The management service of one host.
pub(super) struct Management<'a> {
    pub host: &'a Host,
    service: ObjectPath,
    cancel: &'a CancelToken,
}

/// A VM that is planned: it has settings, and does not exist yet.
#[derive(Clone, Debug)]
pub(super) struct PlannedVm {
    /// Its settings.
    pub settings: VmSettings,
}

impl PlannedVm {
    /// The path of its `Msvm_PlannedComputerSystem`.
    pub fn system(&self) -> ObjectPath {
        let id = guid(self.settings.vm);
        let keys = [("CreationClassName", PLANNED_SYSTEM), ("Name", id.as_str())];
        let mut path = ObjectPath::new(PLANNED_SYSTEM, &keys);
        path.host.clone_from(&self.settings.path.host);
        path
    }

    /// Whether its configuration lies in `directory`.
    pub fn comes_from(&self, directory: &str) -> bool {
        !directory.is_empty() && is_within(&self.settings.configuration_root, directory)
    }
}

impl<'a> Management<'a> {
    /// The service of `host`.
    ///
    /// # Errors
    /// Where the host does not answer, denies it, or has no such service.
    pub fn of(host: &'a Host, cancel: &'a CancelToken) -> Result<Self> {
        let service = host.service("Msvm_VirtualSystemManagementService")?;
        Ok(Self { host, service, cancel })
    }

    /// A path as the text that embedded instances refer to objects by: with the host's own name.
    pub fn text_of(&self, path: &ObjectPath) -> String {
        let mut path = path.clone();
        if path.host.is_none() {
            path.host = self.service.key("SystemName").map(str::to_owned);
        }
        path.to_string()
    }

    /// `DefineSystem`: makes a VM with default devices, which is found by its name.
    pub fn define(&self, settings: &CimInstance) -> Result<()> {
        let parameters = [("SystemSettings", embedded(settings)?)];
        self.call("DefineSystem", &parameters, "make the VM").map(drop)
    }

    /// `AddResourceSettings`, one resource at a time, so that what comes back is that one. None where the
    /// host does not name it.
    pub fn add(
        &self,
        settings: &ObjectPath,
        resource: &CimInstance,
        what: &str,
    ) -> Result<Option<ObjectPath>> {
        let parameters = [
            ("AffectedConfiguration", CimValue::from(settings)),
            ("ResourceSettings", embedded_all(std::slice::from_ref(resource))?),
        ];
        let done =
            self.call("AddResourceSettings", &parameters, &format!("add {what} to the VM"))?;
        Ok(done.result("ResultingResourceSettings", &resource.class))
    }

    /// `AddFeatureSettings` of a switch port.
    pub fn add_feature(&self, port: &ObjectPath, feature: &CimInstance, what: &str) -> Result<()> {
        let parameters = [
            ("AffectedConfiguration", CimValue::from(port)),
            ("FeatureSettings", embedded_all(std::slice::from_ref(feature))?),
        ];
        self.call("AddFeatureSettings", &parameters, what).map(drop)
    }

    /// `ModifyResourceSettings`: each names its resource by `InstanceID`; what it does not hold is left.
    pub fn modify_resources(&self, resources: &[CimInstance], what: &str) -> Result<()> {
        if resources.is_empty() {
            return Ok(());
        }
        let parameters = [("ResourceSettings", embedded_all(resources)?)];
        self.call("ModifyResourceSettings", &parameters, what).map(drop)
    }

    /// `RemoveResourceSettings`.
    pub fn remove_resources(&self, resources: &[ObjectPath], what: &str) -> Result<()> {
        if resources.is_empty() {
            return Ok(());
        }
        let paths = resources.iter().cloned().map(CimValue::Reference).collect();
        let parameters = [("ResourceSettings", CimValue::Array(CimType::Reference, paths))];
        self.call("RemoveResourceSettings", &parameters, what).map(drop)
    }

    /// `ModifySystemSettings`.
    pub fn modify_system(&self, settings: &CimInstance, what: &str) -> Result<()> {
        let parameters = [("SystemSettings", embedded(settings)?)];
        self.call("ModifySystemSettings", &parameters, what).map(drop)
    }

    /// `ImportSystemDefinition`: plans a VM from a `.vmcx`. Answers with its id where the host names it.
    pub fn import(&self, file: &str, snapshots: &str, new_id: bool) -> Result<Option<Uuid>> {
        let parameters = [
            ("SystemDefinitionFile", CimValue::from(file)),
            ("SnapshotFolder", CimValue::from(snapshots)),
            ("GenerateNewSystemIdentifier", CimValue::from(new_id)),
        ];
        let what = format!("import the configuration {file}");
        let done = self.call("ImportSystemDefinition", &parameters, &what)?;
        let system = done.result("ImportedSystem", PLANNED_SYSTEM);
        Ok(system.and_then(|path| Uuid::parse_str(path.key("Name")?).ok()))
    }

    /// `ValidatePlannedSystem`: what the host has against the VM, as warnings of the job.
    pub fn validate(&self, planned: &PlannedVm) -> Result<Vec<String>> {
        let parameters = [("PlannedSystem", CimValue::Reference(planned.system()))];
        let done = self.call("ValidatePlannedSystem", &parameters, "check the planned VM")?;
        Ok(done.outcome.warnings)
    }

    /// `RealizePlannedSystem`: the planned VM becomes a VM.
    pub fn realize(&self, planned: &PlannedVm) -> Result<()> {
        let parameters = [("PlannedSystem", CimValue::Reference(planned.system()))];
        self.call("RealizePlannedSystem", &parameters, "register the planned VM").map(drop)
    }

    /// `DestroySystem` of a VM or a planned one. Its disks stay.
    pub fn destroy(&self, system: &ObjectPath, what: &str) -> Result<()> {
        let parameters = [("AffectedSystem", CimValue::from(system))];
        self.call("DestroySystem", &parameters, &format!("remove {what}")).map(drop)
    }

    /// `RequestStateChange` of a VM: starts it.
    pub fn start(&self, vm: &ObjectPath, name: &str) -> Result<()> {
        let parameters = [("RequestedState", CimValue::Uint16(STATE_RUNNING))];
        let what = format!("start {name}");
        self.host.call(vm, "RequestStateChange", &parameters, &what, self.cancel).map(drop)
    }

    /// The planned VMs.
    pub fn planned(&self) -> Result<Vec<PlannedVm>> {
        let kind = wql::quote("Microsoft:Hyper-V:System:Planned");
        let found = self.host.query(&format!(
            "SELECT * FROM Msvm_VirtualSystemSettingData WHERE VirtualSystemType={kind}"
        ))?;
        found
            .into_iter()
            .map(|instance| Ok(PlannedVm { settings: read::settings(instance)? }))
            .collect()
    }

    fn call(&self, method: &str, parameters: &[(&str, CimValue)], what: &str) -> Result<Done> {
        self.cancel.check()?;
        let (output, job) = self.host.begin(&self.service, method, parameters, what)?;
        let outcome = match job {
            None => JobOutcome::default(),
            Some(job) => match self.host.follow(&job, what, self.cancel)? {
                JobEnd::Done(outcome) => outcome,
                JobEnd::Failed { code, detail } if codes::is_last_word(code) => {
                    return Err(codes::error(what, code, &detail));
                }
                // Nobody knows how it ended, or whether it has.
                JobEnd::Failed { code, detail } => {
                    return Err(self.open_end(&codes::error(what, code, &detail)));
                }
                JobEnd::Vanished => return Err(self.open_end(&vanished(what))),
            },
        };
        Ok(Done { output: output.parameters, outcome })
    }

    /// The host may still be at it: an error of the class that says so.
    fn open_end(&self, error: &HypervisorError) -> HypervisorError {
        HypervisorError::protocol(self.host.peer(), error.to_string())
    }
}

/// What a method has done.
#[derive(Debug)]
struct Done {
    output: CimInstance,
    outcome: JobOutcome,
}

impl Done {
    /// The object of a class that came of it: the out parameter, where the method ended at once, else the
    /// first of its kind that the job names. None where the host names none; the caller looks for it then.
    fn result(&self, parameter: &str, class: &str) -> Option<ObjectPath> {
        let elements = self.output.value(parameter).map_or(&[][..], CimValue::elements);
        let named = elements.iter().find_map(CimValue::as_reference);
        let is_kind = |path: &&ObjectPath| path.class.eq_ignore_ascii_case(class);
        named.or_else(|| self.outcome.affected.iter().find(is_kind).cloned())
    }
}

fn embedded(instance: &CimInstance) -> Result<CimValue> {
    let text = vmtide_cim::xml::to_xml(instance).map_err(from_cim)?;
    Ok(CimValue::String(text))
}

fn embedded_all(instances: &[CimInstance]) -> Result<CimValue> {
    let texts: Vec<_> = instances.iter().map(embedded).collect::<Result<_>>()?;
    Ok(CimValue::Array(CimType::String, texts))
}
