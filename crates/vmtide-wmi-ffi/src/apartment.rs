//! COM of this process: one apartment for all threads.
//!
//! Interfaces obtained in the multithreaded apartment may be used by all of its threads at once. It is held open for
//! the life of the process, so that threads that never heard of COM belong to it by themselves.

use crate::error;
use std::sync::OnceLock;
use vmtide_cim::{CimError, Result};
use windows::Win32::Foundation::RPC_E_TOO_LATE;
use windows::Win32::System::Com::{
    APTTYPE, APTTYPE_MTA, APTTYPEQUALIFIER, CoGetApartmentType, CoIncrementMTAUsage,
    CoInitializeSecurity, EOAC_NONE, RPC_C_AUTHN_LEVEL_DEFAULT, RPC_C_IMP_LEVEL_IMPERSONATE,
};

/// What setting up came to; once per process.
static READY: OnceLock<std::result::Result<(), u32>> = OnceLock::new();

/// Sets COM up for this process, and makes sure that the calling thread may use what is shared.
///
/// # Errors
/// Where COM cannot be set up, or the thread belongs to an apartment of its own, which only a program with windows
/// makes.
pub fn enter() -> Result<()> {
    let ready = READY.get_or_init(|| set_up().map_err(|error| error.code().0.cast_unsigned()));
    ready.map_err(|code| error::of_code("setting up COM", code, ""))?;
    let mut kind = APTTYPE(0);
    let mut qualifier = APTTYPEQUALIFIER(0);
    // SAFETY: both pointers are to live values.
    let known = unsafe { CoGetApartmentType(&raw mut kind, &raw mut qualifier) };
    match known {
        Ok(()) if kind != APTTYPE_MTA => Err(CimError::protocol(
            error::PEER,
            "this thread has an apartment of its own, in which the connection cannot be used",
        )),
        _ => Ok(()),
    }
}

fn set_up() -> windows::core::Result<()> {
    // SAFETY: no preconditions. The cookie is kept for ever on purpose: the apartment ends with the process.
    let _cookie = unsafe { CoIncrementMTAUsage() }?;
    // SAFETY: all pointers are null, which stands for the defaults.
    let secured = unsafe {
        CoInitializeSecurity(
            None,
            -1,
            None,
            None,
            RPC_C_AUTHN_LEVEL_DEFAULT,
            RPC_C_IMP_LEVEL_IMPERSONATE,
            None,
            EOAC_NONE,
            None,
        )
    };
    match secured {
        // Somebody in this process has decided already; each connection sets its own blanket besides.
        Err(error) if error.code() != RPC_E_TOO_LATE => Err(error),
        _ => Ok(()),
    }
}
