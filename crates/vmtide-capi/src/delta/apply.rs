//! Deltas applied to images.

use super::check_one;
use crate::args::{self, Out, Structure};
use crate::guard::call;
use crate::image::{parse_format, workers};
use crate::job::{json, watch_of};
use crate::status::Result;
use crate::watch::{self, Caller, DataCallbacks, ReadCallback, Watch};
use std::ffi::{c_char, c_void};
use std::io::Read;
use std::path::PathBuf;
use vmtide_engine::JobContext;
use vmtide_engine::delta::{ApplyJob, apply};
use vmtide_engine::image::{DiskSpec, OpenDiskOptions};

const APPLY_NO_BASE_CHECK: u32 = 1;
const APPLY_FORCE: u32 = 2;

/// `vmtide_apply_options`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ApplyOptions {
    struct_size: u64,
    format: *const c_char,
    child: *const c_char,
    target_id: *const c_char,
    flags: u32,
    workers: u32,
}

// SAFETY: `repr(C)`, begins with its size, and numbers and pointers may be zero.
unsafe impl Structure for ApplyOptions {}

/// `vmtide_delta_apply`.
///
/// # Safety
/// As [`vmtide_delta_create`](super::vmtide_delta_create).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_delta_apply(
    delta: *const c_char,
    read: ReadCallback,
    read_context: *mut c_void,
    target: *const c_char,
    options: *const ApplyOptions,
    watch: *const Watch,
    summary: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract; all members may be zero.
        let (place, delta, target, options, watch) = unsafe {
            (
                Out::new(summary, "summary")?,
                args::optional_string(delta, "delta")?,
                args::string(target, "target")?,
                args::options(options, "vmtide_apply_options")?,
                watch_of(watch)?,
            )
        };
        check_one(delta.is_some(), read.is_some(), "delta")?;
        // SAFETY: by this function's own contract.
        let job = unsafe { apply_job(delta, &target, &options) }?;
        let data = DataCallbacks { read, context: read_context, ..DataCallbacks::NONE };
        let work = |context: JobContext<'_>, caller: &Caller| {
            let stream: Option<Box<dyn Read + Send>> = match job.delta {
                Some(_) => None,
                None => Some(Box::new(caller.clone())),
            };
            Ok(apply(&job, stream, context)?)
        };
        // SAFETY: by this function's own contract.
        let done = unsafe { watch::run(&watch, data, work) }?;
        place.set(json(&done)?);
        Ok(())
    })
}

/// The job of an application.
///
/// # Safety
/// As vmtide.h says of `vmtide_apply_options`.
unsafe fn apply_job(
    delta: Option<String>,
    target: &str,
    options: &ApplyOptions,
) -> Result<ApplyJob> {
    const KNOWN: u32 = APPLY_NO_BASE_CHECK | APPLY_FORCE;
    args::check_flags(options.flags, KNOWN, "vmtide_apply_options")?;
    // SAFETY: strings as the header says, by this function's own contract.
    let (format, child, target_id) = unsafe {
        (
            args::optional_string(options.format, "format")?,
            args::optional_string(options.child, "child")?,
            args::optional_string(options.target_id, "target_id")?,
        )
    };
    Ok(ApplyJob {
        delta: delta.map(PathBuf::from),
        target: DiskSpec::parse(target)?,
        format: parse_format(format)?,
        open: OpenDiskOptions::default(),
        child: child.map(PathBuf::from),
        target_id,
        check_base: options.flags & APPLY_NO_BASE_CHECK == 0,
        force: options.flags & APPLY_FORCE != 0,
        spool_directory: None,
        workers: workers(options.workers),
    })
}
