//! The connection.
//!
//! Every call is a semisynchronous one (`WBEM_FLAG_RETURN_IMMEDIATELY`): it comes back at once, and what is waited for
//! is its result, with a limit. A provider that hangs costs a call its time and no thread for ever. Wine's
//! implementation answers such calls at once instead, which is allowed and taken.

use crate::{apartment, error, object, statements, variant};
use std::collections::HashMap;
use std::ptr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use vmtide_cim::{
    Association, Cim, CimError, CimInstance, CimValue, MethodOutput, ObjectPath, Result,
    VIRTUALIZATION_NAMESPACE,
};
use windows::Win32::System::Com::{
    CLSCTX_INPROC_SERVER, CoCreateInstance, CoSetProxyBlanket, EOAC_NONE, RPC_C_AUTHN_LEVEL_CALL,
    RPC_C_IMP_LEVEL_IMPERSONATE,
};
use windows::Win32::System::Rpc::{RPC_C_AUTHN_WINNT, RPC_C_AUTHZ_NONE};
use windows::Win32::System::Wmi::{
    IEnumWbemClassObject, IWbemCallResult, IWbemClassObject, IWbemContext, IWbemLocator,
    IWbemServices, WBEM_FLAG_CONNECT_USE_MAX_WAIT, WBEM_FLAG_FORWARD_ONLY,
    WBEM_FLAG_RETURN_IMMEDIATELY, WBEM_GENERIC_FLAG_TYPE, WBEM_S_TIMEDOUT, WbemLocator,
};
use windows::core::{BSTR, IUnknown, Interface, PCWSTR};

/// How long a call may take where nobody says. Calls of Hyper-V's services start jobs and come back; what takes longer
/// than this hangs.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// How many objects are asked for at once. More save calls, and are told later.
const BATCH: usize = 32;
/// The most objects of one answer: a host of a thousand VMs has some ten thousand disks and ports.
const MAX_OBJECTS: usize = 200_000;
/// The most text of one answer where nobody says, in bytes.
const MAX_BYTES: u64 = 256 << 20;

/// The management objects of this host. May be used by many threads at once; one connection for each namespace is
/// made when it is first asked, and anew after the service was gone.
pub struct ComCim {
    services: Mutex<HashMap<String, Services>>,
    timeout: Duration,
    max_answer_bytes: u64,
}

/// An interface of the multithreaded apartment.
#[derive(Clone)]
struct Services(IWbemServices);

// SAFETY: the interface was made in the multithreaded apartment, whose threads may all use it at once; every call
// makes sure first that its thread belongs there (`apartment::enter`), and the apartment lives as long as the process.
unsafe impl Send for Services {}
// SAFETY: as above.
unsafe impl Sync for Services {}

impl ComCim {
    /// A connection. Asks nobody yet.
    pub fn new() -> Self {
        Self { services: Mutex::default(), timeout: DEFAULT_TIMEOUT, max_answer_bytes: MAX_BYTES }
    }

