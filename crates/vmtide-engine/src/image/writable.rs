//! Opening an image or block device to be written by whoever is no job of its own.

use super::DiskSpec;
use super::files::check_no_children;
use super::open::{OpenDiskOptions, hint, image_options};
use crate::in_use::{Use, check_not_in_use};
use crate::lock::ImageLock;
use crate::{EngineError, Result};
use std::sync::Arc;
use vmtide_image::{ImageWriter, open_writable};

/// An image that is open for writing, and that nobody else may write meanwhile.
pub struct WritableDisk {
    /// The image. Whoever is done with it calls [`ImageWriter::finish`].
    pub image: Arc<dyn ImageWriter>,
    _lock: ImageLock,
}

impl WritableDisk {
    /// Opens a disk for writing; with `force` even where other images read through it, which breaks
    /// them.
    ///
    /// # Errors
    /// As opening it; [`EngineError::Usage`] for what cannot be written; [`EngineError::Refused`] where
    /// somebody else uses it, other images would break, or a delta was only half applied to it.
    pub fn open(spec: &DiskSpec, options: &OpenDiskOptions, force: bool) -> Result<Self> {
        let path = match spec {
            DiskSpec::Path(path) if options.snapshot.is_none() => path,
            _ => {
                return Err(EngineError::usage(format!(
                    "{} cannot be opened for writing: only images and block devices can",
                    spec.display()
                )));
            }
        };
        check_not_in_use(path, Use::Write)?;
        crate::delta::check_complete(path)?;
        if !force {
            check_no_children(path, &options.search, "write to")?;
        }
        let lock = ImageLock::take(path)?;
        let (open, format) = image_options(path, options)?;
        let image =
            open_writable(path, &open).map_err(|error| hint(error, path, options, format))?;
        Ok(Self { image, _lock: lock })
    }
}
