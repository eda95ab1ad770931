//! A Hyper-V host as backup and restore see it.

use crate::model::codes;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use vmtide_block::CancelToken;
use vmtide_cim::{
    Cim, CimError, CimInstance, CimValue, MethodOutput, ObjectPath, VIRTUALIZATION_NAMESPACE,
};
use vmtide_hypervisor::{HypervisorError, Result};

/// Time, so that tests need not wait for it.
pub trait Clock: Send + Sync {
    /// Milliseconds since some moment in the past; never goes back.
    fn now_ms(&self) -> u64;

    /// Waits.
    fn sleep_ms(&self, ms: u64);

    /// The time of day in seconds since 1970, to be held against times that the host tells.
    fn unix_s(&self) -> i64 {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
    }
}

/// The clock of this machine.
#[derive(Debug)]
pub struct SystemClock(Instant);

impl Default for SystemClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for SystemClock {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn sleep_ms(&self, ms: u64) {
        std::thread::sleep(Duration::from_millis(ms));
    }
}

/// How a host is worked with.
#[derive(Clone)]
pub struct HostOptions {
    /// How long a job of the host may take, in milliseconds. Merges of large disks are waited for with
    /// limits of their own; what remains (checkpoints, conversions) takes minutes at the most.
    pub job_timeout_ms: u64,
    /// The longest pause between two looks at a job, in milliseconds. The first pauses are shorter.
    pub poll_interval_ms: u64,
    /// How long a job is waited for after a cancellation, in milliseconds: what it makes can only be
    /// removed when it is there.
    pub cancel_grace_ms: u64,
    /// The clock.
    pub clock: Arc<dyn Clock>,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            job_timeout_ms: 15 * 60 * 1000,
            poll_interval_ms: 1000,
            cancel_grace_ms: 60 * 1000,
            clock: Arc::new(SystemClock::default()),
        }
    }
}

impl fmt::Debug for HostOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostOptions")
            .field("job_timeout_ms", &self.job_timeout_ms)
            .field("poll_interval_ms", &self.poll_interval_ms)
            .field("cancel_grace_ms", &self.cancel_grace_ms)
            .finish_non_exhaustive()
    }
}

/// A group of the host that a user must be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MissingGroup {
    /// For all objects of Hyper-V.
    HypervAdministrators,
    /// For WinRM.
    RemoteManagementUsers,
}

impl MissingGroup {
    /// What is seen.
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::HypervAdministrators => {
                "WinRM takes the user, Hyper-V does not: the group Hyper-V Administrators is missing"
            }
            Self::RemoteManagementUsers => {
                "nothing may be asked by WinRM: the group Remote Management Users is missing"
            }
        }
    }

    /// What to do.
    pub(crate) const fn mend(self) -> &'static str {
        match self {
            Self::HypervAdministrators => {
                "on the host: Add-LocalGroupMember -SID S-1-5-32-578 -Member USER (Hyper-V Administrators)"
            }
            Self::RemoteManagementUsers => {
                "on the host: Add-LocalGroupMember -SID S-1-5-32-580 -Member USER (Remote Management Users); the group \
                 Hyper-V Administrators is needed as well"
            }
        }
    }
}

/// A Hyper-V host: its VMs, their checkpoints and reference points, read as typed records, and the calls
/// that a backup makes. Clones share the connection. The calls block and may be made by many threads.
///
/// What can be found by a key or by the beginning of an `InstanceID` is queried and filtered here:
/// associations, on which real hosts fault over WS-Management, are only followed from a job to its results.
#[derive(Clone)]
pub struct Host {
    inner: Arc<Inner>,
}

struct Inner {
    cim: Arc<dyn Cim>,
    options: HostOptions,
    /// The singletons whose methods are called, by class. Their paths hold the host's name and do not change.
    services: Mutex<HashMap<String, ObjectPath>>,
    os_version: OnceLock<Option<String>>,
    identity: OnceLock<String>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("peer", &self.peer()).finish_non_exhaustive()
    }
}

impl Host {
    /// A host behind a connection. Nothing is asked yet.
    pub fn new(cim: Arc<dyn Cim>, options: HostOptions) -> Self {
        Self {
            inner: Arc::new(Inner {
                cim,
                options,
                services: Mutex::default(),
                os_version: OnceLock::new(),
                identity: OnceLock::new(),
            }),
        }
    }

    /// The connection.
    pub fn cim(&self) -> &dyn Cim {
        self.inner.cim.as_ref()
    }

