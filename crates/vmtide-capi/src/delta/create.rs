//! Deltas of disks and of restore points.

use super::check_one;
use super::options::{DeltaOptions, Wanted};
use crate::args::{self, Out};
use crate::guard::call;
use crate::handle;
use crate::job::{json, watch_of};
use crate::status::Failure;
use crate::watch::{self, Caller, DataCallbacks, Watch, WriteCallback};
use std::ffi::{c_char, c_void};
use vmtide_engine::JobContext;
use vmtide_engine::delta::{DeltaOrigin, create};
use vmtide_engine::image::{DiskSpec, OpenDiskOptions, open_disk};
use vmtide_engine::resolve;

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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;
    use crate::image::OpenOptions;
    use std::ffi::CString;
    use std::path::Path;

    /// Makes a delta with all defaults but `options`, and says what size the disk has in it.
    fn size_in_delta(disk: &Path, options: &DeltaOptions, output: &Path) -> Result<u64, String> {
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
