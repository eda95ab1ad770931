//! Checking an image's structure, and repairing it.

use super::open::{OpenDiskOptions, image_options};
use crate::Result;
use crate::in_use::{Use, check_not_in_use};
use crate::lock::ImageLock;
use serde::Serialize;
use std::path::{Path, PathBuf};
use vmtide_image::{CheckReport, Format, Repair, check_image};

/// What a check found. The serialised form is the summary event of `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// What is there now: after the repair, where there was one.
    #[serde(flatten)]
    pub report: CheckReport,
    /// What the repair found and did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repair: Option<CheckReport>,
}

/// Checks the image at `path` alone, its parents not; after a repair it is checked again.
///
/// # Errors
/// Where so much is damaged that nothing can be said, or it cannot be read or written;
/// [`crate::EngineError::Refused`] where a running QEMU has it open or its format is in doubt.
pub fn check(path: &Path, options: &OpenDiskOptions, repair: Repair) -> Result<Checked> {
    check_not_in_use(path, if repair == Repair::Nothing { Use::Read } else { Use::Write })?;
    let (open, format) = image_options(path, options)?;
    let repaired = match repair {
        Repair::Nothing => None,
        repair => {
            let _lock = ImageLock::take(path)?;
            Some(check_image(path, &open, repair)?)
        }
    };
    let report = check_image(path, &open, Repair::Nothing)?;
    Ok(Checked { path: path.to_path_buf(), format, report, repair: repaired })
}
