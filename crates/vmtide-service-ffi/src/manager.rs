//! Services from outside: install, start, stop, remove.

use crate::{Result, ServiceError, command_line};
use std::ffi::{OsStr, OsString};
use std::os::windows::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::time::{Duration, Instant};
use windows_sys::Win32::Foundation::{
    ERROR_SERVICE_NOT_ACTIVE, ERROR_SERVICE_SPECIFIC_ERROR, GetLastError,
};
use windows_sys::Win32::Storage::FileSystem::DELETE;
use windows_sys::Win32::System::Services as scm;

/// How often a state is asked for while it is waited for.
const POLL: Duration = Duration::from_millis(100);
/// After how long without a failure the manager counts them anew, in seconds.
const FAILURES_RESET_S: u32 = 24 * 3600;
/// When the manager starts a service again that failed: after the first, the second, every other time.
const RESTART_AFTER_MS: [u32; 3] = [5_000, 30_000, 120_000];

/// A service to be installed. It starts with Windows.
#[derive(Clone, Debug)]
pub struct NewService<'a> {
    /// The name by which it is started and stopped.
    pub name: &'a str,
    /// The name that the list of services shows.
    pub display_name: &'a str,
    /// What it is for.
    pub description: &'a str,
    /// The program, in full.
    pub program: &'a Path,
    /// Its arguments. No secrets: every user of the host can read them.
    pub arguments: &'a [OsString],
}

/// What a service does now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceState {
    /// Not running; the code it ended with, 0 for a normal end.
    Stopped(u32),
    /// Starting, stopping or paused.
    Changing,
    /// Running.
    Running,
}

/// A handle of the manager, closed when it is dropped.
struct ScHandle(scm::SC_HANDLE);

impl Drop for ScHandle {
    fn drop(&mut self) {
        // SAFETY: made by a call that succeeded, closed once.
        unsafe { scm::CloseServiceHandle(self.0) };
    }
}

/// Calls about one service, with its name for errors.
struct Named<'a> {
    name: &'a str,
    operation: &'static str,
}

impl Named<'_> {
    fn check(&self, ok: bool) -> Result<()> {
        if ok {
            return Ok(());
        }
        // SAFETY: no pointers.
        let code = unsafe { GetLastError() };
        Err(ServiceError::Call { operation: self.operation, name: self.name.to_owned(), code })
    }

    fn invalid(&self, problem: &'static str) -> ServiceError {
        ServiceError::Invalid { name: self.name.to_owned(), problem }
    }

    fn wide(&self, text: impl AsRef<OsStr>) -> Result<Vec<u16>> {
        let mut units: Vec<u16> = text.as_ref().encode_wide().collect();
        if units.contains(&0) {
            return Err(self.invalid("a text has a zero character"));
        }
        units.push(0);
        Ok(units)
    }

    fn manager(&self, access: u32) -> Result<ScHandle> {
        // SAFETY: null means this machine and its active database.
        let handle = unsafe { scm::OpenSCManagerW(ptr::null(), ptr::null(), access) };
        self.check(!handle.is_null())?;
        Ok(ScHandle(handle))
    }

    fn service(&self, access: u32) -> Result<ScHandle> {
        let manager = self.manager(scm::SC_MANAGER_CONNECT)?;
        let name = self.wide(self.name)?;
        // SAFETY: the manager is open and the name ends with a zero.
        let handle = unsafe { scm::OpenServiceW(manager.0, name.as_ptr(), access) };
        self.check(!handle.is_null())?;
        Ok(ScHandle(handle))
    }

    fn state(&self, service: &ScHandle) -> Result<ServiceState> {
        let mut status = scm::SERVICE_STATUS::default();
        // SAFETY: the service is open for questions and the structure lives through the call.
        let ok = unsafe { scm::QueryServiceStatus(service.0, &raw mut status) };
        self.check(ok != 0)?;
        Ok(match status.dwCurrentState {
            scm::SERVICE_STOPPED => {
                let own = status.dwWin32ExitCode == ERROR_SERVICE_SPECIFIC_ERROR;
                let code =
                    if own { status.dwServiceSpecificExitCode } else { status.dwWin32ExitCode };
                ServiceState::Stopped(code)
            }
            scm::SERVICE_RUNNING => ServiceState::Running,
            _ => ServiceState::Changing,
        })
    }

    fn wait_until(
        &self,
        service: &ScHandle,
        wanted: &'static str,
        within: Duration,
        mut reached: impl FnMut(ServiceState) -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + within;
        loop {
            if reached(self.state(service)?)? {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let seconds = within.as_secs();
                return Err(ServiceError::Slow { name: self.name.to_owned(), wanted, seconds });
            }
            std::thread::sleep(POLL);
        }
    }
}

