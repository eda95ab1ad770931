//! What a caller wants of a delta that is made or merged.

use crate::args::{self, Range, Structure};
use crate::image::{OPEN_ANY_PARENT, OPEN_FOLLOW, OpenOptions, open_options, workers};
use crate::status::{Failure, Result};
use crate::watch::Caller;
use std::ffi::c_char;
use std::path::PathBuf;
use vmtide_block::RangeSet;
use vmtide_engine::delta::{CreateDeltaJob, CreateOptions, DeltaOrigin, DeltaOutput, MadeDelta};
use vmtide_engine::image::OpenDiskOptions;

const DELTA_CHANGES: u32 = 1;
const DELTA_OVERWRITE: u32 = 2;
const DELTA_NO_BASE_DIGEST: u32 = 4;
const DELTA_FINGERPRINT: u32 = 8;
const DELTA_PLAIN: u32 = 16;
const DELTA_FLAGS: u32 =
    DELTA_CHANGES | DELTA_OVERWRITE | DELTA_NO_BASE_DIGEST | DELTA_FINGERPRINT | DELTA_PLAIN;

/// The unit in which disks are compared where the caller says none, in bytes.
const GRANULARITY_BYTES: u32 = 4096;

/// `vmtide_delta_options`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct DeltaOptions {
    pub(super) struct_size: u64,
    pub(super) base: *const c_char,
    base_id: *const c_char,
    new_id: *const c_char,
    changes: *const Range,
    changes_count: u64,
    flags: u32,
    level: i32,
    granularity_bytes: u32,
    workers: u32,
    pub(super) source_options: *const OpenOptions,
    pub(super) base_options: *const OpenOptions,
}

// SAFETY: `repr(C)`, begins with its size, and numbers and pointers may be zero.
unsafe impl Structure for DeltaOptions {}

/// What a caller wants of a delta.
pub(super) struct Wanted {
    pub base: Option<String>,
    base_id: Option<String>,
    new_id: Option<String>,
    pub changes: Option<RangeSet>,
    flags: u32,
    granularity_bytes: u32,
    pub options: CreateOptions,
    /// How the image and the base are opened, where the caller says it.
    pub open_source: Option<OpenDiskOptions>,
    pub open_base: Option<OpenDiskOptions>,
}

/// How a disk that is only read is opened; none where the caller says nothing.
///
/// # Safety
/// As vmtide.h says of `vmtide_open_options`.
unsafe fn reading(options: *const OpenOptions, what: &str) -> Result<Option<OpenDiskOptions>> {
    if options.is_null() {
        return Ok(None);
    }
    // SAFETY: by this function's own contract.
    let (open, flags) = unsafe { open_options(options) }?;
    args::check_flags(flags, OPEN_ANY_PARENT | OPEN_FOLLOW, what)?;
    Ok(Some(open))
}

impl Wanted {
    /// Takes the options apart.
    ///
    /// # Safety
    /// As vmtide.h says of `vmtide_delta_options`.
    pub unsafe fn read(options: *const DeltaOptions) -> Result<Self> {
        // SAFETY: by this function's own contract; all members may be zero.
        let options = unsafe { args::options(options, "vmtide_delta_options") }?;
        args::check_flags(options.flags, DELTA_FLAGS, "vmtide_delta_options")?;
        // SAFETY: strings and ranges as the header says, by this function's own contract.
        let (base, base_id, new_id, changes) = unsafe {
            (
                args::optional_string(options.base, "base")?,
                args::optional_string(options.base_id, "base_id")?,
                args::optional_string(options.new_id, "new_id")?,
                args::ranges(options.changes, options.changes_count)?,
            )
        };
        // SAFETY: structures as the header says, by this function's own contract.
        let (open_source, open_base) = unsafe {
            (
                reading(options.source_options, "source_options")?,
                reading(options.base_options, "base_options")?,
            )
        };
        if open_base.is_some() && base.is_none() {
            return Err(Failure::invalid("there are base_options without a base"));
        }
        let has = |flag: u32| options.flags & flag != 0;
        if !has(DELTA_CHANGES) && options.changes_count > 0 {
            return Err(Failure::invalid("there are changes without VMTIDE_DELTA_CHANGES"));
        }
        if !(-7..=22).contains(&options.level) {
            return Err(Failure::invalid(format!("{} is no level of zstd", options.level)));
        }
        let level = if options.level == 0 { 1 } else { options.level };
        let granularity_bytes = match options.granularity_bytes {
            0 => GRANULARITY_BYTES,
            bytes @ 512..=8_388_608 if bytes.is_power_of_two() => bytes,
            bytes => return Err(Failure::invalid(format!("{bytes} bytes are no granularity"))),
        };
        let default = CreateOptions::default();
        Ok(Self {
            base,
            base_id,
            new_id,
            changes: has(DELTA_CHANGES).then_some(changes),
            flags: options.flags,
            granularity_bytes,
            options: CreateOptions {
                level: (!has(DELTA_PLAIN)).then_some(level),
                workers: workers(options.workers).unwrap_or(default.workers),
                base_digests: !has(DELTA_NO_BASE_DIGEST),
                ..default
            },
            open_source,
            open_base,
        })
    }

    pub fn job<'a>(&self, origin: DeltaOrigin<'a>) -> CreateDeltaJob<'a> {
        CreateDeltaJob {
            origin,
            base_id: self.base_id.clone(),
            new_id: self.new_id.clone(),
            vm: None,
            granularity_bytes: self.granularity_bytes,
            fingerprint_base: self.flags & DELTA_FINGERPRINT != 0,
            options: self.options.clone(),
        }
    }

    /// Calls `make` with where the delta goes.
    pub fn write(
        &self,
        output: Option<&String>,
        caller: &Caller,
        make: impl FnOnce(DeltaOutput<'_>) -> vmtide_engine::Result<MadeDelta>,
    ) -> Result<MadeDelta> {
        let mut stream = caller.clone();
        Ok(make(match output {
            Some(path) => DeltaOutput::File {
                path: PathBuf::from(path),
                replace: self.flags & DELTA_OVERWRITE != 0,
            },
            None => DeltaOutput::Stream(&mut stream),
        })?)
    }
}