    /// The same with another limit on how long a call may take, from a second on.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.max(Duration::from_secs(1));
        self
    }

    /// The same with another limit on the text of one answer, in bytes.
    #[must_use]
    pub const fn with_max_answer_bytes(mut self, max_answer_bytes: u64) -> Self {
        self.max_answer_bytes = max_answer_bytes;
        self
    }

    /// Runs `call` on the connection to a namespace. One that turns out to be dead is forgotten, so that the next
    /// call makes another.
    fn with<T>(
        &self,
        namespace: &str,
        call: impl FnOnce(&IWbemServices, Instant) -> Result<T>,
    ) -> Result<T> {
        apartment::enter()?;
        let namespace = if namespace.is_empty() { VIRTUALIZATION_NAMESPACE } else { namespace };
        let key = namespace.to_ascii_lowercase();
        let known = self.connections().get(&key).cloned();
        let services = match known {
            Some(services) => services,
            None => {
                // Not with the lock: a namespace that hangs must not keep others waiting.
                let made = Services(connect(namespace)?);
                self.connections().entry(key.clone()).or_insert(made).clone()
            }
        };
        let outcome = call(&services.0, Instant::now() + self.timeout);
        if let Err(CimError::Unreachable { .. }) = &outcome {
            self.connections().remove(&key);
        }
        outcome
    }

    fn connections(&self) -> std::sync::MutexGuard<'_, HashMap<String, Services>> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn timeout_ms(&self) -> u64 {
        u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX)
    }

    fn timed_out(&self, action: &str) -> CimError {
        CimError::Timeout { action: action.to_owned(), timeout_ms: self.timeout_ms() }
    }

    fn list(&self, namespace: &str, statement: &str) -> Result<Vec<CimInstance>> {
        let action = format!("the query {statement}");
        self.with(namespace, |services, deadline| {
            let flags =
                WBEM_GENERIC_FLAG_TYPE(WBEM_FLAG_RETURN_IMMEDIATELY.0 | WBEM_FLAG_FORWARD_ONLY.0);
            let (language, text) = (BSTR::from("WQL"), variant::bstr(statement)?);
            // SAFETY: the interface is alive and so are the strings, through the call.
            let found =
                unsafe { services.ExecQuery(&language, &text, flags, None::<&IWbemContext>) }
                    .map_err(|error| object::failed(&action, &error))?;
            set_blanket(&found);
            self.gather(&found, &action, deadline)
        })
    }

    fn gather(
        &self,
        found: &IEnumWbemClassObject,
        action: &str,
        deadline: Instant,
    ) -> Result<Vec<CimInstance>> {
        let mut instances = Vec::new();
        let mut bytes = 0_u64;
        loop {
            let mut batch: [Option<IWbemClassObject>; BATCH] = [const { None }; BATCH];
            let mut count = 0;
            // SAFETY: the interface is alive; the places are empty and live, as many as their slice says.
            let code = unsafe { found.Next(left_ms(deadline), &mut batch, &raw mut count) };
            if code.is_err() {
                return Err(object::failed(action, &code.into()));
            }
            for object in batch.into_iter().flatten() {
                let instance = object::read(&object, object::MAX_DEPTH)?;
                bytes = bytes.saturating_add(weight(&instance));
                let limit_bytes = self.max_answer_bytes;
                if instances.len() >= MAX_OBJECTS || bytes > limit_bytes {
                    let action = action.to_owned();
                    return Err(CimError::TooLarge { action, limit_bytes });
                }
                instances.push(instance);
            }
            match code.0 {
                WBEM_TIMED_OUT => return Err(self.timed_out(action)),
                // WBEM_S_NO_ERROR: all that were asked for, and perhaps more.
                0 => {}
                // WBEM_S_FALSE: these were the last.
                _ => return Ok(instances),
            }
        }
    }

    /// An object as COM has it.
    fn object(
        &self,
        services: &IWbemServices,
        path: &str,
        action: &str,
        deadline: Instant,
    ) -> Result<IWbemClassObject> {
        let path = variant::bstr(path)?;
        let (mut object, mut later) = (None, None);
        // SAFETY: the interface and the string are alive; both places are empty and live.
        unsafe {
            services.GetObject(
                &path,
                WBEM_FLAG_RETURN_IMMEDIATELY,
                None::<&IWbemContext>,
                Some(&raw mut object),
                Some(&raw mut later),
            )
        }
        .map_err(|error| object::failed(action, &error))?;
        self.result(object, later, action, deadline)?.ok_or_else(|| CimError::NotFound {
            what: action.to_owned(),
            detail: "nothing was answered".into(),
        })
    }

    /// What a call came to: at once, or waited for.
    fn result(
        &self,
        object: Option<IWbemClassObject>,
        later: Option<IWbemCallResult>,
        action: &str,
        deadline: Instant,
    ) -> Result<Option<IWbemClassObject>> {
        let (None, Some(later)) = (&object, later) else { return Ok(object) };
        set_blanket(&later);
        let mut raw = ptr::null_mut();
        // SAFETY: the interface is alive; the place is live. Called by its table, because a time that is over is a
        // success of which the wrapper does not tell.
        let code = unsafe {
            (Interface::vtable(&later).GetResultObject)(
                Interface::as_raw(&later),
                left_ms(deadline),
                &raw mut raw,
            )
        };
        match code.0 {
            WBEM_TIMED_OUT => Err(self.timed_out(action)),
            _ if code.is_err() => Err(object::failed_later(action, &code.into())),
            _ if raw.is_null() => Ok(None),
            // SAFETY: a success gave an interface that is ours now.
            _ => Ok(Some(unsafe { IWbemClassObject::from_raw(raw) })),
        }
    }
}

