//! A host that answers from tables: what it is not told to have it refuses. It stands for a Hyper-V host
//! only as far as the tests of single calls need it; whole jobs are tried with the stand-in host.

#![allow(dead_code, reason = "every test uses a part of it")]

pub mod world;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vmtide_cim::{
    Association, Cim, CimError, CimInstance, CimType, CimValue, MethodOutput, ObjectPath, Result,
    VIRTUALIZATION_NAMESPACE,
};
use vmtide_hyperv::{Clock, Host, HostOptions};

pub const WEB: &str = "11111111-2222-3333-4444-555555555555";
pub const OLD: &str = "AAAAAAAA-BBBB-CCCC-DDDD-EEEEEEEEEEEE";
pub const SNAPSHOT: &str = "99999999-0000-0000-0000-000000000001";

/// How values look: as COM types them, or all as text, as WS-Management brings them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Typed,
    Texts,
}

pub const SHAPES: [Shape; 2] = [Shape::Typed, Shape::Texts];

type Handler = Box<dyn FnMut(&mut Tables, &[(String, CimValue)]) -> Result<MethodOutput> + Send>;

/// What the host has.
#[derive(Default)]
pub struct Tables {
    /// Instances by lower-case namespace and class.
    pub classes: BTreeMap<(String, String), Vec<CimInstance>>,
    /// What the next looks at an object answer, before its table does.
    pub looks: BTreeMap<String, VecDeque<Result<CimInstance>>>,
    /// The rows of `Msvm_AffectedJobElement` by the path of the job.
    pub affected: BTreeMap<String, Result<Vec<CimInstance>>>,
    /// What was called, with the names of the parameters.
    pub calls: Vec<String>,
    /// The texts of embedded instances that were passed.
    pub embedded: Vec<String>,
}

/// The host.
pub struct Fake {
    pub tables: Mutex<Tables>,
    handlers: Mutex<BTreeMap<String, Handler>>,
    shape: Shape,
    /// Whether instances come with their paths.
    with_paths: bool,
}

/// Time that passes only by waiting.
#[derive(Default)]
pub struct TestClock(pub AtomicU64);

impl Clock for TestClock {
    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn sleep_ms(&self, ms: u64) {
        assert!(ms > 0, "a wait that does not wait");
        self.0.fetch_add(ms, Ordering::SeqCst);
    }
}

impl Fake {
    pub fn new(shape: Shape) -> Arc<Self> {
        Self::build(shape, true)
    }

    pub fn build(shape: Shape, with_paths: bool) -> Arc<Self> {
        let fake = Self { tables: Mutex::default(), handlers: Mutex::default(), shape, with_paths };
        world::fill(&fake);
        Arc::new(fake)
    }

    pub fn host(self: &Arc<Self>) -> Host {
        self.host_with(Arc::new(TestClock::default()))
    }

    pub fn host_with(self: &Arc<Self>, clock: Arc<TestClock>) -> Host {
        let options = HostOptions { clock, job_timeout_ms: 60_000, ..HostOptions::default() };
        Host::new(Arc::clone(self) as Arc<dyn Cim>, options)
    }

    /// Adds an instance to Hyper-V's namespace; its key is `InstanceID`.
    pub fn add(&self, instance: CimInstance) {
        let id = instance.text("InstanceID").unwrap().to_owned();
        let path = ObjectPath::new(&instance.class, &[("InstanceID", &id)]);
        self.add_at(VIRTUALIZATION_NAMESPACE, instance, Some(path));
    }

    pub fn add_at(&self, namespace: &str, mut instance: CimInstance, path: Option<ObjectPath>) {
        instance.path = path;
        let key = (namespace.to_lowercase(), instance.class.to_lowercase());
        self.tables.lock().unwrap().classes.entry(key).or_default().push(instance);
    }

    /// A class without instances.
    pub fn know(&self, class: &str) {
        let key = (VIRTUALIZATION_NAMESPACE.to_lowercase(), class.to_lowercase());
        self.tables.lock().unwrap().classes.entry(key).or_default();
    }

