//! Applying a delta: to an image, a block device or an export in place, or to a new child of an image.

use super::create::new_file;
use super::note::{FileState, Note, path_of};
use crate::events::{JobContext, Phase};
use crate::image::create::{CreateJob, stage};
use crate::image::files::{check_no_children, files_of};
use crate::image::{DiskSpec, OpenDiskOptions, staged};
use crate::in_use::{Use, check_not_in_use};
use crate::lock::ImageLock;
use crate::peer::NbdPeer;
use crate::target::{ImageKind, format_of_existing};
use crate::{EngineError, Result};
use serde::Serialize;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use vmtide_block::{BlockDevice, OpenMode, RawDevice, WritableBlockDevice};
use vmtide_delta::{
    ApplyOptions, ApplyPlan, ApplySummary, DeltaError, DeltaFile, DeltaReader, apply_stream,
    fingerprint,
};
use vmtide_image::{
    BackingPolicy, Format, ImageWriter, OpenOptions, open_read_only, open_writable,
};
use vmtide_nbd::NbdOptions;

/// The application of a delta.
pub struct ApplyJob {
    /// The file with the delta; none reads `stream`.
    pub delta: Option<PathBuf>,
    /// What is applied to; with `child` the parent of the new image.
    pub target: DiskSpec,
    /// The format of the target; none goes by its name and content, which must agree.
    pub format: Option<Format>,
    /// How its parents are found.
    pub open: OpenDiskOptions,
    /// Leave the target alone, and make this new image a child of it that has the changes.
    pub child: Option<PathBuf>,
    /// The moment that the target is known to be at; none believes the note beside it, if any.
    pub target_id: Option<String>,
    /// Whether to hold the target against what the delta says of its base.
    pub check_base: bool,
    /// Go on even where other images read through the target, which breaks them.
    pub force: bool,
    /// Where a delta from a pipe is kept until all of it was checked; none takes the directory of the
    /// target.
    pub spool_directory: Option<PathBuf>,
    /// The number of workers; none suits the machine.
    pub workers: Option<usize>,
}

/// What was applied. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AppliedDelta {
    /// What has the changes now.
    pub target: String,
    /// Whether an application that was interrupted was brought to its end.
    pub resumed: bool,
    /// The delta and what was written.
    #[serde(flatten)]
    pub applied: ApplySummary,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
}

/// Applies a delta. `stream` is read where the job names no file.
///
/// # Errors
/// Before anything is written: damage in the delta, and [`EngineError::Refused`] where the target is
/// not its base. After that [`EngineError::Incomplete`], with a note beside an image; to apply the
/// same delta again makes it right. A child is not there after any error.
pub fn apply(
    job: &ApplyJob,
    stream: Option<Box<dyn Read + Send>>,
    context: JobContext<'_>,
) -> Result<AppliedDelta> {
    let begun = Instant::now();
    let (target, resumed, applied) = match (&job.child, stream) {
        (Some(child), stream) => {
            let applied = apply_to_child(job, child, stream, context)?;
            (child.display().to_string(), false, applied)
        }
        (None, Some(stream)) => {
            let spool = Spool::fill(job, stream, context)?;
            apply_in_place(job, &spool.path, context)?
        }
        (None, None) => apply_in_place(job, delta_path(job)?, context)?,
    };
    let duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(AppliedDelta { target, resumed, applied, duration_ms })
}

fn delta_path(job: &ApplyJob) -> Result<&Path> {
    job.delta.as_deref().ok_or_else(|| EngineError::usage("no delta: name a file, or - for a pipe"))
}

fn open_delta(path: &Path) -> Result<DeltaFile> {
    Ok(DeltaFile::open(Arc::new(RawDevice::open(path, OpenMode::ReadOnly)?))?)
}

fn options_of(job: &ApplyJob) -> ApplyOptions {
    let default = ApplyOptions::default();
    ApplyOptions {
        workers: job.workers.unwrap_or(default.workers),
        check_base: job.check_base,
        target_id: job.target_id.clone(),
        resuming: false,
    }
}

fn apply_in_place(
    job: &ApplyJob,
    delta: &Path,
    context: JobContext<'_>,
) -> Result<(String, bool, ApplySummary)> {
    let delta = open_delta(delta)?;
    match &job.target {
        DiskSpec::Path(path) if path.is_file() => apply_to_image(job, &delta, path, context),
        DiskSpec::Path(path) => {
            let device = RawDevice::open(path, OpenMode::ReadWrite)?;
            apply_to_device(job, &delta, &device, context)
        }
        DiskSpec::Nbd(url) => {
            let device = NbdPeer::connect(url, &NbdOptions::default())?;
            apply_to_device(job, &delta, &device, context)
        }
    }
}

