//! Chains of images: what they consist of, another parent for an image, and merging an image into
//! its parent.

use super::files::{check_no_children, extents_of};
use super::open::{OpenDiskOptions, image_options};
use crate::events::{JobContext, Phase};
use crate::in_use::{Use, check_not_in_use};
use crate::lock::ImageLock;
use crate::{EngineError, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};
use vmtide_image::{
    ChainLayer, CommitOptions, CommitSummary, Format, NewParent, ParentState, RebaseOptions,
    RebaseSummary, commit_image, list_chain, rebase_image,
};

/// The chain of the image at `path`, the image first, as far as it can be followed.
///
/// # Errors
/// As [`list_chain`]; [`EngineError::Refused`] where the image's format is in doubt.
pub fn list(path: &Path, options: &OpenDiskOptions) -> Result<Vec<ChainLayer>> {
    let (open, _) = image_options(path, options)?;
    Ok(list_chain(path, &open)?)
}

/// What is wrong with the end of a chain, where it is not its base: a parent that is missing or is
/// another one. One line.
pub fn broken_end(layers: &[ChainLayer]) -> Option<String> {
    let last = layers.last()?;
    let parent = last.parent.as_ref()?;
    let child = last.path.display();
    let name = &parent.name;
    Some(match parent.state {
        ParentState::Ok => return None,
        ParentState::Missing => {
            format!("{child}: its parent {name:?} was not found; give its directory (--search DIR)")
        }
        ParentState::Mismatch => format!(
            "{child}: its parent must be {}, but {} is {}: it was changed or replaced",
            parent.expected.join(" or "),
            parent.path.as_ref().map_or_else(|| name.clone(), |path| path.display().to_string()),
            parent.found.as_deref().unwrap_or("another one"),
        ),
        ParentState::NotLookedFor => format!(
            "{child}: its parent {name:?} was not looked for; allow it (--backing same-directory)"
        ),
    })
}

/// Giving an image another parent.
#[derive(Clone, Debug)]
pub struct RebaseJob {
    /// The image.
    pub path: PathBuf,
    /// How its chain is opened.
    pub open: OpenDiskOptions,
    /// The new parent; none makes the image complete by itself.
    pub parent: Option<PathBuf>,
    /// The new parent's format; none finds it by content.
    pub parent_format: Option<Format>,
    /// How the image shall name the parent; none is the path from its own directory.
    pub stored_name: Option<String>,
    /// Only change the name: the parent is the same one, moved.
    pub relink_only: bool,
    /// Rebase even where other images read through this one.
    pub force: bool,
}

/// What a rebase did. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rebased {
    /// The image.
    pub path: PathBuf,
    /// Its parent now.
    pub parent: Option<PathBuf>,
    /// What was copied.
    #[serde(flatten)]
    pub summary: RebaseSummary,
}

/// Gives an image another parent; unless only the name changes, it reads the same after and at every
/// moment before.
///
/// # Errors
/// As [`rebase_image`]; [`EngineError::Refused`] where a running QEMU has it open.
pub fn rebase(job: &RebaseJob, context: JobContext<'_>) -> Result<Rebased> {
    check_not_in_use(&job.path, Use::Write)?;
    let _lock = ImageLock::take(&job.path)?;
    let (open, format) = image_options(&job.path, &job.open)?;
    if format == Format::Raw {
        return Err(EngineError::usage(format!("{} is raw: it has no parent", job.path.display())));
    }
    let parent = match &job.parent {
        Some(path) => {
            let given = OpenDiskOptions { format: job.parent_format, ..OpenDiskOptions::default() };
            let (_, format) = image_options(path, &given)?;
            let stored_name = job.stored_name.clone();
            Some(NewParent { path: path.clone(), format: Some(format), stored_name })
        }
        None => None,
    };
    context.phase(Phase::Merge, job.path.display().to_string());
    let options = RebaseOptions { open, parent, relink_only: job.relink_only, force: job.force };
    let summary = rebase_image(&job.path, &options, context.progress, context.cancel)?;
    Ok(Rebased { path: job.path.clone(), parent: job.parent.clone(), summary })
}

/// What a merge did. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Committed {
    /// The image.
    pub path: PathBuf,
    /// Whether it was deleted after.
    pub deleted: bool,
    /// What was written to its parent.
    #[serde(flatten)]
    pub summary: CommitSummary,
}

/// Merges the image at `path` into its parent, and deletes it then if told to.
///
/// # Errors
/// As [`commit_image`]; [`EngineError::Refused`] where a running QEMU has one of both open, or the
/// image is to be deleted and others read through it.
pub fn commit(
    path: &Path,
    options: &OpenDiskOptions,
    force: bool,
    delete: bool,
    context: JobContext<'_>,
) -> Result<Committed> {
    check_not_in_use(path, Use::Write)?;
    let mut locks = vec![ImageLock::take(path)?];
    let (open, _) = image_options(path, options)?;
    for layer in list_chain(path, &open)?.iter().skip(1).take(1) {
        check_not_in_use(&layer.path, Use::Write)?;
        locks.push(ImageLock::take(&layer.path)?);
    }
    if delete && !force {
        check_no_children(path, &open.search, "delete")?;
    }
    context.phase(Phase::Merge, path.display().to_string());
    let options = CommitOptions { open, force };
    let summary = commit_image(path, &options, context.progress, context.cancel)?;
    if delete {
        delete_image(path)?;
    }
    drop(locks);
    Ok(Committed { path: path.to_path_buf(), deleted: delete, summary })
}

/// Deletes an image with the extents beside it. The file that names them goes first: what is left by
/// an interruption is then no image.
fn delete_image(path: &Path) -> Result<()> {
    let extents = extents_of(path);
    let delete = |path: &Path| {
        std::fs::remove_file(path)
            .map_err(|error| EngineError::io(format!("delete {}", path.display()), error))
    };
    delete(path)?;
    for extent in extents {
        // One elsewhere, or a device, was not made for this image alone.
        let is_plain = extent.symlink_metadata().is_ok_and(|metadata| metadata.is_file());
        if extent.parent() == path.parent() && extent != path && is_plain {
            delete(&extent)?;
        }
    }
    Ok(())
}
