//! Repositories: making, opening, restore points, their disks, backup and restore.

use crate::args::{self, Out, Range, Structure};
use crate::guard::call;
use crate::handle::{self, Object, OpenImage};
use crate::image::{
    NEW_FORCE, NEW_IN_PLACE, NEW_OVERWRITE, NEW_SALVAGE, NewOptions, enter, new_options,
    parse_format, workers,
};
use crate::job::{json, watch_of};
use crate::status::{Failure, Result, Status};
use crate::track::{Agent, agent_options, new_ranges};
use crate::watch::{self, DataCallbacks, Watch};
use std::collections::BTreeMap;
use std::ffi::{c_char, c_void};
use std::sync::Arc;
use vmtide_engine::source::{SourceOptions, SourceSpec, image_name, split_scheme, tracked_disks};
use vmtide_engine::{
    BackupJob, LevelChoice, RestoreJob, RestoreTarget, backup, diff, points, resolve, restore,
    state_directory,
};
use vmtide_repo::{
    BackupOptions as StoreOptions, Encryption, InitOptions, LocalStore, ObjectStore, Password,
    Purpose, Repository, RestorePoint,
};
use vmtide_s3::{ProbeDepth, S3Options, S3Store};

const BACKUP_CHANGES: u32 = 1;
const BACKUP_TRACK: u32 = 2;

/// The longest password taken, in bytes.
const MAX_PASSWORD_BYTES: u64 = 1 << 20;

/// `vmtide_backup_options`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BackupOptions {
    struct_size: u64,
    name: *const c_char,
    format: *const c_char,
    state_directory: *const c_char,
    changes: *const Range,
    changes_count: u64,
    agent: *const Agent,
    level: i32,
    flags: u32,
    check_unchanged: u32,
    workers: u32,
}

// SAFETY: `repr(C)`, begins with its size, and numbers and pointers may be zero.
unsafe impl Structure for BackupOptions {}

/// The store at a location: one that is there, or a new one.
fn store(location: &str, is_new: bool) -> Result<Arc<dyn ObjectStore>> {
    let directory = match split_scheme(location) {
        Some(("s3", _)) => {
            let options = S3Options::parse(location)?;
            let (store, depth) = match is_new {
                true => (S3Store::create(&options)?, ProbeDepth::Full),
                false => (S3Store::connect(&options)?, ProbeDepth::Reading),
            };
            store.require(depth)?;
            return Ok(Arc::new(store));
        }
        Some(("file", rest)) if rest.starts_with('/') => rest,
        Some((scheme, _)) => {
            return Err(Failure::invalid(format!(
                "{scheme}:// is no repository: give a directory, file:///DIRECTORY or s3://BUCKET/PREFIX"
            )));
        }
        None if location.is_empty() => return Err(Failure::invalid("location is empty")),
        None => location,
    };
    Ok(match is_new {
        true => Arc::new(LocalStore::create(directory)?),
        false => Arc::new(LocalStore::open(directory)?),
    })
}

/// A password, none where it is null.
///
/// # Safety
/// `password` is null or points to `length` bytes.
unsafe fn password_of(password: *const c_void, length: u64) -> Result<Option<Password>> {
    if password.is_null() && length == 0 {
        return Ok(None);
    }
    if length > MAX_PASSWORD_BYTES {
        return Err(Failure::invalid(format!("a password of {length} bytes is none")));
    }
    // SAFETY: by this function's own contract.
    let bytes = unsafe { args::bytes(password.cast(), length, "password") }?;
    Ok(Some(Password::new(bytes)))
}

/// `vmtide_repository_init`.
///
/// # Safety
/// As vmtide.h says: strings end with a 0, `password` has as many bytes as said, and what is not null
/// may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_repository_init(
    location: *const c_char,
    password: *const c_void,
    password_length: u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (location, password) = unsafe {
            (args::string(location, "location")?, password_of(password, password_length)?)
        };
        let encryption = if password.is_some() { Encryption::Aes256Gcm } else { Encryption::None };
        let options = InitOptions { encryption, ..InitOptions::default() };
        Repository::init(store(&location, true)?, &options, password.as_ref())?;
        Ok(())
    })
}

/// `vmtide_repository_open`.
///
/// # Safety
/// As [`vmtide_repository_init`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_repository_open(
    location: *const c_char,
    password: *const c_void,
    password_length: u64,
    repository: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, location, password) = unsafe {
            (
                Out::new(repository, "repository")?,
                args::string(location, "location")?,
                password_of(password, password_length)?,
            )
        };
        let mut password = password;
        let mut give = || {
            password.take().ok_or_else(|| {
                vmtide_repo::RepoError::Invalid(
                    "the repository is encrypted: give its password".into(),
                )
            })
        };
        let opened = Repository::open(store(&location, false)?, &mut give)?;
        place.set(handle::open(Object::Repository(Arc::new(opened))));
        Ok(())
    })
}

