//! The files that belong to an image, and the images that depend on it: what must be looked at before
//! an image is written, replaced or deleted.

use crate::{EngineError, Result};
use std::path::{Path, PathBuf};
use vmtide_image::{find_children, image_info};

/// The other files that the image at `path` says its data lies in: the extents of a VMDK, the data
/// file of a qcow2 image; empty where it cannot be read. The names are the image's, so they may mean
/// any file: good for comparing, not for opening.
pub(crate) fn files_of(path: &Path) -> Vec<PathBuf> {
    vmtide_image::companion_files(path)
}

/// The extents of the VMDK at `path`; empty where it is none.
pub(crate) fn extents_of(path: &Path) -> Vec<PathBuf> {
    let names = image_info(path, None).map_or_else(|_| Vec::new(), |info| info.extent_files);
    names.iter().map(|name| in_directory_of(path, name)).collect()
}

fn in_directory_of(path: &Path, name: &str) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).join(name)
}

/// Refuses to do `what` to the image at `path` while other images, in its directory or in `search`,
/// read through it: they would read a mixture then, or nothing.
///
/// # Errors
/// [`EngineError::Refused`]; where a directory cannot be read.
pub(crate) fn check_no_children(path: &Path, search: &[PathBuf], what: &str) -> Result<()> {
    let children = find_children(path, search)?;
    if children.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = children.iter().map(|child| child.display().to_string()).collect();
    Err(EngineError::refused(
        format!("{what} {}", path.display()),
        format!(
            "it is the parent of {}, which this would break: merge or rebase them first, or add \
             --force",
            names.join(", ")
        ),
    ))
}
