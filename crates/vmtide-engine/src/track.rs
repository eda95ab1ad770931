//! Disk images whose changes vmtide tracks itself: hosting one, and asking about one.
//!
//! The work is in `vmtide-track`; here are the rules by which a user's image is opened.

use crate::image::OpenDiskOptions;
use crate::image::files::check_no_children;
use crate::image::open::{hint, image_options};
use crate::in_use::{Use, check_not_in_use};
use crate::{EngineError, Result};
use std::path::Path;
use std::sync::Arc;
use vmtide_block::{ByteRange, RangeSet};
use vmtide_image::image_info;
pub use vmtide_track::{HostOptions, HostedImage, Options, TrackingState};
use vmtide_track::{MAX_RANGES_PER_PAGE, TrackError, TrackedImage};

impl From<TrackError> for EngineError {
    fn from(error: TrackError) -> Self {
        match error {
            TrackError::Block(error) => error.into(),
            TrackError::Io { context, source } => Self::Io { context, source },
            other => {
                let text = other.to_string();
                // All of them begin with the disk.
                match text.split_once(": ") {
                    Some((what, detail)) => Self::refused(what, detail),
                    None => Self::refused("change tracking", text),
                }
            }
        }
    }
}

/// Opens the image at `path` for writing, with its changes tracked. With `force` also where other images read
/// through it, which breaks them.
///
/// # Errors
/// [`EngineError::Refused`] where somebody else has it open, or other images would break; those of opening it.
pub fn host_image(
    path: &Path,
    open: &OpenDiskOptions,
    force: bool,
    options: &HostOptions,
) -> Result<Arc<HostedImage>> {
    check_not_in_use(path, Use::Write)?;
    crate::delta::check_complete(path)?;
    if !force {
        check_no_children(path, &open.search, "track")?;
    }
    let (image, format) = image_options(path, open)?;
    HostedImage::open(path, &image, options).map_err(|error| match error {
        TrackError::Block(error) => hint(error, path, open, format),
        other => other.into(),
    })
}

/// The state of tracking of the image at `path`, whoever has it open.
///
/// # Errors
/// Where the image, its files of tracking or the process that has it open cannot be asked.
pub fn tracking_state(path: &Path) -> Result<TrackingState> {
    Ok(TrackedImage::connect_or_open(path)?.state()?)
}

/// Seals this moment of the image at `path`; answers with its id.
///
/// # Errors
/// [`EngineError::Refused`] where it is not tracked, tracking was lost, or a program that does not track has it open.
pub fn seal_moment(path: &Path) -> Result<String> {
    Ok(TrackedImage::connect_or_open(path)?.checkpoint()?)
}

/// Switches tracking of the image at `path` on or off.
///
/// # Errors
/// [`EngineError::Refused`] where a program that does not track has it open.
pub fn set_tracking(path: &Path, enabled: bool) -> Result<()> {
    Ok(TrackedImage::connect_or_open(path)?.set_enabled(enabled)?)
}

/// All ranges of the image at `path` that were written since `id`.
///
/// # Errors
/// [`EngineError::Refused`] where the id is not known or tracking is off or was lost: the disk is to be read in
/// full then.
pub fn changed_ranges(path: &Path, id: &str) -> Result<RangeSet> {
    let image = TrackedImage::connect_or_open(path)?;
    let size_bytes = image_info(path, None)?.size_bytes;
    let mut changed = RangeSet::new();
    let mut at = 0;
    while at < size_bytes {
        let rest = ByteRange::from_bounds(at, size_bytes);
        let page = image.changes_since(id, rest, MAX_RANGES_PER_PAGE)?;
        for range in page.ranges {
            changed.insert(range);
        }
        at += page.processed_bytes;
    }
    Ok(changed)
}
