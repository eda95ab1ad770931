//! Callers that die: connections whose N-th call fails, before or after it took effect.

use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;
use vmtide_block::{ByteRange, WritableBlockDevice};
use vmtide_cim::{Association, Cim, CimError, CimInstance, CimValue, MethodOutput, ObjectPath};
use vmtide_hyperv::{ChangePage, ChangesError, FileEntry, FrozenFile, HostFiles, NewDisk};
use vmtide_hypervisor::{HypervisorError, Result};

/// When the caller dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before the call reaches the host.
    Before,
    /// After the call took effect, before its answer is read.
    After,
}

/// What happens from the fatal call on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kill {
    /// Every later call fails as well: the process is gone.
    Process,
    /// Only this call fails: an answer was lost.
    Answer,
}

/// Counts the calls of one caller, over its connection and its files together, and ends it at one of them.
#[derive(Clone)]
pub struct FaultPlan {
    inner: Arc<Mutex<Inner>>,
    /// What happens before every call that reaches the host.
    meanwhile: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl fmt::Debug for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultPlan").field("inner", &self.inner).finish_non_exhaustive()
    }
}

#[derive(Clone, Debug)]
struct Inner {
    calls: u64,
    at: Option<u64>,
    when: When,
    kill: Kill,
    dead: bool,
    log: Vec<String>,
}

impl FaultPlan {
    /// A plan in which nothing happens: for counting how many calls there are.
    pub fn none() -> Self {
        Self::new(None, When::Before, Kill::Answer)
    }

    /// The process dies at call `at`, counted from 1.
    pub fn kill_at(at: u64, when: When) -> Self {
        Self::new(Some(at), when, Kill::Process)
    }

    /// Call `at` fails, counted from 1, and the process goes on.
    pub fn lose_at(at: u64, when: When) -> Self {
        Self::new(Some(at), when, Kill::Answer)
    }

    fn new(at: Option<u64>, when: When, kill: Kill) -> Self {
        let inner = Inner { calls: 0, at, when, kill, dead: false, log: Vec::new() };
        Self { inner: Arc::new(Mutex::new(inner)), meanwhile: None }
    }

    /// The plan with something that happens before every call that reaches the host, as a guest that goes on writing.
    #[must_use]
    pub fn with_meanwhile(self, happens: impl Fn() + Send + Sync + 'static) -> Self {
        Self { meanwhile: Some(Arc::new(happens)), ..self }
    }

    /// Begins anew as `other`, also for callers that are under way.
    pub fn restart_as(&self, other: &Self) {
        let other = other.inner.lock().clone();
        *self.inner.lock() = other;
    }

    /// Whether the caller was killed: nothing answers it any more.
    pub fn is_dead(&self) -> bool {
        self.inner.lock().dead
    }

    /// How many calls were made.
    pub fn calls(&self) -> u64 {
        self.inner.lock().calls
    }

    /// The calls that were made, in words.
    pub fn log(&self) -> Vec<String> {
        self.inner.lock().log.clone()
    }

    /// Whether the fatal call was reached.
    pub fn has_struck(&self) -> bool {
        let inner = self.inner.lock();
        inner.at.is_some_and(|at| inner.calls >= at)
    }

    /// The connection under this plan.
    pub fn cim(&self, inner: Arc<dyn Cim>) -> Arc<dyn Cim> {
        Arc::new(PlannedCim { plan: self.clone(), inner })
    }

    /// The files under this plan.
    pub fn files(&self, inner: Arc<dyn HostFiles>) -> Arc<dyn HostFiles> {
        Arc::new(PlannedFiles { plan: self.clone(), inner })
    }

    /// Runs one call; none where it fails.
    fn run<T>(&self, what: impl FnOnce() -> String, call: impl FnOnce() -> T) -> Option<T> {
        let strikes = {
            let mut inner = self.inner.lock();
            if inner.dead {
                return None;
            }
            inner.calls += 1;
            inner.log.push(what());
            let strikes = inner.at == Some(inner.calls);
            if strikes && inner.kill == Kill::Process {
                inner.dead = true;
            }
            strikes.then_some(inner.when)
        };
        if strikes != Some(When::Before)
            && let Some(meanwhile) = &self.meanwhile
        {
            meanwhile();
        }
        match strikes {
            Some(When::Before) => None,
            Some(When::After) => {
                drop(call());
                None
            }
            None => Some(call()),
        }
    }
}