/// To what has no place for a note. Only the error says that it is incomplete.
fn apply_to_device(
    job: &ApplyJob,
    delta: &DeltaFile,
    device: &dyn WritableBlockDevice,
    context: JobContext<'_>,
) -> Result<(String, bool, ApplySummary)> {
    let options = options_of(job);
    let plan = prepare(delta, device, &options, context)?;
    let name = device.name();
    context.phase(Phase::Apply, &name);
    let applied = plan.write(device, context.progress, context.cancel);
    Ok((name.clone(), false, applied.map_err(|error| incomplete(&name, error.into()))?))
}

fn apply_to_image(
    job: &ApplyJob,
    delta: &DeltaFile,
    path: &Path,
    context: JobContext<'_>,
) -> Result<(String, bool, ApplySummary)> {
    check_not_in_use(path, Use::Write)?;
    for file in files_of(path) {
        check_not_in_use(&file, Use::Write)?;
    }
    if !job.force {
        check_no_children(path, &job.open.search, "apply a delta to")?;
    }
    let format = job.format.map_or_else(|| format_of_existing(path, "apply"), Ok)?;
    let open = OpenOptions {
        format: Some(format),
        // Its format is certain, or it would not be written to.
        backing: job.open.backing.unwrap_or(BackingPolicy::SameDirectory),
        backing_format: job.open.backing_format,
        search: job.open.search.clone(),
        any_parent: job.open.any_parent,
        ..OpenOptions::default()
    };
    let _lock = ImageLock::take(path)?;
    let mut options = options_of(job);
    let digest = delta.summary().digest;
    options.resuming = look_at_note(path, delta, &digest, &mut options)?;
    // Only for reading: some formats write to an image that is merely opened for writing.
    let before = open_read_only(path, &open)?;
    let plan = prepare(delta, before.as_ref(), &options, context)?;
    drop(before);
    let name = path.display().to_string();
    context.phase(Phase::Apply, &name);
    Note::Incomplete { delta: digest, size_bytes: delta.header().size_bytes }.write(path)?;
    let image = match open_to_write(&plan, path, &open) {
        Ok(image) => image,
        Err(error) => {
            // Nothing is changed yet, unless that was so before.
            if !options.resuming {
                remove_note(path)?;
            }
            return Err(error);
        }
    };
    let applied = plan
        .write(image.as_ref(), context.progress, context.cancel)
        .and_then(|applied| image.finish().map(|()| applied).map_err(Into::into))
        .map_err(|error| incomplete(&name, error.into()))?;
    drop(image);
    end_note(path, &delta.header().new_id)?;
    Ok((name, options.resuming, applied))
}

/// Whether this delta is being applied already; otherwise takes the moment that the image is known to
/// be at.
fn look_at_note(
    path: &Path,
    delta: &DeltaFile,
    digest: &str,
    options: &mut ApplyOptions,
) -> Result<bool> {
    match Note::read(path)? {
        Some(Note::Incomplete { delta: begun, .. }) if begun == digest => Ok(true),
        Some(Note::Incomplete { delta: begun, .. }) => Err(EngineError::refused(
            format!("apply {} to {}", delta.name(), path.display()),
            format!(
                "it is incomplete: another delta was being applied to it, whose digest is {begun}; \
                 apply that first"
            ),
        )),
        Some(Note::Complete { id, .. }) => {
            // A delta without an id cannot be held against one.
            if options.target_id.is_none() && !delta.header().base_id.is_empty() {
                options.target_id = Some(id);
            }
            Ok(false)
        }
        None => Ok(false),
    }
}

/// Opens the image, and gives it the size that it shall have: what it cannot is found here.
fn open_to_write(
    plan: &ApplyPlan<'_>,
    path: &Path,
    open: &OpenOptions,
) -> Result<Arc<dyn ImageWriter>> {
    let image = open_writable(path, open)?;
    plan.fit_size(image.as_ref())?;
    Ok(image)
}

fn remove_note(path: &Path) -> Result<()> {
    let note = path_of(path);
    std::fs::remove_file(&note)
        .map_err(|error| EngineError::io(format!("remove {}", note.display()), error))
}

/// Says where the image is now, or nothing where the moment has no name.
fn end_note(path: &Path, id: &str) -> Result<()> {
    if id.is_empty() {
        return remove_note(path);
    }
    Note::Complete { id: id.to_owned(), file: FileState::of(path)? }.write(path)
}