impl Default for ComCim {
    fn default() -> Self {
        Self::new()
    }
}

const WBEM_TIMED_OUT: i32 = WBEM_S_TIMEDOUT.0;

/// About how much memory an instance takes.
fn weight(instance: &CimInstance) -> u64 {
    fn of(value: &CimValue) -> u64 {
        match value {
            CimValue::String(text) | CimValue::DateTime(text) => 32 + text.len() as u64,
            CimValue::Array(_, items) => 32 + items.iter().map(of).sum::<u64>(),
            CimValue::Instance(instance) => weight(instance),
            _ => 32,
        }
    }
    instance.properties.iter().map(|(name, value)| name.len() as u64 + of(value)).sum()
}

/// What is left until the deadline, as COM takes it.
fn left_ms(deadline: Instant) -> i32 {
    let left = deadline.saturating_duration_since(Instant::now()).as_millis();
    i32::try_from(left).unwrap_or(i32::MAX)
}

fn connect(namespace: &str) -> Result<IWbemServices> {
    let action = format!("connecting to {namespace}");
    // SAFETY: COM is set up; no pointers but that to a constant.
    let locator: IWbemLocator =
        unsafe { CoCreateInstance(&WbemLocator, None::<&IUnknown>, CLSCTX_INPROC_SERVER) }
            .map_err(|error| object::failed(&action, &error))?;
    let (resource, none) = (variant::bstr(namespace)?, BSTR::new());
    // SAFETY: the interface and the strings are alive; empty ones stand for this account and this system's language.
    let services = unsafe {
        locator.ConnectServer(
            &resource,
            &none,
            &none,
            &none,
            WBEM_FLAG_CONNECT_USE_MAX_WAIT.0,
            &none,
            None::<&IWbemContext>,
        )
    }
    .map_err(|error| object::failed(&action, &error))?;
    set_blanket(&services);
    Ok(services)
}

/// Lets the service act with this account's rights. An interface that is no proxy needs none and says so.
fn set_blanket(interface: &impl Interface) {
    let Ok(unknown) = interface.cast::<IUnknown>() else { return };
    // SAFETY: the interface is alive; null stands for the defaults.
    let set = unsafe {
        CoSetProxyBlanket(
            &unknown,
            RPC_C_AUTHN_WINNT,
            RPC_C_AUTHZ_NONE,
            PCWSTR::null(),
            RPC_C_AUTHN_LEVEL_CALL,
            RPC_C_IMP_LEVEL_IMPERSONATE,
            None,
            EOAC_NONE,
        )
    };
    drop(set);
}

impl Cim for ComCim {
    fn peer(&self) -> &str {
        error::PEER
    }

    fn query(&self, namespace: &str, wql: &str) -> Result<Vec<CimInstance>> {
        self.list(namespace, wql)
    }

    fn get(&self, path: &ObjectPath) -> Result<CimInstance> {
        let action = path.to_string();
        self.with(&path.namespace, |services, deadline| {
            let object = self.object(services, &statements::relative(path), &action, deadline)?;
            object::read(&object, object::MAX_DEPTH)
        })
    }

    fn associators(
        &self,
        path: &ObjectPath,
        association: &Association,
    ) -> Result<Vec<CimInstance>> {
        self.list(&path.namespace, &statements::associators(path, association)?)
    }

    fn references(&self, path: &ObjectPath, association: &Association) -> Result<Vec<CimInstance>> {
        self.list(&path.namespace, &statements::references(path, association)?)
    }

