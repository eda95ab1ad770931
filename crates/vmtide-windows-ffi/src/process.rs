//! Who runs: processes told from all others, also from later ones of the same number.

use std::ffi::c_void;
use std::io::{Error, Result};
use windows_sys::Wdk::System::SystemInformation::{
    NtQuerySystemInformation, SystemTimeOfDayInformation,
};
use windows_sys::Win32::Foundation::{
    CloseHandle, ERROR_INVALID_PARAMETER, FILETIME, HANDLE, WAIT_OBJECT_0,
};
use windows_sys::Win32::System::ProcessStatus::{K32GetProcessMemoryInfo, PROCESS_MEMORY_COUNTERS};
use windows_sys::Win32::System::Registry::{HKEY_LOCAL_MACHINE, RRF_RT_REG_DWORD, RegGetValueW};
use windows_sys::Win32::System::Threading::{
    GetCurrentProcess, GetProcessHandleCount, GetProcessTimes, OpenProcess,
    PROCESS_QUERY_LIMITED_INFORMATION, PROCESS_SYNCHRONIZE, WaitForSingleObject,
};

/// When the process of this number began, in units of 100 ns since 1601; none where there is no such
/// process (any more).
///
/// # Errors
/// Where the system does not tell, e.g. of a process of another user: it may run.
pub fn started(pid: u32) -> Result<Option<u64>> {
    let rights = PROCESS_QUERY_LIMITED_INFORMATION | PROCESS_SYNCHRONIZE;
    // SAFETY: takes plain numbers.
    let handle = unsafe { OpenProcess(rights, 0, pid) };
    if handle.is_null() {
        let error = Error::last_os_error();
        let code = error.raw_os_error().map(i32::cast_unsigned);
        return if code == Some(ERROR_INVALID_PARAMETER) { Ok(None) } else { Err(error) };
    }
    let process = Process(handle);
    // A process that ended stays openable while anybody holds a handle of it.
    // SAFETY: the handle is open and has the right to be waited for.
    if unsafe { WaitForSingleObject(process.0, 0) } == WAIT_OBJECT_0 {
        return Ok(None);
    }
    let [mut begun, mut ended, mut kernel, mut user] = [FILETIME::default(); 4];
    // SAFETY: the handle is open, and all pointers are to live structures.
    super::check(unsafe {
        GetProcessTimes(process.0, &raw mut begun, &raw mut ended, &raw mut kernel, &raw mut user)
    })?;
    Ok(Some((u64::from(begun.dwHighDateTime) << 32) | u64::from(begun.dwLowDateTime)))
}

/// When this system was booted, in units of 100 ns since 1601, by the clock as it is set now: the first
/// field of `SYSTEM_TIMEOFDAY_INFORMATION`. Setting the clock moves it. None where it does not tell.
pub fn boot_time() -> Option<u64> {
    /// The structure has 48 bytes; the system fills what fits.
    const BYTES: usize = 48;
    let mut answer = [0_u64; BYTES / 8];
    let size = u32::try_from(BYTES).ok()?;
    // SAFETY: the pointer is to live memory of the length given, aligned for what is written, which
    // takes any bytes; the returned length is not asked for.
    let status = unsafe {
        NtQuerySystemInformation(
            SystemTimeOfDayInformation,
            answer.as_mut_ptr().cast::<c_void>(),
            size,
            std::ptr::null_mut(),
        )
    };
    answer.first().copied().filter(|time| status >= 0 && *time != 0)
}

/// The memory that this process has in the machine's, in bytes.
///
/// # Errors
/// What the system says.
pub fn resident_bytes() -> Result<u64> {
    let mut counters = PROCESS_MEMORY_COUNTERS::default();
    let size = u32::try_from(size_of::<PROCESS_MEMORY_COUNTERS>()).unwrap_or(0);
    // SAFETY: the pointer is to a live structure of the length given; the handle is this process' own, and needs no
    // closing.
    super::check(unsafe { K32GetProcessMemoryInfo(GetCurrentProcess(), &raw mut counters, size) })?;
    Ok(counters.WorkingSetSize as u64)
}

/// How many handles this process has open.
///
/// # Errors
/// What the system says.
pub fn handle_count() -> Result<u32> {
    let mut count = 0;
    // SAFETY: the pointer is to a live number; the handle is this process' own, and needs no closing.
    super::check(unsafe { GetProcessHandleCount(GetCurrentProcess(), &raw mut count) })?;
    Ok(count)
}

/// Whether this is inside a Windows container: such a one sees only its own processes, and may have the
/// name of another.
pub fn is_in_container() -> bool {
    let wide = |text: &str| text.encode_utf16().chain([0]).collect::<Vec<u16>>();
    // What Windows writes there in every container, and nowhere else.
    let (key, value) = (wide(r"SYSTEM\CurrentControlSet\Control"), wide("ContainerType"));
    let none = std::ptr::null_mut();
    // SAFETY: both texts live through the call and end in a zero; the type, the data and its length
    // are not asked for and may be null.
    let code = unsafe {
        RegGetValueW(
            HKEY_LOCAL_MACHINE,
            key.as_ptr(),
            value.as_ptr(),
            RRF_RT_REG_DWORD,
            std::ptr::null_mut(),
            none,
            std::ptr::null_mut(),
        )
    };
    code == 0
}

/// An open process, closed when dropped.
struct Process(HANDLE);

impl Drop for Process {
    fn drop(&mut self) {
        // SAFETY: the handle is open and nobody else's. That it closes is all one can wish for.
        unsafe { CloseHandle(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_handles_are_told() {
        assert!(resident_bytes().unwrap() > 1 << 16);
        // How many there are Wine before 9 does not tell.
        handle_count().unwrap();
    }

    #[test]
    fn processes_are_told_apart() {
        let own = started(std::process::id()).unwrap().unwrap();
        assert_eq!(started(std::process::id()).unwrap(), Some(own));
        assert_eq!(boot_time(), boot_time());
        assert!(boot_time().is_some_and(|boot| boot <= own));
        assert!(!is_in_container());
        let mut child = std::process::Command::new("cmd")
            .args(["/C", "pause"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        assert!(started(child.id()).unwrap().is_some());
        child.kill().unwrap();
        child.wait().unwrap();
        // Its handle is still open here.
        assert_eq!(started(child.id()).unwrap(), None);
    }
}
