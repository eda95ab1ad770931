//! Converting a disk: any image, block device or NBD export into any other.
//!
//! The source is read as one virtual disk, whatever chain of files it consists of. A new image is
//! written sparsely in a hidden directory beside its name and gets the name when all of it is there;
//! devices, exports and existing images are written only when the user says how.

use crate::events::{JobContext, Phase};
use crate::image::files::files_of;
use crate::image::open::{image_options, open_disk};
use crate::image::{DiskSpec, OpenDisk, OpenDiskOptions};
use crate::target::{Durability, ImageKind, SourceHints, TargetRules, WritePlan};
use crate::{EngineError, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;
use vmtide_image::{Format, list_chain};

/// A conversion.
#[derive(Clone, Debug)]
pub struct ConvertJob {
    /// What to read.
    pub source: DiskSpec,
    /// How to open it; where the parents of a target that is changed in place are, too.
    pub open: OpenDiskOptions,
    /// Where to write.
    pub target: DiskSpec,
    /// What a new image is like; without a format the target's extension decides.
    pub kind: ImageKind,
    /// Replace an existing file; overwrite a device or export that holds data.
    pub overwrite: bool,
    /// Change an existing image, device or export where it differs, and nowhere else.
    pub in_place: bool,
    /// Change or replace an image even where other images read through it, which breaks them.
    pub force: bool,
    /// Whether a new image is on the medium when the conversion ends.
    pub durability: Durability,
    /// The number of workers; none suits the machine.
    pub workers: Option<usize>,
}

/// What a conversion did. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConvertSummary {
    /// What was read.
    pub source: String,
    /// Its format.
    pub source_format: String,
    /// The size of its disk in bytes.
    pub source_size_bytes: u64,
    /// What was written.
    pub target: String,
    /// Its format.
    pub format: String,
    /// The kind within the format, where one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subformat: Option<String>,
    /// The size of its disk in bytes: the source's, rounded up to whole sectors unless raw.
    pub size_bytes: u64,
    /// The bytes of data read.
    pub read_bytes: u64,
    /// The bytes of data written, before compression.
    pub written_bytes: u64,
    /// The bytes of the target made zero explicitly.
    pub zeroed_bytes: u64,
    /// Whether the target is on the medium: a power failure cannot take it back.
    pub durable: bool,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
}

/// Converts.
///
/// # Errors
/// A new image is then not there; a target that was overwritten is incomplete, and the error is
/// [`EngineError::Incomplete`].
pub fn convert(job: &ConvertJob, context: JobContext<'_>) -> Result<ConvertSummary> {
    let begun = Instant::now();
    let rules = TargetRules {
        verb: "convert",
        replace_option: "--overwrite",
        in_place: job.in_place,
        replace: job.overwrite,
        force: job.force,
        kind: job.kind.clone(),
        durability: job.durability,
        open: job.open.clone(),
        default_format: None,
    };
    rules.check()?;
    let plan = match &job.target {
        DiskSpec::Path(path) => rules.plan_path(path.clone())?,
        DiskSpec::Nbd(url) => rules.plan_nbd(url)?,
    };
    let source = open_disk(&job.source, &job.open)?;
    check_not_the_source(job, &source, &plan)?;
    context.progress.add_total(source.device.size_bytes());
    context.phase(Phase::Convert, format!("{} to {}", source.name, plan.name()));
    let durable = plan.is_durable();
    let hints = SourceHints { unit_bytes: unit_bytes(&source)?, raw_file: raw_file(&source) };
    let copied = plan.write(source.device.as_ref(), job.workers, &hints, context)?;
    let source_size_bytes = source.device.size_bytes();
    Ok(ConvertSummary {
        source: source.name,
        source_format: source.format.to_string(),
        source_size_bytes,
        target: plan.name(),
        format: plan.format.to_string(),
        subformat: job.kind.subformat.clone(),
        size_bytes: job.kind.disk_size(plan.format, source_size_bytes),
        read_bytes: copied.read_bytes,
        written_bytes: copied.written_bytes,
        zeroed_bytes: copied.zeroed_bytes,
        durable,
        duration_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
    })
}

/// The most that a layer of the source decodes at once, in bytes; none where the source is no file.
fn unit_bytes(source: &OpenDisk) -> Result<Option<u64>> {
    let mut largest = None;
    for layer in &source.layers {
        let format = layer.image.format();
        let unit = match format {
            Format::Raw | Format::Vhdx | Format::Vhd => 0,
            Format::Qcow2 | Format::Vmdk => {
                vmtide_image::image_info(&layer.path, Some(format))?.block_size_bytes.unwrap_or(0)
            }
        };
        largest = largest.max(Some(unit));
    }
    Ok(largest)
}

/// The one file that the source is, where it is a raw disk.
fn raw_file(source: &OpenDisk) -> Option<PathBuf> {
    match &source.layers[..] {
        [only] if only.image.format() == Format::Raw => Some(only.path.clone()),
        _ => None,
    }
}

/// Refuses a target that the source is read from: replacing a parent would change every child of it,
/// and a disk cannot be written over itself. Extents and data files count as their images do.
fn check_not_the_source(job: &ConvertJob, source: &OpenDisk, plan: &WritePlan) -> Result<()> {
    let (Some(target), DiskSpec::Path(path)) = (plan.path(), &job.source) else {
        return Ok(());
    };
    let layers: Vec<PathBuf> = if job.open.snapshot.is_some() {
        let (open, _) = image_options(path, &job.open)?;
        list_chain(path, &open)?.into_iter().map(|layer| layer.path).collect()
    } else {
        source.layers.iter().map(|layer| layer.path.clone()).collect()
    };
    let read: Vec<PathBuf> = layers.iter().flat_map(|layer| real_files(layer)).collect();
    if real_files(target).iter().any(|file| read.contains(file)) {
        return Err(EngineError::refused(
            format!("convert to {}", plan.name()),
            format!("{} is read from it: give another target", source.name),
        ));
    }
    Ok(())
}

/// The files of one image that are there, each by its real path.
fn real_files(path: &Path) -> Vec<PathBuf> {
    let mut files = files_of(path);
    files.push(path.to_path_buf());
    files.iter().filter_map(|file| file.canonicalize().ok()).collect()
}
