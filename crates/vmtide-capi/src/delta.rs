//! Deltas: made into files or callbacks, looked at, merged, applied from files or callbacks.

use crate::args::{self, Out, Range, Structure};
use crate::guard::call;
use crate::handle;
use crate::image::{
    OPEN_ANY_PARENT, OPEN_FOLLOW, OpenOptions, open_options, parse_format, workers,
};
use crate::job::{json, watch_of};
use crate::status::{Failure, Result};
use crate::watch::{self, Caller, DataCallbacks, ReadCallback, Watch, WriteCallback};
use std::ffi::{c_char, c_void};
use std::io::Read;
use std::path::{Path, PathBuf};
use vmtide_block::RangeSet;
use vmtide_engine::JobContext;
use vmtide_engine::delta::{
    ApplyJob, CreateDeltaJob, CreateOptions, DeltaOrigin, DeltaOutput, MadeDelta, MergeJob, apply,
    create, info, merge,
};
use vmtide_engine::image::{DiskSpec, OpenDiskOptions, open_disk};
use vmtide_engine::resolve;

const DELTA_CHANGES: u32 = 1;
const DELTA_OVERWRITE: u32 = 2;
const DELTA_NO_BASE_DIGEST: u32 = 4;
const DELTA_FINGERPRINT: u32 = 8;
const DELTA_PLAIN: u32 = 16;
const DELTA_FLAGS: u32 =
    DELTA_CHANGES | DELTA_OVERWRITE | DELTA_NO_BASE_DIGEST | DELTA_FINGERPRINT | DELTA_PLAIN;

const APPLY_NO_BASE_CHECK: u32 = 1;
const APPLY_FORCE: u32 = 2;

/// The unit in which disks are compared where the caller says none, in bytes.
const GRANULARITY_BYTES: u32 = 4096;

/// `vmtide_delta_options`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct DeltaOptions {
    struct_size: u64,
    base: *const c_char,
    base_id: *const c_char,
    new_id: *const c_char,
    changes: *const Range,
    changes_count: u64,
    flags: u32,
    level: i32,
    granularity_bytes: u32,
    workers: u32,
    source_options: *const OpenOptions,
    base_options: *const OpenOptions,
}

// SAFETY: `repr(C)`, begins with its size, and numbers and pointers may be zero.
unsafe impl Structure for DeltaOptions {}

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

/// What a caller wants of a delta.
struct Wanted {
    base: Option<String>,
    base_id: Option<String>,
    new_id: Option<String>,
    changes: Option<RangeSet>,
    flags: u32,
    granularity_bytes: u32,
    options: CreateOptions,
    /// How the image and the base are opened, where the caller says it.
    open_source: Option<OpenDiskOptions>,
    open_base: Option<OpenDiskOptions>,
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
    unsafe fn read(options: *const DeltaOptions) -> Result<Self> {
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

    fn job<'a>(&self, origin: DeltaOrigin<'a>) -> CreateDeltaJob<'a> {
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
    fn write(
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

/// Exactly one of a file and a callback.
fn check_one(has_path: bool, has_callback: bool, what: &str) -> Result<()> {
    match (has_path, has_callback) {
        (true, false) | (false, true) => Ok(()),
        (false, false) => Err(Failure::invalid(format!("{what} and the callback are NULL"))),
        (true, true) => Err(Failure::invalid(format!("{what} and a callback are both given"))),
    }
}

/// `vmtide_delta_create`.
///
/// # Safety
/// As vmtide.h says: strings end with a 0, structures are as long as they say, callbacks may be called
/// until this returns, and what is not null may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_delta_create(
    source: *const c_char,
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
        let (place, source, wanted, output, watch) = unsafe {
            (
                Out::new(summary, "summary")?,
                args::string(source, "source")?,
                Wanted::read(options)?,
                args::optional_string(output, "output")?,
                watch_of(watch)?,
            )
        };
        check_one(output.is_some(), write.is_some(), "output")?;
        let data = DataCallbacks { write, context: write_context, ..DataCallbacks::NONE };
        let work = |context: JobContext<'_>, caller: &Caller| {
            let open = |text: &str, options: &Option<OpenDiskOptions>| {
                open_disk(&DiskSpec::parse(text)?, &options.clone().unwrap_or_default())
            };
            let disk = open(&source, &wanted.open_source)?;
            let base =
                wanted.base.as_deref().map(|base| open(base, &wanted.open_base)).transpose()?;
            let origin = match (&wanted.changes, &base) {
                (Some(changed), base) => DeltaOrigin::Changes {
                    disk: &disk,
                    changed: changed.clone(),
                    base: base.as_ref().filter(|_| wanted.options.base_digests),
                    base_size_bytes: base.as_ref().map(|base| base.device.size_bytes()),
                },
                (None, Some(base)) => DeltaOrigin::Disks { base, disk: &disk },
                (None, None) => {
                    return Err(Failure::invalid(
                        "there are neither changes nor a base to compare with",
                    ));
                }
            };
            let job = wanted.job(origin);
            wanted.write(output.as_ref(), caller, |output| create(&job, output, context))
        };
        // SAFETY: by this function's own contract.
        let made = unsafe { watch::run(&watch, data, work) }?;
        place.set(json(&made)?);
        Ok(())
    })
}