/// `vmtide_repository_points`.
///
/// # Safety
/// As [`vmtide_repository_init`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_repository_points(
    repository: u64,
    vm: *const c_char,
    points_text: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, vm) =
            unsafe { (Out::new(points_text, "points")?, args::optional_string(vm, "vm")?) };
        let list = points(handle::repository(repository)?.as_ref(), vm.as_deref())?;
        let unreadable: Vec<_> = list
            .unreadable
            .iter()
            .map(|(object, error)| {
                serde_json::json!({ "object": object, "message": error.to_string() })
            })
            .collect();
        place.set(json(&serde_json::json!({ "points": list.points, "unreadable": unreadable }))?);
        Ok(())
    })
}

/// The disk that is named, or the only one.
fn disk_of<'p>(point: &'p RestorePoint, disk: Option<&'p str>) -> Result<&'p str> {
    match (disk, &point.disks[..]) {
        (Some(disk), _) => Ok(disk),
        (None, [only]) => Ok(&only.id),
        (None, disks) => {
            let ids: Vec<_> = disks.iter().map(|disk| disk.id.as_str()).collect();
            Err(Failure::invalid(format!(
                "disk is NULL, and there are several: {}",
                ids.join(", ")
            )))
        }
    }
}

/// `vmtide_repository_open_disk`.
///
/// # Safety
/// As [`vmtide_repository_init`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_repository_open_disk(
    repository: u64,
    point: *const c_char,
    disk: *const c_char,
    image: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, point, disk) = unsafe {
            (
                Out::new(image, "image")?,
                args::string(point, "point")?,
                args::optional_string(disk, "disk")?,
            )
        };
        let repository = handle::repository(repository)?;
        // Before the point is looked for, so that nobody removes it in between.
        let lease = repository.lease(Purpose::Read)?;
        let point = resolve(&repository, &point)?;
        let device = repository.open_disk(&point, disk_of(&point, disk.as_deref())?)?;
        place.set(enter(OpenImage::reading(device, Some(lease))));
        Ok(())
    })
}

/// `vmtide_repository_diff`.
///
/// # Safety
/// As [`vmtide_repository_init`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_repository_diff(
    repository: u64,
    from: *const c_char,
    to: *const c_char,
    difference: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, from, to) = unsafe {
            (
                Out::new(difference, "difference")?,
                args::string(from, "from")?,
                args::string(to, "to")?,
            )
        };
        let repository = handle::repository(repository)?;
        let _lease = repository.lease(Purpose::Read)?;
        let (from, to) = (resolve(&repository, &from)?, resolve(&repository, &to)?);
        let disks = diff(&repository, &from, &to)?;
        place.set(json(&serde_json::json!({ "from": from.id, "to": to.id, "disks": disks }))?);
        Ok(())
    })
}

/// `vmtide_repository_changes`.
///
/// # Safety
/// As [`vmtide_repository_init`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_repository_changes(
    repository: u64,
    from: *const c_char,
    to: *const c_char,
    disk: *const c_char,
    changes: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, from, to, disk) = unsafe {
            (
                Out::new(changes, "changes")?,
                args::string(from, "from")?,
                args::string(to, "to")?,
                args::optional_string(disk, "disk")?,
            )
        };
        let repository = handle::repository(repository)?;
        let _lease = repository.lease(Purpose::Read)?;
        let (from, to) = (resolve(&repository, &from)?, resolve(&repository, &to)?);
        let disk = disk_of(&to, disk.as_deref())?;
        let (Some(old), Some(new)) = (from.disk_record(disk), to.disk_record(disk)) else {
            return Err(Failure::new(
                Status::NotFound,
                format!("the disk {disk} is not in both restore points"),
            ));
        };
        place.set(new_ranges(&repository.changed_between(old, new)?));
        Ok(())
    })
}

/// `vmtide_backup`.
///
/// # Safety
/// As [`vmtide_repository_init`]; callbacks may be called until this returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_backup(
    repository: u64,
    source: *const c_char,
    options: *const BackupOptions,
    watch: *const Watch,
    summary: *mut u64,
    error: *mut u64,
) -> i32 {
    call(error, || {
        // SAFETY: by this function's own contract; all members may be zero.
        let (place, source, wanted, watch) = unsafe {
            (
                Out::new(summary, "summary")?,
                args::string(source, "source")?,
                Wanted::read(options)?,
                watch_of(watch)?,
            )
        };
        let repository = handle::repository(repository)?;
        // SAFETY: by this function's own contract.
        let done = unsafe {
            watch::run(&watch, DataCallbacks::NONE, |context, _| {
                let spec = SourceSpec::parse(&source)?;
                let open = spec.open(&wanted.source_options(&repository, &spec)?)?;
                Ok(backup(
                    &BackupJob {
                        repository: &repository,
                        hypervisor: open.hypervisor.as_ref(),
                        vm: open.vm,
                        name: open.name,
                        source: open.display,
                        level: wanted.level,
                        outside_changes: wanted.source.changes.is_some(),
                        consistency: None,
                        allow_downgrade: true,
                        tags: BTreeMap::new(),
                        exclude: Vec::new(),
                        is_one_of_many: false,
                        check_unchanged: wanted.check_unchanged,
                        options: wanted.store.clone(),
                    },
                    context,
                )?)
            })
        }?;
        place.set(json(&done)?);
        Ok(())
    })
}