    fn invoke(
        &self,
        path: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
    ) -> Result<MethodOutput> {
        let action = format!("{}.{method}", path.class);
        self.with(&path.namespace, |services, deadline| {
            let class = self.object(services, &path.class, &action, deadline)?;
            let takes = object::parameters(&class, path, method, parameters)?;
            let (target, name) =
                (variant::bstr(&statements::relative(path))?, variant::bstr(method)?);
            let (mut gives, mut later) = (None, None);
            // SAFETY: the interface, strings and parameters are alive; both places are empty and live.
            unsafe {
                services.ExecMethod(
                    &target,
                    &name,
                    WBEM_FLAG_RETURN_IMMEDIATELY,
                    None::<&IWbemContext>,
                    takes.as_ref(),
                    Some(&raw mut gives),
                    Some(&raw mut later),
                )
            }
            .map_err(|error| object::failed(&action, &error))?;
            let gives = self.result(gives, later, &action, deadline)?;
            let mut parameters = match gives {
                Some(object) => object::read(&object, object::MAX_DEPTH)?,
                None => CimInstance::default(),
            };
            let return_value = parameters.optional_number("ReturnValue")?.unwrap_or(0);
            parameters.properties.retain(|(name, _)| !name.eq_ignore_ascii_case("ReturnValue"));
            parameters.class.clear();
            parameters.path = None;
            Ok(MethodOutput { return_value, parameters })
        })
    }
}

#[cfg(test)]
mod tests {
    //! Against the COM of the system that the tests run on: Windows' own, or Wine's, which has `root\cimv2`.
    //!
    //! What Wine (8.0) lacks: it answers semisynchronous calls at once, so results that are waited for, and limits of
    //! time, are not tried; its provider cannot be asked by two threads at once, so one after the other asks here; a
    //! class that is not there is an empty answer; there are no embedded objects, no references as parameters, no
    //! security, and nothing of Hyper-V.
    use super::*;

    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