/// Installs a service: it runs as LocalSystem, starts with Windows, and is started again when it fails.
///
/// # Errors
/// [`ServiceError::Call`] without the rights of an administrator, or where one of this name exists.
pub fn install(new: &NewService<'_>) -> Result<()> {
    let call = Named { name: new.name, operation: "install" };
    let program: Vec<u16> = new.program.as_os_str().encode_wide().collect();
    let arguments: Vec<Vec<u16>> =
        new.arguments.iter().map(|a| a.encode_wide().collect()).collect();
    let mut line = command_line::join(&program, &arguments).ok_or_else(|| {
        call.invalid("its command line has a character that cannot be in one, such as two %")
    })?;
    line.push(0);
    let (name, display_name) = (call.wide(new.name)?, call.wide(new.display_name)?);
    let manager = call.manager(scm::SC_MANAGER_CONNECT | scm::SC_MANAGER_CREATE_SERVICE)?;
    // SAFETY: all strings end with a zero and live through the call; null means no group, tag, dependencies,
    // account (LocalSystem) and password.
    let service = unsafe {
        scm::CreateServiceW(
            manager.0,
            name.as_ptr(),
            display_name.as_ptr(),
            scm::SERVICE_ALL_ACCESS,
            scm::SERVICE_WIN32_OWN_PROCESS,
            scm::SERVICE_AUTO_START,
            scm::SERVICE_ERROR_NORMAL,
            line.as_ptr(),
            ptr::null(),
            ptr::null_mut(),
            ptr::null(),
            ptr::null(),
            ptr::null(),
        )
    };
    call.check(!service.is_null())?;
    let service = ScHandle(service);
    let mut description = call.wide(new.description)?;
    let info = scm::SERVICE_DESCRIPTIONW { lpDescription: description.as_mut_ptr() };
    configure(&service, scm::SERVICE_CONFIG_DESCRIPTION, &info);
    let mut actions =
        RESTART_AFTER_MS.map(|delay| scm::SC_ACTION { Type: scm::SC_ACTION_RESTART, Delay: delay });
    let info = scm::SERVICE_FAILURE_ACTIONSW {
        dwResetPeriod: FAILURES_RESET_S,
        cActions: u32::try_from(actions.len()).unwrap_or_default(),
        lpsaActions: actions.as_mut_ptr(),
        ..Default::default()
    };
    configure(&service, scm::SERVICE_CONFIG_FAILURE_ACTIONS, &info);
    // Else only a crash counts as a failure, not a service that says with which code it ended.
    let info = scm::SERVICE_FAILURE_ACTIONS_FLAG { fFailureActionsOnNonCrashFailures: 1 };
    configure(&service, scm::SERVICE_CONFIG_FAILURE_ACTIONS_FLAG, &info);
    Ok(())
}

/// Sets what a service does not need to run; a system that does not have it is no error.
fn configure<T>(service: &ScHandle, level: u32, info: &T) {
    // SAFETY: the service is open for changes; the structure is that of the level and lives through the call.
    unsafe { scm::ChangeServiceConfig2W(service.0, level, ptr::from_ref(info).cast()) };
}

/// Starts a service and waits until it runs.
///
/// # Errors
/// [`ServiceError::Ended`] where it ends instead, [`ServiceError::Slow`] where it takes longer than `within`.
pub fn start(name: &str, within: Duration) -> Result<()> {
    let call = Named { name, operation: "start" };
    let service = call.service(scm::SERVICE_START | scm::SERVICE_QUERY_STATUS)?;
    // SAFETY: the service is open for starting; no arguments.
    let ok = unsafe { scm::StartServiceW(service.0, 0, ptr::null()) };
    call.check(ok != 0)?;
    call.wait_until(&service, "running", within, |state| match state {
        ServiceState::Running => Ok(true),
        ServiceState::Changing => Ok(false),
        ServiceState::Stopped(code) => Err(ServiceError::Ended { name: name.to_owned(), code }),
    })
}

/// Stops a service and waits until it has ended. One that is not running is no error.
///
/// # Errors
/// [`ServiceError::Slow`] where it takes longer than `within`.
pub fn stop(name: &str, within: Duration) -> Result<()> {
    let call = Named { name, operation: "stop" };
    let service = call.service(scm::SERVICE_STOP | scm::SERVICE_QUERY_STATUS)?;
    let mut status = scm::SERVICE_STATUS::default();
    // SAFETY: the service is open for stopping and the structure lives through the call.
    let ok = unsafe { scm::ControlService(service.0, scm::SERVICE_CONTROL_STOP, &raw mut status) };
    match call.check(ok != 0) {
        Err(error) if error.code() == Some(ERROR_SERVICE_NOT_ACTIVE) => return Ok(()),
        other => other?,
    }
    call.wait_until(&service, "stopped", within, |state| {
        Ok(matches!(state, ServiceState::Stopped(_)))
    })
}

/// What a service does now.
///
/// # Errors
/// [`ServiceError::Call`] where there is none of this name.
pub fn state(name: &str) -> Result<ServiceState> {
    let call = Named { name, operation: "ask for" };
    call.state(&call.service(scm::SERVICE_QUERY_STATUS)?)
}

/// Stops a service and removes it.
///
/// # Errors
/// As [`stop`]; [`ServiceError::Call`] where there is none of this name.
pub fn remove(name: &str, within: Duration) -> Result<()> {
    stop(name, within)?;
    let call = Named { name, operation: "remove" };
    let service = call.service(DELETE)?;
    // SAFETY: the service is open for removal.
    let ok = unsafe { scm::DeleteService(service.0) };
    call.check(ok != 0)
}
