//! What an image says of itself, and what lies beside it.

use super::open::OpenDiskOptions;
use crate::Result;
use serde::Serialize;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use vmtide_image::{Format, ImageInfo, image_info};

/// The extensions of the files in which Hyper-V keeps its resilient change tracking, beside a VHDX.
const TRACKING_EXTENSIONS: [&str; 2] = ["rct", "mrt"];

/// What is known of one image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageReport {
    /// Where it is.
    pub path: PathBuf,
    /// What it says of itself.
    #[serde(flatten)]
    pub info: ImageInfo,
    /// The bytes it takes on the medium, holes not counted, its extent files not either; none where
    /// the system does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_usage_bytes: Option<u64>,
    /// The files of Hyper-V's change tracking that lie beside it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tracking_files: Vec<PathBuf>,
}

/// What the image at `path` says of itself. Opens no other file, so it works without its parents and
/// on any image.
///
/// # Errors
/// As [`image_info`]; [`crate::EngineError::Refused`] where its format is in doubt.
pub fn report(path: &Path, format: Option<Format>) -> Result<ImageReport> {
    let format = match format {
        Some(format) => format,
        None => super::open::probe_format(path)?,
    };
    let info = image_info(path, Some(format))?;
    let tracking_files = match format {
        Format::Vhdx => tracking_files(path),
        _ => Vec::new(),
    };
    Ok(ImageReport {
        path: path.to_path_buf(),
        info,
        disk_usage_bytes: vmtide_block::files::allocated_bytes(path),
        tracking_files,
    })
}

/// The image at `path` and its parents, the image first, as far as they are found; and what is wrong
/// with the last one's parent, where the chain is not complete.
///
/// # Errors
/// As [`report`] of every image found.
pub fn report_chain(
    path: &Path,
    options: &OpenDiskOptions,
) -> Result<(Vec<ImageReport>, Option<String>)> {
    let layers = super::chain::list(path, options)?;
    let reports = layers
        .iter()
        .map(|layer| report(&layer.path, Some(layer.format)))
        .collect::<Result<_>>()?;
    Ok((reports, super::chain::broken_end(&layers)))
}

fn tracking_files(path: &Path) -> Vec<PathBuf> {
    let beside = |extension: &&str| {
        let mut name = OsString::from(path);
        name.push(".");
        name.push(extension);
        PathBuf::from(name)
    };
    TRACKING_EXTENSIONS.iter().map(beside).filter(|path| path.is_file()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tracking_files_are_those_beside_the_image() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.vhdx");
        assert!(tracking_files(&path).is_empty());
        std::fs::write(directory.path().join("web.vhdx.rct"), "x").unwrap();
        std::fs::write(directory.path().join("web.rct"), "x").unwrap();
        assert_eq!(tracking_files(&path), [directory.path().join("web.vhdx.rct")]);
    }
}
