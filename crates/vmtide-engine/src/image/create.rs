//! Creating an empty image, or a child of another one.

use super::DiskSpec;
use super::files::check_no_children;
use super::open::{OpenDiskOptions, image_options, open_disk};
use super::staged::StagedImage;
use crate::in_use::{Use, check_not_in_use};
use crate::target::ImageKind;
use crate::{EngineError, Result};
use serde::Serialize;
use std::path::{Component, Path, PathBuf};
use vmtide_block::{OpenMode, RawDevice};
use vmtide_image::{CreateParent, Format, format_by_name, identity};

/// What to create.
#[derive(Clone, Debug)]
pub struct CreateJob {
    /// Where.
    pub path: PathBuf,
    /// The size of the disk in bytes; none takes the parent's.
    pub size_bytes: Option<u64>,
    /// What it is like; without a format the extension decides.
    pub kind: ImageKind,
    /// The image it shall be a child of.
    pub parent: Option<PathBuf>,
    /// How to open the parent.
    pub open_parent: OpenDiskOptions,
    /// Replace an existing file.
    pub overwrite: bool,
    /// Replace an image even where other images read through it, which breaks them.
    pub force: bool,
}

/// What was created. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CreateSummary {
    /// Where.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The kind within the format, where one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subformat: Option<String>,
    /// The size of its disk in bytes.
    pub size_bytes: u64,
    /// How it names its parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
}

/// Creates the image.
///
/// # Errors
/// [`EngineError::Usage`] without a size or a format; [`EngineError::Refused`] where the file exists;
/// what opening the parent and creating say. Nothing is left then.
pub fn create(job: &CreateJob) -> Result<CreateSummary> {
    let (staged, summary) = stage(job)?;
    staged.publish()?;
    Ok(summary)
}

/// Creates the image without its name.
///
/// # Errors
/// As [`create`].
pub(crate) fn stage(job: &CreateJob) -> Result<(StagedImage, CreateSummary)> {
    let format = job.kind.format.or_else(|| format_by_name(&job.path)).ok_or_else(|| {
        EngineError::usage(format!(
            "the name of {} does not say its format: end it in .vhdx, .vhd, .vmdk, .qcow2, .raw or \
             .img, or give --format",
            job.path.display()
        ))
    })?;
    if job.path.exists() {
        if !job.overwrite || !job.path.is_file() {
            return Err(EngineError::refused(
                format!("{} already exists", job.path.display()),
                "add --overwrite to replace a file",
            ));
        }
        check_not_in_use(&job.path, Use::Write)?;
        if !job.force {
            check_no_children(&job.path, &job.open_parent.search, "replace")?;
        }
    }
    let parent =
        job.parent.as_deref().map(|parent| open_parent(job, format, parent)).transpose()?;
    let parents_size = parent.as_ref().map(|parent| parent.device.size_bytes());
    let size_bytes = job.size_bytes.or(parents_size).ok_or_else(|| {
        EngineError::usage("no size: give SIZE, e.g. 10G or 512MiB, or a parent to take it from")
    })?;
    let mut options = job.kind.create_options(format, size_bytes);
    let named = parent.as_ref().map(|parent| parent.name.clone());
    options.parent = parent;
    let size_bytes = options.size_bytes;
    let staged = StagedImage::create(&job.path, &options, job.overwrite)?;
    let summary = CreateSummary {
        path: job.path.clone(),
        format,
        subformat: job.kind.subformat.clone(),
        size_bytes,
        parent: named,
    };
    Ok((staged, summary))
}

fn open_parent(job: &CreateJob, format: Format, path: &Path) -> Result<CreateParent> {
    if format == Format::Raw {
        return Err(EngineError::usage(
            "a raw image cannot have a parent: choose another --format",
        ));
    }
    let (_, parents_format) = image_options(path, &job.open_parent)?;
    if format != Format::Qcow2 && parents_format != format {
        return Err(EngineError::usage(format!(
            "the parent {} is a {parents_format} image, and a {format} image can only be a child of \
             its own kind (qcow2 takes any)",
            path.display()
        )));
    }
    let disk = open_disk(&DiskSpec::Path(path.to_path_buf()), &job.open_parent)?;
    let file = RawDevice::open(path, OpenMode::ReadOnly)?;
    let real = |path: &Path| {
        vmtide_block::files::canonical(path)
            .map_err(|error| EngineError::io(format!("open {}", path.display()), error))
    };
    let absolute = real(path)?;
    if job.path.exists() && real(&job.path)? == absolute {
        return Err(EngineError::usage("an image cannot be its own parent"));
    }
    let directory = match job.path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => real(parent)?,
        _ => real(Path::new("."))?,
    };
    Ok(CreateParent {
        // With slashes, which every system reads.
        name: relative(&absolute, &directory)
            .display()
            .to_string()
            .replace(std::path::MAIN_SEPARATOR, "/"),
        absolute_path: Some(absolute.display().to_string()),
        format: parents_format,
        identity: identity(&file, parents_format)?,
        device: disk.device,
    })
}

/// The way from `directory` to `file`, both absolute and real.
pub(crate) fn relative(file: &Path, directory: &Path) -> PathBuf {
    let (file_parts, directory_parts): (Vec<_>, Vec<_>) =
        (file.components().collect(), directory.components().collect());
    let common = file_parts.iter().zip(&directory_parts).take_while(|(a, b)| a == b).count();
    let up = directory_parts.len() - common;
    let down = file_parts.iter().skip(common);
    std::iter::repeat_n(&Component::ParentDir, up).chain(down).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_named_from_the_childs_directory() {
        let way = |file: &str, directory: &str| relative(Path::new(file), Path::new(directory));
        assert_eq!(way("/vm/base.vhdx", "/vm"), Path::new("base.vhdx"));
        assert_eq!(way("/vm/base/b.vhdx", "/vm/children/x"), Path::new("../../base/b.vhdx"));
        assert_eq!(way("/vm/base/b.vhdx", "/vm"), Path::new("base/b.vhdx"));
    }
}