    pub fn forget(&self, namespace: &str, class: &str) {
        let key = (namespace.to_lowercase(), class.to_lowercase());
        self.tables.lock().unwrap().classes.remove(&key);
    }

    /// Removes the instances of a class that do not pass.
    pub fn retain(&self, class: &str, keep: impl Fn(&CimInstance) -> bool) {
        let key = (VIRTUALIZATION_NAMESPACE.to_lowercase(), class.to_lowercase());
        if let Some(list) = self.tables.lock().unwrap().classes.get_mut(&key) {
            list.retain(keep);
        }
    }

    /// What a method answers.
    pub fn on(
        &self,
        method: &str,
        handler: impl FnMut(&mut Tables, &[(String, CimValue)]) -> Result<MethodOutput> + Send + 'static,
    ) {
        self.handlers.lock().unwrap().insert(method.to_owned(), Box::new(handler));
    }

    /// A job that shows these states one after the other, and then stays in the last one.
    pub fn job(&self, id: &str, states: &[u16], last: impl FnOnce(CimInstance) -> CimInstance) {
        let instance = |state: u16| {
            CimInstance::new("Msvm_ConcreteJob")
                .with("InstanceID", id)
                .with("JobState", CimValue::Uint16(state))
                .with("ErrorCode", CimValue::Uint16(0))
        };
        let (end, before) = states.split_last().unwrap();
        let looks = before.iter().map(|state| Ok(instance(*state))).collect();
        self.tables.lock().unwrap().looks.insert(job_path(id).to_string(), looks);
        self.add(last(instance(*end)));
    }

    pub fn calls(&self) -> Vec<String> {
        self.tables.lock().unwrap().calls.clone()
    }

    fn show(&self, mut instance: CimInstance) -> CimInstance {
        if !self.with_paths {
            instance.path = None;
        }
        if self.shape == Shape::Texts {
            for (_, value) in &mut instance.properties {
                *value = as_text(value);
            }
        }
        instance
    }
}

/// A value as WS-Management brings it.
fn as_text(value: &CimValue) -> CimValue {
    match value {
        CimValue::Null | CimValue::Reference(_) => value.clone(),
        CimValue::Array(_, items) => match items.as_slice() {
            [] => CimValue::Null,
            [one] => as_text(one),
            several => CimValue::Array(CimType::String, several.iter().map(as_text).collect()),
        },
        CimValue::Boolean(truth) => CimValue::String(truth.to_string()),
        scalar => CimValue::String(scalar.to_text().unwrap()),
    }
}

pub fn job_path(id: &str) -> ObjectPath {
    ObjectPath::new("Msvm_ConcreteJob", &[("InstanceID", id)])
}

/// The answer of a method that is done.
pub fn done() -> MethodOutput {
    MethodOutput::default()
}

/// The answer of a method that started a job.
pub fn started(job: &str) -> MethodOutput {
    MethodOutput {
        return_value: 4096,
        parameters: CimInstance::default().with("Job", &job_path(job)),
    }
}

pub fn code(return_value: u32) -> MethodOutput {
    MethodOutput { return_value, ..MethodOutput::default() }
}

pub fn fault(detail: &str, code: Option<u32>) -> CimError {
    CimError::Fault { action: "a call".into(), detail: detail.into(), code }
}

fn not_found(what: &str) -> CimError {
    CimError::NotFound { what: what.into(), detail: "no such thing".into() }
}

impl Cim for Fake {
    fn peer(&self) -> &str {
        "HV1"
    }