    /// How the host is worked with.
    pub fn options(&self) -> &HostOptions {
        &self.inner.options
    }

    /// Who is asked, for messages.
    pub fn peer(&self) -> &str {
        self.inner.cim.peer()
    }

    /// All instances that a query finds in Hyper-V's namespace.
    ///
    /// # Errors
    /// As [`from_cim`] says.
    pub fn query(&self, wql: &str) -> Result<Vec<CimInstance>> {
        self.cim().query(VIRTUALIZATION_NAMESPACE, wql).map_err(|error| self.of_hyperv(error))
    }

    /// As [`query`](Self::query), but none where the host does not know the class: older versions of
    /// Windows lack some.
    ///
    /// # Errors
    /// As [`from_cim`] says.
    pub fn query_if_known(&self, wql: &str) -> Result<Option<Vec<CimInstance>>> {
        match self.cim().query(VIRTUALIZATION_NAMESPACE, wql) {
            Ok(found) => Ok(Some(found)),
            Err(error) if is_unknown_class(&error) => Ok(None),
            Err(error) => Err(self.of_hyperv(error)),
        }
    }

    /// The path of the only instance of a class, such as `Msvm_VirtualSystemSnapshotService`; asked once.
    ///
    /// # Errors
    /// [`HypervisorError::Denied`] where there is none: Hyper-V hides its services from users without
    /// rights; [`HypervisorError::Unsupported`] where the host does not know the class.
    pub fn service(&self, class: &str) -> Result<ObjectPath> {
        let known = || self.inner.services.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = known().get(class) {
            return Ok(path.clone());
        }
        let found = self.query_if_known(&format!("SELECT * FROM {class}"))?;
        let Some(found) = found else {
            return Err(HypervisorError::Unsupported {
                what: format!("{class} on {}", self.peer()),
                detail: "the host does not know it: it needs the Hyper-V role of Windows Server 2016 or newer".into(),
            });
        };
        let Some(instance) = found.first() else {
            return Err(HypervisorError::Denied {
                what: format!("{} shows no {class}", self.peer()),
                detail:
                    "add the user to the group Hyper-V Administrators of the host, and see that \
                         the service vmms runs"
                        .into(),
            });
        };
        let path = path_of(instance, &SERVICE_KEYS)?;
        known().insert(class.to_owned(), path.clone());
        Ok(path)
    }

    /// The name that the host gives itself, in lower case: the same whatever address it is called by, and another on every
    /// node of a cluster. None where it does not tell.
    pub(crate) fn identity(&self) -> Option<String> {
        if let Some(known) = self.inner.identity.get() {
            return Some(known.clone());
        }
        let service = self.service("Msvm_VirtualSystemSnapshotService").ok()?;
        let name = service.key("SystemName").filter(|name| !name.is_empty())?.to_lowercase();
        Some(self.inner.identity.get_or_init(|| name).clone())
    }

    /// The version of the host's Windows, e.g. `10.0.20348`; none where this user may not see it. Asked once.
    pub fn os_version(&self) -> Option<String> {
        self.inner
            .os_version
            .get_or_init(|| {
                let found = self.cim().query(CIMV2, "SELECT * FROM Win32_OperatingSystem").ok()?;
                found.first()?.text("Version").ok().map(str::to_owned)
            })
            .clone()
    }

    /// The time of day by the host's clock in seconds since 1970, to be held against times that the host tells; by this
    /// machine's where this user may not see the host's.
    pub(crate) fn unix_s(&self) -> i64 {
        self.told_unix_s().unwrap_or_else(|| self.options().clock.unix_s())
    }

    /// The time of day by the host's clock in seconds since 1970; none where this user may not see it.
    pub(crate) fn told_unix_s(&self) -> Option<i64> {
        let found = self.cim().query(CIMV2, "SELECT * FROM Win32_OperatingSystem").ok()?;
        crate::cycle::seconds_of(found.first()?.optional_text("LocalDateTime").ok()??)
    }

    /// The group that a user lacks who is denied Hyper-V's objects; none where it is not a matter of groups.
    pub(crate) fn missing_group(&self) -> Option<MissingGroup> {
        match self.cim().query(CIMV2, "SELECT * FROM Win32_OperatingSystem") {
            Ok(_) => Some(MissingGroup::HypervAdministrators),
            Err(CimError::Denied { .. }) => Some(MissingGroup::RemoteManagementUsers),
            Err(_) => None,
        }
    }

