//! The calls of Windows that the standard library has not, as safe functions: holes in files
//! ([`sparse`]), new names ([`names`]), what a file is and takes ([`files`]), who runs
//! ([`process`]). On other systems the crate is empty.
//!
//! Every function takes borrowed files or paths and answers with owned values, so no handle or pointer
//! leaves this crate. Errors are those of `GetLastError`, without context: the caller knows what it
//! was doing.

#[cfg(windows)]
pub mod files;
#[cfg(windows)]
pub mod names;
#[cfg(windows)]
pub mod process;
#[cfg(windows)]
pub mod sparse;

/// Succeeds where a function of Windows answered with anything but `FALSE`.
#[cfg(windows)]
fn check(result: windows_sys::core::BOOL) -> std::io::Result<()> {
    if result == 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}
