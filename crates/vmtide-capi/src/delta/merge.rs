//! Deltas looked at, and made one.

use super::check_one;
use super::options::{DeltaOptions, Wanted};
use crate::args::{self, Out};
use crate::guard::call;
use crate::job::{json, watch_of};
use crate::status::{Failure, Result};
use crate::watch::{self, Caller, DataCallbacks, Watch, WriteCallback};
use std::ffi::{c_char, c_void};
use std::path::{Path, PathBuf};
use vmtide_engine::JobContext;
use vmtide_engine::delta::{MergeJob, info, merge};

/// `vmtide_delta_info`.
///
/// # Safety
/// As [`vmtide_delta_create`](super::vmtide_delta_create).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_delta_info(
    path: *const c_char,
    verify: i32,
    info_text: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract; a null watch has no callbacks.
        let (place, path, watch) = unsafe {
            (Out::new(info_text, "info")?, args::string(path, "path")?, watch_of(std::ptr::null())?)
        };
        // SAFETY: there are no callbacks.
        let found = unsafe {
            watch::run(&watch, DataCallbacks::NONE, |context, _| {
                Ok(info(Path::new(&path), verify != 0, context)?)
            })
        }?;
        place.set(json(&found)?);
        Ok(())
    })
}

/// `vmtide_delta_merge`.
///
/// # Safety
/// As [`vmtide_delta_create`](super::vmtide_delta_create); `paths` has `path_count` strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_delta_merge(
    paths: *const *const c_char,
    path_count: u64,
    options: *const DeltaOptions,
    output: *const c_char,
    write: WriteCallback,
    write_context: *mut c_void,
    watch: *const Watch,
    summary: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, deltas, wanted, output, watch) = unsafe {
            (
                Out::new(summary, "summary")?,
                paths_of(paths, path_count)?,
                Wanted::read(options)?,
                args::optional_string(output, "output")?,
                watch_of(watch)?,
            )
        };
        check_one(output.is_some(), write.is_some(), "output")?;
        let job = MergeJob { deltas, options: wanted.options.clone() };
        let data = DataCallbacks { write, context: write_context, ..DataCallbacks::NONE };
        let work = |context: JobContext<'_>, caller: &Caller| {
            wanted.write(output.as_ref(), caller, |output| merge(&job, output, context))
        };
        // SAFETY: by this function's own contract.
        let made = unsafe { watch::run(&watch, data, work) }?;
        place.set(json(&made)?);
        Ok(())
    })
}

/// A list of paths.
///
/// # Safety
/// `paths` is null or points to `count` strings that end with a 0.
unsafe fn paths_of(paths: *const *const c_char, count: u64) -> Result<Vec<PathBuf>> {
    const MOST: u64 = 256;
    if paths.is_null() || count > MOST {
        return Err(Failure::invalid(format!("paths is NULL, or there are more than {MOST}")));
    }
    let count = usize::try_from(count).unwrap_or(0);
    (0..count)
        .map(|index| {
            // SAFETY: inside the `count` strings of the contract.
            let path = unsafe { args::string(paths.add(index).read_unaligned(), "a path") }?;
            Ok(PathBuf::from(path))
        })
        .collect()
}