fn prepare<'a>(
    delta: &'a DeltaFile,
    target: &dyn BlockDevice,
    options: &'a ApplyOptions,
    context: JobContext<'_>,
) -> Result<ApplyPlan<'a>> {
    let (progress, cancel) = (context.progress, context.cancel);
    context.phase(Phase::Check, delta.name());
    let plan = ApplyPlan::prepare(delta, target, options, progress, cancel)?;
    let header = delta.header();
    if let Some(expected) =
        header.base_fingerprint.filter(|_| options.check_base && !options.resuming)
    {
        progress.add_total(header.base_size_bytes);
        if fingerprint(target, header.base_size_bytes, progress, cancel)? != expected {
            return Err(DeltaError::WrongBase {
                delta: delta.name().to_owned(),
                target: target.name(),
                detail: "its content is not that of the delta's base".into(),
            }
            .into());
        }
    }
    Ok(plan)
}

fn incomplete(target: &str, error: EngineError) -> EngineError {
    EngineError::Incomplete { target: target.to_owned(), source: Box::new(error) }
}

/// Makes a child of the target with the changes. It has its name only when all is in it, so a stream is
/// applied as it comes.
fn apply_to_child(
    job: &ApplyJob,
    child: &Path,
    stream: Option<Box<dyn Read + Send>>,
    context: JobContext<'_>,
) -> Result<ApplySummary> {
    let DiskSpec::Path(parent) = &job.target else {
        return Err(EngineError::usage("the parent of a new image is an image, not an export"));
    };
    let mut open_parent = job.open.clone();
    open_parent.format = job.format;
    let mut options = options_of(job);
    if options.target_id.is_none()
        && let Some(Note::Complete { id, .. }) = Note::read(parent)?
    {
        options.target_id = Some(id);
    }
    let create = CreateJob {
        path: child.to_path_buf(),
        size_bytes: None,
        kind: ImageKind { format: None, ..ImageKind::default() },
        parent: Some(parent.clone()),
        open_parent,
        overwrite: false,
        force: false,
    };
    let (progress, cancel) = (context.progress, context.cancel);
    let (staged, applied) = match stream {
        Some(stream) => {
            let mut reader = DeltaReader::new(stream, "the piped delta")?;
            if reader.header().base_id.is_empty() {
                options.target_id.clone_from(&job.target_id);
            }
            let (staged, _) = stage(&create)?;
            context.phase(Phase::Apply, child.display().to_string());
            let applied =
                apply_stream(&mut reader, staged.image.as_ref(), &options, progress, cancel)?;
            (staged, applied)
        }
        None => {
            let delta = open_delta(delta_path(job)?)?;
            if delta.header().base_id.is_empty() {
                options.target_id.clone_from(&job.target_id);
            }
            let (staged, _) = stage(&create)?;
            let plan = prepare(&delta, staged.image.as_ref(), &options, context)?;
            context.phase(Phase::Apply, child.display().to_string());
            let applied = plan.write(staged.image.as_ref(), progress, cancel)?;
            (staged, applied)
        }
    };
    staged.publish()?;
    let id = &applied.delta.header.new_id;
    if !id.is_empty() {
        Note::Complete { id: id.clone(), file: FileState::of(child)? }.write(child)?;
    }
    Ok(applied)
}

/// A delta from a pipe, in a file of its own until it is dropped.
struct Spool {
    path: PathBuf,
}

impl Spool {
    fn fill(
        job: &ApplyJob,
        mut stream: Box<dyn Read + Send>,
        context: JobContext<'_>,
    ) -> Result<Self> {
        let name = match (&job.spool_directory, &job.target) {
            (Some(directory), _) => directory.join("delta"),
            (None, DiskSpec::Path(path)) if path.is_file() => path.clone(),
            _ => std::env::temp_dir().join("delta"),
        };
        let spool = Self { path: staged::temporary_beside(&name)? };
        let failed = |error| {
            EngineError::io(format!("keep the piped delta in {}", spool.path.display()), error)
        };
        let mut file = new_file(&spool.path).map_err(failed)?;
        context.phase(Phase::Check, "the piped delta");
        let mut buffer = vec![0; 1 << 20];
        loop {
            context.cancel.check()?;
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(spool),
                Ok(count) => {
                    std::io::Write::write_all(&mut file, &buffer[..count]).map_err(failed)?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(EngineError::io("read the piped delta", error)),
            }
        }
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        // What cannot be removed has `vmtide-partial` in its name.
        let _ = std::fs::remove_file(&self.path);
    }
}
