//! Jobs on images, and what all jobs share.

use crate::args::{self, Out};
use crate::guard::call;
use crate::handle;
use crate::image::{
    NEW_COMPRESS, NEW_FORCE, NEW_IN_PLACE, NEW_OVERWRITE, NEW_SYNC, NewOptions, OpenOptions,
    new_options, open_options,
};
use crate::status::{Failure, Result, Status};
use crate::watch::{self, DataCallbacks, Watch};
use serde::Serialize;
use std::ffi::c_char;
use vmtide_engine::image::DiskSpec;
use vmtide_engine::{ConvertJob, Durability, convert};

/// A text of what serialises.
pub(crate) fn json(value: &impl Serialize) -> Result<u64> {
    serde_json::to_string(value).map(|text| handle::new_text(&text)).map_err(|error| {
        Failure::new(Status::Internal, format!("the answer cannot be written as JSON: {error}"))
    })
}

/// The watch of a call; null watches nothing.
///
/// # Safety
/// As vmtide.h says of `vmtide_watch`.
pub(crate) unsafe fn watch_of(watch: *const Watch) -> Result<Watch> {
    // SAFETY: by this function's own contract; all members may be zero.
    unsafe { args::options(watch, "vmtide_watch") }
}

/// `vmtide_convert`.
///
/// # Safety
/// As vmtide.h says: strings end with a 0, structures are as long as they say, callbacks may be called
/// until this returns, and what is not null may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_convert(
    source: *const c_char,
    source_options: *const OpenOptions,
    target: *const c_char,
    target_options: *const NewOptions,
    watch: *const Watch,
    summary: *mut u64,
    error: *mut u64,
) -> i32 {
    const KNOWN: u32 = NEW_OVERWRITE | NEW_IN_PLACE | NEW_COMPRESS | NEW_SYNC | NEW_FORCE;
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, source, (open, _), target, new, watch) = unsafe {
            (
                Out::new(summary, "summary")?,
                args::string(source, "source")?,
                open_options(source_options)?,
                args::string(target, "target")?,
                new_options(target_options, KNOWN)?,
                watch_of(watch)?,
            )
        };
        let has = |flag: u32| new.flags & flag != 0;
        let job = ConvertJob {
            source: DiskSpec::parse(&source)?,
            open,
            target: DiskSpec::parse(&target)?,
            kind: new.kind.clone(),
            overwrite: has(NEW_OVERWRITE),
            in_place: has(NEW_IN_PLACE),
            force: has(NEW_FORCE),
            durability: if has(NEW_SYNC) { Durability::Always } else { Durability::Replaced },
            workers: new.workers,
        };
        // SAFETY: by this function's own contract.
        let done = unsafe {
            watch::run(&watch, DataCallbacks::NONE, |context, _| Ok(convert(&job, context)?))
        }?;
        place.set(json(&done)?);
        Ok(())
    })
}
