//! Giving a disk image another size.

use super::{DiskSpec, OpenDiskOptions, WritableDisk};
use crate::{EngineError, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};
use vmtide_image::Format;

/// What was done. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Resized {
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The size that the disk had, in bytes.
    pub old_size_bytes: u64,
    /// The size that it has now, in bytes.
    pub size_bytes: u64,
}

/// What is allowed that destroys something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResizeConsent {
    /// The disk may become smaller: what is behind its new end is lost.
    pub shrink: bool,
    /// Other images that read through this one may break.
    pub force: bool,
}

/// Gives the disk in the image at `path` the size `size_bytes`; new bytes read as zeros. What is on the disk (partitions,
/// file systems) is not looked at.
///
/// # Errors
/// [`EngineError::Refused`] where it would become smaller without consent, somebody else uses it, or other images would
/// break; [`vmtide_block::BlockError::Unsupported`] where the format cannot have this size or images of its kind do not
/// change their size.
pub fn resize(
    path: &Path,
    size_bytes: u64,
    options: &OpenDiskOptions,
    consent: ResizeConsent,
) -> Result<Resized> {
    let (_, format) = super::open::image_options(path, options)?;
    let spec = DiskSpec::Path(path.to_path_buf());
    let disk = WritableDisk::open(&spec, options, consent.force)?;
    let old_size_bytes = disk.image.size_bytes();
    if size_bytes < old_size_bytes && !consent.shrink {
        return Err(EngineError::refused(
            format!("resize {}", path.display()),
            format!(
                "its disk has {old_size_bytes} bytes, and what is behind byte {size_bytes} would be lost: shrink what \
                 is on it first, then add --shrink"
            ),
        ));
    }
    if size_bytes != old_size_bytes {
        disk.image.resize(size_bytes)?;
    }
    disk.image.finish()?;
    let size_bytes = disk.image.size_bytes();
    Ok(Resized { path: path.to_path_buf(), format, old_size_bytes, size_bytes })
}