/// What a caller wants of a backup.
struct Wanted {
    source: SourceOptions,
    level: LevelChoice,
    check_unchanged: u32,
    store: StoreOptions,
}

impl Wanted {
    /// Takes the options apart.
    ///
    /// # Safety
    /// As vmtide.h says of `vmtide_backup_options`.
    unsafe fn read(options: *const BackupOptions) -> Result<Self> {
        // SAFETY: by this function's own contract; all members may be zero.
        let options = unsafe { args::options(options, "vmtide_backup_options") }?;
        args::check_flags(options.flags, BACKUP_CHANGES | BACKUP_TRACK, "vmtide_backup_options")?;
        // SAFETY: strings and ranges as the header says, by this function's own contract.
        let (name, format, state, changes, agent) = unsafe {
            (
                args::optional_string(options.name, "name")?,
                args::optional_string(options.format, "format")?,
                args::optional_string(options.state_directory, "state_directory")?,
                args::ranges(options.changes, options.changes_count)?,
                agent_options(options.agent)?,
            )
        };
        let has_changes = options.flags & BACKUP_CHANGES != 0;
        if !has_changes && options.changes_count > 0 {
            return Err(Failure::invalid("there are changes without VMTIDE_BACKUP_CHANGES"));
        }
        let level = match options.level {
            0 => LevelChoice::Auto,
            1 => LevelChoice::Full,
            2 => LevelChoice::Incremental,
            3 => LevelChoice::Differential,
            other => return Err(Failure::invalid(format!("{other} is no level"))),
        };
        let source = SourceOptions {
            name,
            format: parse_format(format)?,
            changes: has_changes.then_some(changes),
            state_directory: state.map_or_else(state_directory, Into::into),
            track: options.flags & BACKUP_TRACK != 0,
            agent,
            ..SourceOptions::default()
        };
        let defaults = StoreOptions::default();
        let store = StoreOptions {
            workers: workers(options.workers).unwrap_or(defaults.workers),
            ..defaults
        };
        Ok(Self { source, level, check_unchanged: options.check_unchanged, store })
    }

    /// How the source is opened: with what is known of the VM's disks.
    fn source_options(&self, repository: &Repository, spec: &SourceSpec) -> Result<SourceOptions> {
        let tracked = match spec {
            SourceSpec::Image(path) => {
                let name = self.source.name.clone().map_or_else(|| image_name(path), Ok)?;
                tracked_disks(repository, &name)?
            }
            _ => Vec::new(),
        };
        Ok(SourceOptions { tracked, ..self.source.clone() })
    }
}

/// `vmtide_restore`.
///
/// # Safety
/// As [`vmtide_backup`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmtide_restore(
    repository: u64,
    point: *const c_char,
    disk: *const c_char,
    target: *const c_char,
    options: *const NewOptions,
    watch: *const Watch,
    summary: *mut u64,
    error: *mut u64,
) -> i32 {
    const KNOWN: u32 = NEW_OVERWRITE | NEW_IN_PLACE | NEW_SALVAGE | NEW_FORCE;
    call(error, || {
        // SAFETY: by this function's own contract.
        let (place, point, disk, target, new, watch) = unsafe {
            (
                Out::new(summary, "summary")?,
                args::string(point, "point")?,
                args::optional_string(disk, "disk")?,
                args::string(target, "target")?,
                new_options(options, KNOWN)?,
                watch_of(watch)?,
            )
        };
        let repository = handle::repository(repository)?;
        let has = |flag: u32| new.flags & flag != 0;
        // SAFETY: by this function's own contract.
        let done = unsafe {
            watch::run(&watch, DataCallbacks::NONE, |context, _| {
                let _lease = repository.lease(Purpose::Read)?;
                let point = resolve(&repository, &point)?;
                let job = RestoreJob {
                    repository: &repository,
                    point: &point,
                    target: RestoreTarget::parse(&target)?,
                    disk,
                    format: new.kind.format,
                    subformat: new.kind.subformat.clone(),
                    in_place: has(NEW_IN_PLACE),
                    force: has(NEW_OVERWRITE) || has(NEW_FORCE),
                    workers: new.workers,
                    salvage: has(NEW_SALVAGE),
                };
                Ok(restore(&job, context)?)
            })
        }?;
        place.set(json(&done)?);
        Ok(())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    #[test]
    fn journals_and_locks_are_where_the_command_has_them() {
        // SAFETY: null is all defaults.
        let wanted = unsafe { Wanted::read(std::ptr::null()) }.unwrap();
        assert_eq!(wanted.source.state_directory, state_directory());
        assert_ne!(wanted.source.state_directory, std::env::temp_dir());
    }
}