/// `vmtide_delta_create_points`.
///
/// # Safety
/// As [`vmtide_delta_create`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_delta_create_points(
    repository: u64,
    from: *const c_char,
    to: *const c_char,
    disk: *const c_char,
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
        let (place, from, to, disk, wanted, output, watch) = unsafe {
            (
                Out::new(summary, "summary")?,
                args::string(from, "from")?,
                args::string(to, "to")?,
                args::optional_string(disk, "disk")?,
                Wanted::read(options)?,
                args::optional_string(output, "output")?,
                watch_of(watch)?,
            )
        };
        check_one(output.is_some(), write.is_some(), "output")?;
        let has_disks = wanted.base.is_some() || wanted.open_source.is_some();
        if wanted.changes.is_some() || has_disks {
            return Err(Failure::invalid(
                "two restore points say themselves what changed: give neither changes, nor a base, nor how images are opened",
            ));
        }
        let repository = handle::repository(repository)?;
        let data = DataCallbacks { write, context: write_context, ..DataCallbacks::NONE };
        let work = |context: JobContext<'_>, caller: &Caller| {
            let (from, to) = (resolve(&repository, &from)?, resolve(&repository, &to)?);
            let origin = DeltaOrigin::Points {
                repository: &repository,
                from: &from,
                to: &to,
                disk: disk.as_deref(),
            };
            let job = wanted.job(origin);
            wanted.write(output.as_ref(), caller, |output| create(&job, output, context))
        };
        // SAFETY: by this function's own contract.
        let made = unsafe { watch::run(&watch, data, work) }?;
        place.set(json(&made)?);
        Ok(())
    })
}

/// `vmtide_delta_info`.
///
/// # Safety
/// As [`vmtide_delta_create`].
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
/// As [`vmtide_delta_create`]; `paths` has `path_count` strings.
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

/// `vmtide_delta_apply`.
///
/// # Safety
/// As [`vmtide_delta_create`].
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;
    use std::ffi::CString;

    /// Makes a delta with all defaults but `options`, and says what size the disk has in it.
    fn size_in_delta(
        disk: &Path,
        options: &DeltaOptions,
        output: &Path,
    ) -> std::result::Result<u64, String> {
        let text = |path: &Path| CString::new(path.to_str().unwrap()).unwrap();
        let (disk, path, mut summary, mut error) = (text(disk), text(output), 0, 0);
        // SAFETY: strings end with a 0, the structure is as long as it says, the rest is null.
        let status = unsafe {
            vmtide_delta_create(
                disk.as_ptr(),
                options,
                path.as_ptr(),
                None,
                std::ptr::null_mut(),
                std::ptr::null(),
                &raw mut summary,
                &raw mut error,
            )
        };
        if let Some(handle::Object::Error(error)) = handle::get(error) {
            return Err(error.message.to_string_lossy().into_owned());
        }
        assert_eq!(status, 0);
        let Some(handle::Object::Text(made)) = handle::get(summary) else {
            unreachable!("a summary is a text");
        };
        let made: serde_json::Value = serde_json::from_slice(made.as_bytes()).unwrap();
        handle::close(summary).unwrap();
        Ok(made["size_bytes"].as_u64().unwrap())
    }

    #[test]
    fn what_a_guest_wrote_does_not_decide_how_its_raw_disk_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        // A raw disk whose guest wrote a whole qcow2 image of 64 MiB to its beginning.
        let qcow2 = CString::new(path("guest.qcow2").to_str().unwrap()).unwrap();
        // SAFETY: the string ends with a 0, the rest is null.
        let status = unsafe {
            crate::vmtide_image_create(
                qcow2.as_ptr(),
                64 << 20,
                std::ptr::null(),
                std::ptr::null_mut(),
            )
        };
        assert_eq!(status, 0);
        let mut content = std::fs::read(path("guest.qcow2")).unwrap();
        content.resize(4 << 20, 0);
        std::fs::write(path("old.raw"), &content).unwrap();
        content[3 << 20..].fill(9);
        std::fs::write(path("new.raw"), &content).unwrap();

        // SAFETY: all members may be zero.
        let mut raw: OpenOptions = unsafe { args::options(std::ptr::null(), "") }.unwrap();
        raw.struct_size = size_of::<OpenOptions>() as u64;
        raw.format = c"raw".as_ptr();
        let base = CString::new(path("old.raw").to_str().unwrap()).unwrap();
        // SAFETY: as above.
        let mut options: DeltaOptions = unsafe { args::options(std::ptr::null(), "") }.unwrap();
        options.struct_size = size_of::<DeltaOptions>() as u64;
        options.base = base.as_ptr();
        options.source_options = &raw const raw;
        options.base_options = &raw const raw;
        let disk = path("new.raw");
        assert_eq!(size_in_delta(&disk, &options, &path("told.vmtd")), Ok(4 << 20));
        // Not told, it is refused, or taken for what the guest wrote where not even its name says raw.
        options.source_options = std::ptr::null();
        options.base_options = std::ptr::null();
        let refused = size_in_delta(&disk, &options, &path("refused.vmtd")).unwrap_err();
        assert!(refused.contains("a guest can forge"), "{refused}");
        let (named, renamed) = (path("new"), path("old"));
        std::fs::rename(&disk, &named).unwrap();
        std::fs::rename(path("old.raw"), &renamed).unwrap();
        let base = CString::new(renamed.to_str().unwrap()).unwrap();
        options.base = base.as_ptr();
        assert_eq!(size_in_delta(&named, &options, &path("found.vmtd")), Ok(64 << 20));
    }
}
