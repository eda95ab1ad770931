//! What stands around every call: no panic crosses, and errors become objects.

use crate::handle::{self, Object, OpenError};
use crate::status::{Failure, Result, Status};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Runs a call. What it returns is its status; where `error` is not null, the reason is put there.
pub(crate) fn call(error: *mut u64, work: impl FnOnce() -> Result<()>) -> i32 {
    let outcome = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Failure::new(
            Status::Internal,
            "a fault in libvmtide ended the call; standard error has the place: please report it",
        ))
    });
    let (status, object) = match outcome {
        Ok(()) => (Status::Ok, 0),
        Err(failure) if error.is_null() => (failure.status, 0),
        Err(failure) => {
            let message = handle::c_string(&failure.message);
            let object = OpenError { status: failure.status, message };
            (failure.status, handle::open(Object::Error(Arc::new(object))))
        }
    };
    if !error.is_null() {
        // SAFETY: not null, and the caller promises that it points to a vmtide_error it may write.
        unsafe { error.write_unaligned(object) };
    }
    status as i32
}

/// Like [`call`] for what answers without a status.
pub(crate) fn answer<T>(otherwise: T, work: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(otherwise)
}
