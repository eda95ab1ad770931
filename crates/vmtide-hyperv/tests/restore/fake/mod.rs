//! A stand-in for the parts of a Hyper-V host that a restore uses: its management objects and its files, in
//! memory. Strict about classes, types, parents and states; faults can be switched on at every call.

mod files;
mod methods;
mod objects;

use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use uuid::Uuid;
use vmtide_block::MemoryDevice;
use vmtide_cim::{
    Association, Cim, CimError, CimInstance, CimValue, MethodOutput, ObjectPath, Result,
};
use vmtide_hyperv::{Clock, Host, HostOptions, NewDisk};
use vmtide_hypervisor::HypervisorError;

pub use objects::{System, SystemBuilder, guid};

/// The name of the host.
pub const HOST: &str = "HV1";

/// What goes wrong, and at which call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call is refused and has no effect.
    Refused,
    /// The call has its effect, and its answer is lost.
    Lost,
    /// From this call on nothing reaches the host.
    Dead,
    /// The call has its effect, and nothing reaches the host any more.
    DeadAfter,
}

/// How the host answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manners {
    /// Methods start jobs instead of ending at once.
    pub jobs: bool,
    /// Results are not named.
    pub silent: bool,
    /// All values are text, as over WS-Management.
    pub text: bool,
    /// Imports are refused with this code.
    pub refuses_imports: Option<u32>,
}

#[derive(Default)]
pub struct State {
    pub systems: Vec<System>,
    pub checkpoints: Vec<CimInstance>,
    pub points: Vec<CimInstance>,
    pub switches: Vec<(String, String)>,
    pub files: BTreeMap<String, File>,
    pub directories: BTreeSet<String>,
    /// What `.vmcx` files hold, by the number in them.
    pub exports: Vec<System>,
    pub changes: Option<vmtide_block::RangeSet>,
    pub manners: Manners,
    pub calls: usize,
    pub fault: Option<(usize, Fault)>,
    /// A second one.
    pub fault_again: Option<(usize, Fault)>,
    pub dead: bool,
    pub space_bytes: u64,
    /// What was done, in words, for tests of order.
    pub log: Vec<String>,
    jobs: BTreeMap<String, Vec<ObjectPath>>,
    next_id: u128,
}

/// A file of the host.
#[derive(Clone)]
pub struct File {
    pub path: String,
    pub content: Content,
}

#[derive(Clone)]
pub enum Content {
    Bytes(Vec<u8>),
    Disk { device: Arc<MemoryDevice>, new: NewDisk, open: Arc<()> },
}

/// The host. Clones are the same one.
#[derive(Clone)]
pub struct FakeHost(pub Arc<Mutex<State>>);

/// Time that passes without waiting.
struct NoTime;

impl Clock for NoTime {
    fn now_ms(&self) -> u64 {
        0
    }
    fn sleep_ms(&self, _ms: u64) {}
}

impl FakeHost {
    pub fn new() -> Self {
        let state = State {
            space_bytes: 1 << 40,
            switches: vec![("LAN".into(), guid(0xA1)), ("Lab".into(), guid(0xA2))],
            directories: [r"c:\", r"c:\hyper-v", r"d:\"].into_iter().map(str::to_owned).collect(),
            next_id: 0x1000,
            ..State::default()
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// As those see it that work with it.
    pub fn host(&self) -> Host {
        let options = HostOptions { clock: Arc::new(NoTime), ..HostOptions::default() };
        Host::new(Arc::new(self.clone()), options)
    }

    pub fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.lock());
    }

    /// All that is there: systems, files, directories.
    pub fn inventory(&self) -> Vec<String> {
        let state = self.0.lock();
        let systems = state.systems.iter().map(|system| {
            format!(
                "{} {} {}",
                if system.planned { "planned" } else { "vm" },
                system.id,
                system.name()
            )
        });
        let files = state.files.values().map(|file| format!("file {}", file.path));
        let directories = state.directories.iter().map(|path| format!("directory {path}"));
        let mut all: Vec<_> = systems.chain(files).chain(directories).collect();
        all.sort();
        all
    }

    /// A call begins. Answers with the fault that comes after its effect.
    fn begin(&self, what: &str) -> std::result::Result<Option<Fault>, Fault> {
        let mut state = self.0.lock();
        if state.dead {
            return Err(Fault::Dead);
        }
        state.calls += 1;
        let mut faults = [state.fault, state.fault_again].into_iter().flatten();
        let fault = faults.find(|(at, _)| *at == state.calls).map(|(_, fault)| fault);
        state.log.push(what.to_owned());
        match fault {
            None => Ok(None),
            Some(fault @ (Fault::Lost | Fault::DeadAfter)) => {
                state.dead = fault == Fault::DeadAfter;
                Ok(Some(fault))
            }
            Some(fault) => {
                state.dead = fault == Fault::Dead;
                Err(fault)
            }
        }
    }

    /// Runs a management call under the fault plan.
    fn cim<T>(&self, what: &str, call: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let fault = self.begin(what).map_err(|fault| cim_error(what, fault))?;
        let answer = call(&mut self.0.lock());
        match fault {
            Some(fault) => answer.and(Err(cim_error(what, fault))),
            None => answer,
        }
    }

    /// Runs a call on files under the fault plan.
    fn file<T>(
        &self,
        what: &str,
        call: impl FnOnce(&mut State) -> vmtide_hypervisor::Result<T>,
    ) -> vmtide_hypervisor::Result<T> {
        let error = |_| HypervisorError::failed(what, "switched on");
        let fault = self.begin(what).map_err(error)?;
        let answer = call(&mut self.0.lock());
        match fault {
            Some(fault) => answer.and(Err(error(fault))),
            None => answer,
        }
    }
}

fn cim_error(what: &str, fault: Fault) -> CimError {
    match fault {
        Fault::Refused => {
            CimError::Fault { action: what.into(), detail: "switched on".into(), code: None }
        }
        Fault::Lost => CimError::Timeout { action: what.into(), timeout_ms: 1 },
        Fault::Dead | Fault::DeadAfter => CimError::Unreachable {
            peer: HOST.into(),
            detail: "switched off".into(),
            before_request: fault == Fault::Dead,
        },
    }
}

/// A fault of the provider.
pub fn fault(detail: impl Into<String>) -> CimError {
    CimError::Fault { action: "a call".into(), detail: detail.into(), code: Some(0x8004_1008) }
}

impl Cim for FakeHost {
    fn peer(&self) -> &str {
        "https://hv1:5986"
    }