struct PlannedCim {
    plan: FaultPlan,
    inner: Arc<dyn Cim>,
}

impl PlannedCim {
    fn run<T>(
        &self,
        what: impl FnOnce() -> String,
        call: impl FnOnce() -> Result<T, CimError>,
    ) -> Result<T, CimError> {
        self.plan.run(what, call).unwrap_or_else(|| {
            Err(CimError::Unreachable {
                peer: self.inner.peer().to_owned(),
                detail: "the connection broke (planned)".into(),
                // The caller of a real connection cannot always know either.
                before_request: false,
            })
        })
    }
}

impl Cim for PlannedCim {
    fn peer(&self) -> &str {
        self.inner.peer()
    }
    fn query(&self, namespace: &str, wql: &str) -> Result<Vec<CimInstance>, CimError> {
        self.run(|| wql.to_owned(), || self.inner.query(namespace, wql))
    }
    fn get(&self, path: &ObjectPath) -> Result<CimInstance, CimError> {
        self.run(|| format!("get {path}"), || self.inner.get(path))
    }
    fn associators(
        &self,
        path: &ObjectPath,
        association: &Association,
    ) -> Result<Vec<CimInstance>, CimError> {
        self.run(|| format!("associators {path}"), || self.inner.associators(path, association))
    }
    fn references(
        &self,
        path: &ObjectPath,
        association: &Association,
    ) -> Result<Vec<CimInstance>, CimError> {
        self.run(|| format!("references {path}"), || self.inner.references(path, association))
    }
    fn invoke(
        &self,
        path: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
    ) -> Result<MethodOutput, CimError> {
        self.run(|| format!("invoke {method}"), || self.inner.invoke(path, method, parameters))
    }
}

struct PlannedFiles {
    plan: FaultPlan,
    inner: Arc<dyn HostFiles>,
}

impl PlannedFiles {
    fn run<T>(&self, what: String, call: impl FnOnce() -> Result<T>) -> Result<T> {
        self.plan.run(|| what, call).unwrap_or_else(|| {
            Err(HypervisorError::Unreachable {
                peer: "the host's files".into(),
                detail: "the connection broke (planned)".into(),
            })
        })
    }
}

impl HostFiles for PlannedFiles {
    fn open_disk(&self, path: &str) -> Result<FrozenFile> {
        self.run(format!("open {path}"), || self.inner.open_disk(path))
    }
    fn changes(
        &self,
        path: &str,
        tracking_id: &str,
        range: ByteRange,
    ) -> Result<ChangePage, ChangesError> {
        let call = || self.inner.changes(path, tracking_id, range);
        self.plan
            .run(|| format!("changes of {path}"), call)
            .unwrap_or_else(|| Err(ChangesError::Failed("the connection broke (planned)".into())))
    }
    fn read_file(&self, path: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>> {
        self.run(format!("read {path}"), || self.inner.read_file(path, limit_bytes))
    }
    fn list(&self, directory: &str) -> Result<Option<Vec<FileEntry>>> {
        self.run(format!("list {directory}"), || self.inner.list(directory))
    }
    fn free_bytes(&self, directory: &str) -> Result<Option<u64>> {
        self.run(format!("free {directory}"), || self.inner.free_bytes(directory))
    }
    fn create_directory(&self, path: &str) -> Result<()> {
        self.run(format!("mkdir {path}"), || self.inner.create_directory(path))
    }
    fn write_file(&self, path: &str, content: &[u8]) -> Result<()> {
        self.run(format!("write {path}"), || self.inner.write_file(path, content))
    }
    fn create_disk(&self, path: &str, disk: &NewDisk) -> Result<Arc<dyn WritableBlockDevice>> {
        self.run(format!("create {path}"), || self.inner.create_disk(path, disk))
    }
    fn open_disk_writable(&self, path: &str) -> Result<Arc<dyn WritableBlockDevice>> {
        self.run(format!("open {path} to write"), || self.inner.open_disk_writable(path))
    }
    fn remove_file(&self, path: &str) -> Result<()> {
        self.run(format!("remove {path}"), || self.inner.remove_file(path))
    }
    fn remove_directory(&self, path: &str) -> Result<()> {
        self.run(format!("rmdir {path}"), || self.inner.remove_directory(path))
    }
}