    fn query(&self, namespace: &str, wql: &str) -> Result<Vec<CimInstance>> {
        let rest = wql.strip_prefix("SELECT * FROM ").expect(wql);
        let (class, condition) = match rest.split_once(" WHERE ") {
            Some((class, condition)) => (class, Some(condition)),
            None => (rest, None),
        };
        let tables = self.tables.lock().unwrap();
        let key = (namespace.to_lowercase(), class.to_lowercase());
        let found = tables
            .classes
            .get(&key)
            .ok_or_else(|| fault(&format!("invalid class {class}"), Some(0x8004_1010)))?;
        let matches = |instance: &&CimInstance| condition.is_none_or(|text| holds(instance, text));
        Ok(found.iter().filter(matches).map(|one| self.show(one.clone())).collect())
    }

    fn get(&self, path: &ObjectPath) -> Result<CimInstance> {
        let mut tables = self.tables.lock().unwrap();
        if let Some(look) = tables.looks.get_mut(&path.to_string()).and_then(VecDeque::pop_front) {
            return look.map(|instance| self.show(instance));
        }
        let key = (VIRTUALIZATION_NAMESPACE.to_lowercase(), path.class.to_lowercase());
        let list = tables.classes.get(&key).ok_or_else(|| not_found(&path.class))?;
        let found = list.iter().find(|one| one.path.as_ref() == Some(path));
        found.map(|one| self.show(one.clone())).ok_or_else(|| not_found(&path.to_string()))
    }

    fn associators(&self, path: &ObjectPath, _: &Association) -> Result<Vec<CimInstance>> {
        let rows = self.references(path, &Association::default())?;
        let mut found = Vec::new();
        for row in rows {
            found.push(self.get(&row.optional_reference("AffectedElement")?.unwrap())?);
        }
        Ok(found)
    }

    fn references(&self, path: &ObjectPath, association: &Association) -> Result<Vec<CimInstance>> {
        assert_eq!(path.class, "Msvm_ConcreteJob", "only results of jobs are followed");
        let tables = self.tables.lock().unwrap();
        match tables.affected.get(&path.to_string()) {
            Some(Err(error)) if association.role.is_some() => Err(error.clone()),
            Some(Err(_)) | None => Ok(Vec::new()),
            Some(Ok(rows)) => Ok(rows.iter().map(|row| self.show(row.clone())).collect()),
        }
    }

    fn invoke(
        &self,
        path: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
    ) -> Result<MethodOutput> {
        let mut tables = self.tables.lock().unwrap();
        let names: Vec<_> = parameters.iter().map(|(name, _)| *name).collect();
        tables.calls.push(format!("{}.{method}({})", path.class, names.join(", ")));
        for (_, value) in parameters {
            if let CimValue::String(text) = value
                && text.starts_with("<INSTANCE")
            {
                tables.embedded.push(text.clone());
            }
        }
        let mut handlers = self.handlers.lock().unwrap();
        let Some(handler) = handlers.get_mut(method) else {
            return Err(fault(&format!("no method {method}"), None));
        };
        let owned: Vec<_> =
            parameters.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        let mut output = handler(&mut tables, &owned)?;
        output.parameters = self.show(output.parameters);
        Ok(output)
    }
}

/// `NAME='VALUE'` or `NAME LIKE 'PREFIX%'`. Names must be those of the class; values are compared without
/// regard to case, as WMI does.
fn holds(instance: &CimInstance, condition: &str) -> bool {
    let unquote = |text: &str| {
        let text = text.strip_prefix('\'').and_then(|text| text.strip_suffix('\'')).expect(text);
        text.replace("\\\\", "\\")
    };
    let value = |name: &str| {
        assert!(
            instance.properties.iter().any(|(known, _)| known == name),
            "{} has no {name}",
            instance.class
        );
        instance.value(name).and_then(|value| value.to_text()).unwrap_or_default()
    };
    if let Some((name, pattern)) = condition.split_once(" LIKE ") {
        let prefix = unquote(pattern);
        let prefix = prefix.strip_suffix('%').expect("a prefix").to_lowercase();
        return value(name).to_lowercase().starts_with(&prefix);
    }
    let (name, text) = condition.split_once('=').expect(condition);
    value(name).eq_ignore_ascii_case(&unquote(text))
}