    fn query(&self, namespace: &str, wql: &str) -> Result<Vec<CimInstance>> {
        if namespace != vmtide_cim::VIRTUALIZATION_NAMESPACE {
            return Err(fault(format!("only Hyper-V's namespace is here, not {namespace}")));
        }
        self.cim(&format!("query {wql}"), |state| {
            let found = objects::query(state, wql)?;
            Ok(found.into_iter().map(|one| objects::answered(one, state.manners)).collect())
        })
    }

    fn get(&self, path: &ObjectPath) -> Result<CimInstance> {
        self.cim(&format!("get {path}"), |state| match path.class.as_str() {
            "Msvm_ConcreteJob" => {
                let known = path.key("InstanceID").is_some_and(|id| state.jobs.contains_key(id));
                assert!(known, "a job that is none: {path}");
                let job =
                    CimInstance::new("Msvm_ConcreteJob").with("JobState", CimValue::Uint16(7));
                Ok(objects::answered(job, state.manners))
            }
            _ => Err(fault(format!("get {path}"))),
        })
    }

    fn associators(
        &self,
        path: &ObjectPath,
        association: &Association,
    ) -> Result<Vec<CimInstance>> {
        Err(fault(format!("no associations here: {path} {association:?}")))
    }

    fn references(&self, path: &ObjectPath, association: &Association) -> Result<Vec<CimInstance>> {
        self.cim(&format!("references of {path}"), |state| {
            assert_eq!(association.class.as_deref(), Some("Msvm_AffectedJobElement"));
            let id = path.key("InstanceID").ok_or_else(|| fault("no job"))?;
            let affected = state.jobs.get(id).cloned().ok_or_else(|| fault("no such job"))?;
            let row = |path: ObjectPath| {
                CimInstance::new("Msvm_AffectedJobElement").with("AffectedElement", &path).with(
                    "ElementEffects",
                    CimValue::Array(vmtide_cim::CimType::Uint16, vec![CimValue::Uint16(5)]),
                )
            };
            Ok(affected.into_iter().map(row).collect())
        })
    }

    fn invoke(
        &self,
        path: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
    ) -> Result<MethodOutput> {
        if method == "GetErrorEx" {
            return Ok(MethodOutput::default());
        }
        self.cim(method, |state| methods::invoke(state, path, method, parameters))
    }
}

impl State {
    pub fn new_id(&mut self) -> Uuid {
        self.next_id += 1;
        Uuid::from_u128(self.next_id)
    }

    /// The answer of a method that made `results`, as out parameter `name`.
    fn done(&mut self, name: &str, results: Vec<ObjectPath>, is_list: bool) -> MethodOutput {
        let mut parameters = CimInstance::default();
        let code = if self.manners.jobs {
            let id = self.new_id().to_string();
            let job = ObjectPath::new("Msvm_ConcreteJob", &[("InstanceID", &id)]);
            let affected = if self.manners.silent { Vec::new() } else { results };
            self.jobs.insert(id, affected);
            parameters.set("Job", &job);
            4096
        } else {
            if !self.manners.silent && !results.is_empty() {
                let values: Vec<_> = results.iter().map(CimValue::from).collect();
                let value = match values.as_slice() {
                    [one] if !is_list => one.clone(),
                    _ => CimValue::Array(vmtide_cim::CimType::Reference, values),
                };
                parameters.set(name, value);
            }
            0
        };
        MethodOutput { return_value: code, parameters }
    }
}
