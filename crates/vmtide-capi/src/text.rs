//! Versions, texts, errors and cancel flags.

use crate::args::Out;
use crate::guard::{answer, call};
use crate::handle::{self, Object};
use crate::status::Status;
use std::ffi::c_char;
use vmtide_block::CancelToken;

/// `VMTIDE_ABI_VERSION` of the library.
const ABI_VERSION: u32 = 1;

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");

/// `vmtide_abi_version`.
#[unsafe(no_mangle)]
pub extern "C" fn vmtide_abi_version() -> u32 {
    ABI_VERSION
}

/// `vmtide_version`.
#[unsafe(no_mangle)]
pub extern "C" fn vmtide_version() -> *const c_char {
    VERSION.as_ptr().cast()
}

/// `vmtide_close`.
///
/// # Safety
/// As vmtide.h says: `error` is null or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_close(handle: u64, error: *mut u64) -> i32 {
    call(error, || {
        match handle::close(handle)? {
            Object::Image(image) => image.close()?,
            Object::Error(_)
            | Object::Text(_)
            | Object::Cancel(_)
            | Object::Repository(_)
            | Object::Ranges(_) => {}
        }
        Ok(())
    })
}

/// `vmtide_open_handles`.
#[unsafe(no_mangle)]
pub extern "C" fn vmtide_open_handles() -> u64 {
    answer(0, handle::count)
}

/// `vmtide_error_status`.
#[unsafe(no_mangle)]
pub extern "C" fn vmtide_error_status(error: u64) -> i32 {
    answer(Status::Internal as i32, || match handle::get(error) {
        Some(Object::Error(error)) => error.status as i32,
        _ => Status::BadHandle as i32,
    })
}

/// `vmtide_error_message`.
#[unsafe(no_mangle)]
pub extern "C" fn vmtide_error_message(error: u64) -> *const c_char {
    answer(std::ptr::null(), || match handle::get(error) {
        // The table holds it until the handle is closed.
        Some(Object::Error(error)) => error.message.as_ptr(),
        _ => std::ptr::null(),
    })
}

/// `vmtide_text_data`.
#[unsafe(no_mangle)]
pub extern "C" fn vmtide_text_data(text: u64) -> *const c_char {
    answer(std::ptr::null(), || match handle::get(text) {
        // The table holds it until the handle is closed.
        Some(Object::Text(text)) => text.as_ptr(),
        _ => std::ptr::null(),
    })
}

/// `vmtide_text_size`.
#[unsafe(no_mangle)]
pub extern "C" fn vmtide_text_size(text: u64) -> u64 {
    answer(0, || match handle::get(text) {
        Some(Object::Text(text)) => text.as_bytes().len() as u64,
        _ => 0,
    })
}

/// `vmtide_cancel_new`.
///
/// # Safety
/// As vmtide.h says: pointers are null or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_cancel_new(cancel: *mut u64, error: *mut u64) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let place = unsafe { Out::new(cancel, "cancel") }?;
        place.set(handle::open(Object::Cancel(CancelToken::new())));
        Ok(())
    })
}

/// `vmtide_cancel_request`.
///
/// # Safety
/// As vmtide.h says: `error` is null or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_cancel_request(cancel: u64, error: *mut u64) -> i32 {
    call(error, || {
        handle::cancel(cancel)?.cancel();
        Ok(())
    })
}
