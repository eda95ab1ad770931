//! A process that the service control manager started, running as a service.
//!
//! The manager calls two functions of the process without handing either a pointer of the program's own at first:
//! the service's main function. What it is to run is therefore left in one static place, once per process.
//! The second, which gets "stop", has a pointer to what it shares with the first; that is never freed,
//! because the manager does not say when it calls for the last time.

use crate::{Result, ServiceError};
use std::panic::AssertUnwindSafe;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use windows_sys::Win32::Foundation::{
    ERROR_CALL_NOT_IMPLEMENTED, ERROR_SERVICE_SPECIFIC_ERROR, GetLastError, NO_ERROR,
};
use windows_sys::Win32::System::Services as scm;
use windows_sys::core::PWSTR;

/// How long the manager may wait for a start or a stop before it thinks that the service hangs.
const WAIT_HINT_MS: u32 = 60_000;
/// The code of a service that panicked.
const PANICKED: u32 = 101;

type Main = Box<dyn FnOnce(RunningService) -> u32 + Send>;
type OnStop = Box<dyn FnOnce() + Send>;

struct Job {
    name: Vec<u16>,
    main: Main,
}

static JOB: Mutex<Option<Job>> = Mutex::new(None);

enum Stop {
    /// Nobody has said what to do.
    Unset,
    Do(OnStop),
    Asked,
    /// The last state was reported. One more report may end the process (remarks of `SetServiceStatus`).
    Ended,
}

struct Shared {
    status: AtomicPtr<core::ffi::c_void>,
    stop: Mutex<Stop>,
}

/// The service as its main function sees it.
#[derive(Clone)]
pub struct RunningService(Arc<Shared>);

impl RunningService {
    /// What to do when the service is to stop: something quick that makes main return. Done at once where that
    /// was asked already.
    pub fn on_stop(&self, action: impl FnOnce() + Send + 'static) {
        let mut stop = self.0.stop.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*stop, Stop::Asked | Stop::Ended) {
            drop(stop);
            action();
        } else {
            *stop = Stop::Do(Box::new(action));
        }
    }

    /// Tells the manager that the service does its work now; nothing where it is to stop already.
    pub fn started(&self) {
        let stop = self.0.stop.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(*stop, Stop::Asked | Stop::Ended) {
            self.0.report(scm::SERVICE_RUNNING, 0);
        }
    }
}

impl Shared {
    fn report(&self, state: u32, exit_code: u32) {
        let pending = matches!(state, scm::SERVICE_START_PENDING | scm::SERVICE_STOP_PENDING);
        let accepted = if state == scm::SERVICE_RUNNING {
            scm::SERVICE_ACCEPT_STOP | scm::SERVICE_ACCEPT_SHUTDOWN
        } else {
            0
        };
        let status = scm::SERVICE_STATUS {
            dwServiceType: scm::SERVICE_WIN32_OWN_PROCESS,
            dwCurrentState: state,
            dwControlsAccepted: accepted,
            dwWin32ExitCode: if exit_code == 0 { NO_ERROR } else { ERROR_SERVICE_SPECIFIC_ERROR },
            dwServiceSpecificExitCode: exit_code,
            dwCheckPoint: u32::from(pending),
            dwWaitHint: if pending { WAIT_HINT_MS } else { 0 },
        };
        let handle = self.status.load(Ordering::SeqCst);
        // SAFETY: the handle is the one the manager gave, which needs no closing; the structure lives.
        unsafe { scm::SetServiceStatus(handle, &raw const status) };
    }

    fn stop(&self) {
        let mut stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*stop, Stop::Ended) {
            return;
        }
        let before = std::mem::replace(&mut *stop, Stop::Asked);
        self.report(scm::SERVICE_STOP_PENDING, 0);
        drop(stop);
        if let Stop::Do(action) = before {
            action();
        }
    }
}

/// Runs `main` as the service `name`; returns when it has ended. `main` calls
/// [`started`](RunningService::started) when it is ready, and its result is the service's exit code.
///
/// # Errors
/// [`ServiceError::Call`] with code 1063 in a process that the manager did not start.
pub fn run(name: &str, main: impl FnOnce(RunningService) -> u32 + Send + 'static) -> Result<()> {
    let wide: Vec<u16> = name.encode_utf16().chain([0]).collect();
    let job = Job { name: wide.clone(), main: Box::new(main) };
    *JOB.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
    let mut name_in_table = wide;
    let table = [
        scm::SERVICE_TABLE_ENTRYW {
            lpServiceName: name_in_table.as_mut_ptr(),
            lpServiceProc: Some(service_main),
        },
        scm::SERVICE_TABLE_ENTRYW::default(),
    ];
    // SAFETY: the table ends with an entry of nulls; it and the name live through the call.
    if unsafe { scm::StartServiceCtrlDispatcherW(table.as_ptr()) } != 0 {
        return Ok(());
    }
    // SAFETY: no pointers.
    let code = unsafe { GetLastError() };
    Err(ServiceError::Call { operation: "run", name: name.to_owned(), code })
}

/// Called by the manager's dispatcher, on a thread of its own.
unsafe extern "system" fn service_main(_: u32, _: *mut PWSTR) {
    let Some(job) = JOB.lock().unwrap_or_else(PoisonError::into_inner).take() else {
        return;
    };
    let shared =
        Arc::new(Shared { status: AtomicPtr::new(ptr::null_mut()), stop: Mutex::new(Stop::Unset) });
    let context = Arc::into_raw(Arc::clone(&shared));
    // SAFETY: the name ends with a zero; the context is never freed, so the handler may be called at any time.
    let handle = unsafe {
        scm::RegisterServiceCtrlHandlerExW(job.name.as_ptr(), Some(control), context.cast())
    };
    if handle.is_null() {
        return;
    }
    shared.status.store(handle, Ordering::SeqCst);
    shared.report(scm::SERVICE_START_PENDING, 0);
    let service = RunningService(Arc::clone(&shared));
    let main = AssertUnwindSafe(|| (job.main)(service));
    // Nothing may unwind into the caller, which is not Rust.
    let code = std::panic::catch_unwind(main).unwrap_or(PANICKED);
    // With the lock: a request to stop reports before this or not at all.
    let mut stop = shared.stop.lock().unwrap_or_else(PoisonError::into_inner);
    *stop = Stop::Ended;
    shared.report(scm::SERVICE_STOPPED, code);
}

/// Called by the manager's dispatcher for each request.
unsafe extern "system" fn control(
    request: u32,
    _: u32,
    _: *mut core::ffi::c_void,
    context: *mut core::ffi::c_void,
) -> u32 {
    // SAFETY: the context is the one that was registered: a Shared that is never freed.
    let shared = unsafe { &*context.cast::<Shared>() };
    match request {
        scm::SERVICE_CONTROL_STOP | scm::SERVICE_CONTROL_SHUTDOWN => {
            let _ = std::panic::catch_unwind(AssertUnwindSafe(|| shared.stop()));
            NO_ERROR
        }
        scm::SERVICE_CONTROL_INTERROGATE => NO_ERROR,
        _ => ERROR_CALL_NOT_IMPLEMENTED,
    }
}