    /// For Wine's sake: see above.
    fn alone() -> std::sync::MutexGuard<'static, ()> {
        ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
    }

    const CIMV2: &str = r"root\cimv2";

    fn cim() -> ComCim {
        ComCim::new()
    }

    fn in_cimv2(class: &str, keys: &[(&str, &str)]) -> ObjectPath {
        ObjectPath { namespace: CIMV2.into(), ..ObjectPath::new(class, keys) }
    }

    #[test]
    fn queries_give_typed_instances_with_their_paths() {
        let _alone = alone();
        let cim = cim();
        let systems = cim.query(CIMV2, "SELECT * FROM Win32_OperatingSystem").unwrap();
        let system = &systems[0];
        assert_eq!(system.class, "Win32_OperatingSystem");
        assert!(!system.text("Caption").unwrap().is_empty());
        // uint64 comes as text, uint32 and uint16 as other integers, a truth as one, a time as text.
        let memory: u64 = system.number("TotalVisibleMemorySize").unwrap();
        assert!(memory > 1024, "{memory} KiB");
        assert!(matches!(system.value("TotalVisibleMemorySize"), Some(CimValue::Uint64(_))));
        assert!(matches!(system.value("Primary"), Some(CimValue::Boolean(true))));
        assert!(
            matches!(system.value("LastBootUpTime"), Some(CimValue::DateTime(text)) if text.len() == 25)
        );
        let none = "SELECT * FROM Win32_Process WHERE Name='no such program'";
        assert!(cim.query(CIMV2, none).unwrap().is_empty());
    }

    #[test]
    fn one_object_is_got_by_its_path() {
        let _alone = alone();
        let cim = cim();
        let own = std::process::id().to_string();
        let process = cim.get(&in_cimv2("Win32_Process", &[("Handle", &own)])).unwrap();
        assert_eq!(process.number::<u32>("ProcessId").unwrap(), std::process::id());
        let path = process.path.as_ref().unwrap();
        assert_eq!(
            (path.class.as_str(), path.key("handle")),
            ("Win32_Process", Some(own.as_str()))
        );
        assert_eq!(cim.get(path).unwrap().path, process.path);
        let missing = cim.get(&in_cimv2("Win32_Process", &[("Handle", "4000000000")]));
        assert!(matches!(missing, Err(CimError::NotFound { .. })), "{missing:?}");
    }

    #[test]
    fn what_is_not_there_is_told_apart() {
        let _alone = alone();
        let cim = cim();
        let class = cim.query(CIMV2, "SELECT * FROM Win32_NoSuchClass");
        let is_wines = class.as_ref().is_ok_and(Vec::is_empty);
        assert!(is_wines || matches!(class, Err(CimError::NotFound { .. })), "{class:?}");
        let class = cim.get(&in_cimv2("Win32_NoSuchClass", &[]));
        assert!(matches!(class, Err(CimError::NotFound { .. })), "{class:?}");
        let namespace = cim.query(r"root\nosuchnamespace", "SELECT * FROM X");
        assert!(matches!(namespace, Err(CimError::NotFound { .. })), "{namespace:?}");
        let query = cim.query(CIMV2, "SELECT FROM WHERE");
        assert!(query.is_err(), "{query:?}");
        let method = cim.invoke(&in_cimv2("Win32_Process", &[]), "NoSuchMethod", &[]);
        assert!(method.is_err(), "{method:?}");
    }

    #[test]
    fn methods_take_and_give_parameters() {
        let _alone = alone();
        let cim = cim();
        let registry = in_cimv2("StdRegProv", &[]);
        // HKEY_LOCAL_MACHINE, as an unsigned number past the signed ones.
        let key = CimValue::Uint32(0x8000_0002);
        let name = r"SOFTWARE\Microsoft\Windows NT\CurrentVersion";
        let output = cim
            .invoke(
                &registry,
                "GetStringValue",
                &[
                    ("hDefKey", key.clone()),
                    ("sSubKeyName", name.into()),
                    ("sValueName", "CurrentVersion".into()),
                ],
            )
            .unwrap();
        assert_eq!(output.return_value, 0, "{output:?}");
        let version = output.parameters.text("sValue").unwrap();
        assert!(version.contains('.'), "{version}");
        // An answer with an array.
        let parameters = [("hDefKey", key), ("sSubKeyName", r"SOFTWARE\Microsoft".into())];
        let output = cim.invoke(&registry, "EnumKey", &parameters).unwrap();
        let names = output.parameters.texts("sNames").unwrap();
        assert!(output.return_value == 0 && names.contains(&"Windows NT"), "{names:?}");
        assert!(output.parameters.value("ReturnValue").is_none());
        let strange = cim.invoke(&registry, "EnumKey", &[("sNoSuch", "x".into())]);
        assert!(strange.is_err(), "{strange:?}");
    }

    #[test]
    fn associations_are_followed() {
        let _alone = alone();
        let cim = cim();
        let disks =
            cim.query(CIMV2, "SELECT * FROM Win32_LogicalDisk WHERE DeviceID='C:'").unwrap();
        let disk =
            in_cimv2("Win32_LogicalDisk", &[("DeviceID", disks[0].text("DeviceID").unwrap())]);
        let association = Association::new("Win32_LogicalDiskToPartition", "Win32_DiskPartition");
        let partitions = cim.associators(&disk, &association).unwrap();
        assert_eq!(partitions[0].class, "Win32_DiskPartition");
        assert!(!partitions[0].text("DeviceID").unwrap().is_empty());
    }

    #[test]
    fn one_connection_serves_many_threads() {
        let cim = cim();
        let first = {
            let _alone = alone();
            cim.query(CIMV2, "SELECT ProcessId FROM Win32_Process").unwrap()
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..3 {
                        let _alone = alone();
                        let found =
                            cim.query(CIMV2, "SELECT ProcessId FROM Win32_Process").unwrap();
                        assert!(!found.is_empty() && !first.is_empty());
                    }
                });
            }
        });
        assert_eq!(cim.connections().len(), 1);
    }

    #[test]
    fn strings_and_arrays_survive_com() {
        use crate::types::{Form, Raw, encoded};
        for value in [
            CimValue::strings(["", "a\u{1F4BE}\\\"", "ß"]),
            CimValue::Uint16(40000),
            CimValue::Uint32(u32::MAX),
            CimValue::Boolean(true),
            CimValue::Real64(0.1),
            CimValue::Sint8(-3),
            CimValue::Array(vmtide_cim::CimType::Uint8, vec![CimValue::Uint8(7); 3]),
            CimValue::Array(vmtide_cim::CimType::Boolean, vec![CimValue::Boolean(true)]),
            CimValue::strings(Vec::<String>::new()),
        ] {
            let (form, raw) = encoded("P", &value).unwrap();
            let made = variant::make(form, &raw).unwrap();
            assert_eq!(variant::read(&made, 1).unwrap(), raw, "{value:?}");
        }
        assert_eq!(
            variant::read(&variant::make(Form::Bstr, &Raw::Null).unwrap(), 1).unwrap(),
            Raw::Null
        );
    }
}
