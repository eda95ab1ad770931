//! The privilege that attaching needs. An administrator's process has it, switched off.

use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::ptr;
use windows_sys::Win32::Foundation::{ERROR_SUCCESS, GetLastError, HANDLE};
use windows_sys::Win32::Security::{
    AdjustTokenPrivileges, LUID_AND_ATTRIBUTES, LookupPrivilegeValueW, SE_MANAGE_VOLUME_NAME,
    SE_PRIVILEGE_ENABLED, TOKEN_ADJUST_PRIVILEGES, TOKEN_PRIVILEGES, TOKEN_QUERY,
};
use windows_sys::Win32::System::Threading::{GetCurrentProcess, OpenProcessToken};

/// Switches on "Perform volume maintenance tasks" for this process; whether it has it now.
pub(super) fn enable_manage_volume() -> bool {
    let mut token: HANDLE = ptr::null_mut();
    // SAFETY: the pseudo handle of the process is always valid; the result goes to a live variable.
    let opened = unsafe {
        OpenProcessToken(GetCurrentProcess(), TOKEN_ADJUST_PRIVILEGES | TOKEN_QUERY, &raw mut token)
    };
    if opened == 0 {
        return false;
    }
    // SAFETY: the call succeeded, so the handle is open and belongs to nobody else.
    let token = unsafe { OwnedHandle::from_raw_handle(token) };
    let mut privileges = TOKEN_PRIVILEGES {
        PrivilegeCount: 1,
        Privileges: [LUID_AND_ATTRIBUTES {
            Luid: Default::default(),
            Attributes: SE_PRIVILEGE_ENABLED,
        }],
    };
    let [entry] = &mut privileges.Privileges;
    // SAFETY: the name is a constant string with its end; no system name means this one.
    let found =
        unsafe { LookupPrivilegeValueW(ptr::null(), SE_MANAGE_VOLUME_NAME, &raw mut entry.Luid) };
    if found == 0 {
        return false;
    }
    // SAFETY: the token is open and the structure lives through the call; the previous state is not asked for.
    // The last error is read at once: the call succeeds also where it changed nothing (ERROR_NOT_ALL_ASSIGNED).
    unsafe {
        AdjustTokenPrivileges(
            token.as_raw_handle(),
            0,
            &raw const privileges,
            0,
            ptr::null_mut(),
            ptr::null_mut(),
        ) != 0
            && GetLastError() == ERROR_SUCCESS
    }
}
