//! What a service needs around it: a directory that only administrators can read, and somewhere for its output.

use std::fs::File;
use std::io;
use std::os::windows::ffi::OsStrExt;
use std::os::windows::io::IntoRawHandle;
use std::path::Path;
use std::ptr;
use windows_sys::Win32::Foundation::{HLOCAL, LocalFree};
use windows_sys::Win32::Security::Authorization::{
    ConvertStringSecurityDescriptorToSecurityDescriptorW, SDDL_REVISION_1,
};
use windows_sys::Win32::Security::{
    DACL_SECURITY_INFORMATION, PROTECTED_DACL_SECURITY_INFORMATION, PSECURITY_DESCRIPTOR,
    SetFileSecurityW,
};
use windows_sys::Win32::System::Console::{STD_ERROR_HANDLE, STD_OUTPUT_HANDLE, SetStdHandle};
use windows_sys::core::w;

/// A security descriptor that Windows allocated.
struct Descriptor(PSECURITY_DESCRIPTOR);

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: allocated by the conversion, freed once.
        unsafe { LocalFree(self.0 as HLOCAL) };
    }
}

/// Makes a directory, or takes over one, whose content only the system and administrators can read: the default
/// below `%ProgramData%` is that every user can.
///
/// # Errors
/// What Windows says.
pub fn private_directory(path: &Path) -> io::Result<()> {
    std::fs::create_dir_all(path)?;
    let mut descriptor: PSECURITY_DESCRIPTOR = ptr::null_mut();
    // SAFETY: the text is constant and ends with a zero: protected from inheritance (P); for files and directories
    // below as well (OICI), everything (FA) for the system (SY) and administrators (BA).
    let made = unsafe {
        ConvertStringSecurityDescriptorToSecurityDescriptorW(
            w!("D:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)"),
            SDDL_REVISION_1,
            &raw mut descriptor,
            ptr::null_mut(),
        )
    };
    if made == 0 {
        return Err(io::Error::last_os_error());
    }
    let descriptor = Descriptor(descriptor);
    let wide: Vec<u16> = path.as_os_str().encode_wide().chain([0]).collect();
    let what = DACL_SECURITY_INFORMATION | PROTECTED_DACL_SECURITY_INFORMATION;
    // SAFETY: the path ends with a zero and the descriptor lives through the call.
    if unsafe { SetFileSecurityW(wide.as_ptr(), what, descriptor.0) } == 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Leads standard output and standard error of this process to a file: a service has none of its own.
///
/// # Errors
/// What Windows says.
pub fn redirect_output(file: File) -> io::Result<()> {
    // Never closed: every thread may write to it until the process ends.
    let copy = file.try_clone()?.into_raw_handle();
    let handle = file.into_raw_handle();
    // SAFETY: both handles are open and stay so.
    let done = unsafe {
        SetStdHandle(STD_OUTPUT_HANDLE, handle) != 0 && SetStdHandle(STD_ERROR_HANDLE, copy) != 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}