    /// An error of Hyper-V's namespace; where access is denied, with the group that is missing.
    fn of_hyperv(&self, error: CimError) -> HypervisorError {
        let is_denied = matches!(error, CimError::Denied { .. });
        match (from_cim(error), is_denied) {
            (HypervisorError::Denied { what, detail }, true) => match self.missing_group() {
                Some(group) => {
                    let detail = format!("{detail}; {}", group.words());
                    HypervisorError::Denied { what, detail }
                }
                None => HypervisorError::Denied { what, detail },
            },
            (error, _) => error,
        }
    }

    /// Calls a method and waits for its job. `what` says in words what is done.
    ///
    /// # Errors
    /// [`HypervisorError::Failed`] with what the host said and what to do, or as [`wait`](Self::wait) and
    /// [`from_cim`] say.
    pub fn call(
        &self,
        path: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
        what: &str,
        cancel: &CancelToken,
    ) -> Result<(MethodOutput, crate::JobOutcome)> {
        let (output, job) = self.begin(path, method, parameters, what)?;
        let outcome = match job {
            Some(job) => self.wait(&job, what, cancel)?,
            None => crate::JobOutcome::default(),
        };
        Ok((output, outcome))
    }

    /// Calls a method: its answer, and the job where it started one.
    pub(crate) fn begin(
        &self,
        path: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
        what: &str,
    ) -> Result<(MethodOutput, Option<ObjectPath>)> {
        let output = self.cim().invoke(path, method, parameters).map_err(from_cim)?;
        tracing::debug!(method, code = output.return_value, "{what}");
        match output.return_value {
            codes::DONE => Ok((output, None)),
            codes::JOB_STARTED => {
                let job = output.parameters.optional_reference("Job").map_err(from_cim)?;
                let job = job.ok_or_else(|| {
                    HypervisorError::protocol(
                        self.peer(),
                        format!("{method} started a job and did not name it"),
                    )
                })?;
                Ok((output, Some(job)))
            }
            code => Err(codes::error(what, code, "")),
        }
    }
}

/// The namespace of what Windows says of itself.
pub(crate) const CIMV2: &str = r"root\cimv2";

/// The keys of services.
const SERVICE_KEYS: [&str; 4] =
    ["CreationClassName", "Name", "SystemCreationClassName", "SystemName"];

/// The path of an instance: its own, or put together from its keys where the transport did not tell it.
pub(crate) fn path_of(instance: &CimInstance, keys: &[&str]) -> Result<ObjectPath> {
    if let Some(path) = &instance.path {
        return Ok(path.clone());
    }
    let mut found = Vec::new();
    for key in keys {
        found.push((*key, instance.text(key).map_err(from_cim)?));
    }
    Ok(ObjectPath::new(&instance.class, &found))
}

/// Whether a query failed only because the host's Windows does not know the class.
pub(crate) fn is_unknown_class(error: &CimError) -> bool {
    /// `WBEM_E_INVALID_CLASS`.
    const INVALID_CLASS: u32 = 0x8004_1010;
    match error {
        CimError::NotFound { .. } => true,
        CimError::Fault { code, .. } => *code == Some(INVALID_CLASS),
        _ => false,
    }
}

/// What a failed management call means to a backup. A refused login and a lacking right are
/// [`Denied`](HypervisorError::Denied); an untrusted certificate is
/// [`Unreachable`](HypervisorError::Unreachable), because nobody knows who answered.
pub fn from_cim(error: CimError) -> HypervisorError {
    match error {
        CimError::Unreachable { peer, detail, .. } => HypervisorError::Unreachable { peer, detail },
        CimError::Untrusted { peer, detail } => HypervisorError::Unreachable {
            peer,
            detail: format!("its certificate is not trusted: {detail}"),
        },
        CimError::Login { peer, detail } => {
            HypervisorError::Denied { what: format!("login at {peer}"), detail }
        }
        CimError::Denied { peer, detail } => {
            HypervisorError::Denied { what: format!("management of {peer}"), detail }
        }
        CimError::NotFound { what, detail } => HypervisorError::NotFound { what, detail },
        CimError::Timeout { action, timeout_ms } => HypervisorError::Timeout { action, timeout_ms },
        CimError::Fault { action, detail, code } => {
            let detail = match code {
                Some(code) => format!("{detail} (0x{code:08X})"),
                None => detail,
            };
            HypervisorError::Failed { action, detail }
        }
        CimError::TooLarge { .. } => {
            HypervisorError::failed("a management call", error.to_string())
        }
        CimError::Protocol { peer, detail } => HypervisorError::Protocol { peer, detail },
    }
}
