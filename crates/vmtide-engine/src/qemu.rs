//! VMs of QEMU as sources, on the systems where vmtide can talk to QEMU: its monitor, its exports and the
//! guest agent are reached over Unix sockets, and its tools share locks with it that only Unix has.

use crate::source::{OpenSource, SourceOptions};
use crate::{EngineError, Result};
use std::path::Path;
use vmtide_image::Format;

/// An image at rest whose changes are tracked in it.
pub(crate) struct TrackedImage<'a> {
    pub path: &'a Path,
    pub name: String,
    pub format: Format,
    /// The id of its only disk; none takes the default.
    pub disk: Option<String>,
    /// The source as it is recorded.
    pub display: String,
}

#[cfg(unix)]
mod here {
    use super::*;
    use vmtide_hypervisor::DiskId;
    use vmtide_qemu::{OfflineImage, QemuTarget, QemuVm};

    /// Succeeds for the URL of a monitor.
    ///
    /// # Errors
    /// [`EngineError::Usage`] with what is wrong with it.
    pub(crate) fn check_url(url: &str) -> Result<()> {
        // The state directory does not matter here.
        QemuTarget::parse_url(url, "")
            .map(drop)
            .map_err(|error| EngineError::usage(error.to_string()))
    }

    /// Opens a running VM by its monitor.
    ///
    /// # Errors
    /// Those of the URL and of connecting.
    pub(crate) fn open(url: &str, options: &SourceOptions) -> Result<OpenSource> {
        let mut target = QemuTarget::parse_url(url, &options.state_directory)?;
        target.guardian.clone_from(&options.guardian);
        if options.name.is_some() {
            target.name.clone_from(&options.name);
        }
        Ok(OpenSource {
            hypervisor: Box::new(QemuVm::new(target)),
            vm: options.name.clone().unwrap_or_default(),
            name: options.name.clone(),
            display: url.to_owned(),
        })
    }

    /// Removes the bitmaps of a running VM; see [`untrack`](crate::source::untrack).
    ///
    /// # Errors
    /// What QEMU says.
    pub(crate) fn untrack(
        url: &str,
        state_directory: &Path,
        lineage: Option<&str>,
    ) -> Result<Vec<String>> {
        let target = QemuTarget::parse_url(url, state_directory)?;
        Ok(QemuVm::new(target).end_tracking(lineage)?)
    }

    /// Why changes cannot be tracked in an image at rest; none where they can.
    pub(crate) fn cannot_track() -> Option<&'static str> {
        let has_tools = ["qemu-img", "qemu-nbd"].into_iter().all(is_in_path);
        (!has_tools).then_some("qemu-img and qemu-nbd are needed: install qemu-utils")
    }

    fn is_in_path(program: &str) -> bool {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
    }

    /// Opens an image whose changes are tracked in it.
    ///
    /// # Errors
    /// None today; opening it is left to the job.
    pub(crate) fn open_tracked(
        image: TrackedImage<'_>,
        options: &SourceOptions,
    ) -> Result<OpenSource> {
        let TrackedImage { path, name, format, disk, display } = image;
        let mut offline = OfflineImage::new(path, &options.state_directory)
            .with_name(name.clone())
            .with_format(format.name());
        if let Some(disk) = disk {
            offline = offline.with_disk_id(DiskId(disk));
        }
        Ok(OpenSource {
            hypervisor: Box::new(offline),
            vm: name.clone(),
            name: Some(name),
            display,
        })
    }
}

#[cfg(not(unix))]
mod here {
    use super::*;

    const NO_TRACKING: &str = "tracking changes in a qcow2 image uses QEMU's tools over Unix sockets, \
                               which is not on Windows; back it up without --track, or on Linux";

    fn not_here(url: &str) -> EngineError {
        EngineError::usage(format!(
            "{url}: running VMs of QEMU are reached over Unix sockets, which is not on Windows; run \
             vmtide on the Linux host, or back up an NBD export or a disk image"
        ))
    }

    /// Refuses.
    ///
    /// # Errors
    /// [`EngineError::Usage`].
    pub(crate) fn check_url(url: &str) -> Result<()> {
        Err(not_here(url))
    }

    /// Refuses.
    ///
    /// # Errors
    /// [`EngineError::Usage`].
    pub(crate) fn open(url: &str, _options: &SourceOptions) -> Result<OpenSource> {
        Err(not_here(url))
    }

    /// Refuses.
    ///
    /// # Errors
    /// [`EngineError::Usage`].
    pub(crate) fn untrack(
        url: &str,
        _state_directory: &Path,
        _lineage: Option<&str>,
    ) -> Result<Vec<String>> {
        Err(not_here(url))
    }

    /// Why changes cannot be tracked in an image at rest.
    pub(crate) fn cannot_track() -> Option<&'static str> {
        Some(NO_TRACKING)
    }

    /// Refuses.
    ///
    /// # Errors
    /// [`EngineError::Refused`].
    pub(crate) fn open_tracked(
        image: TrackedImage<'_>,
        _options: &SourceOptions,
    ) -> Result<OpenSource> {
        let TrackedImage { path, name, format, disk, display: source } = image;
        tracing::debug!(%name, %format, ?disk, %source, "asked to track");
        Err(EngineError::refused(format!("track changes in {}", path.display()), NO_TRACKING))
    }
}

pub(crate) use here::{cannot_track, check_url, open, open_tracked, untrack};
