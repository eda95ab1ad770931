//! Keeping others off the images that vmtide writes to: [`vmtide_image::ImageLock`], with a job's error.

use crate::{EngineError, Result};
use std::path::Path;

/// An image that is written to by nobody else until this is dropped.
#[derive(Debug)]
pub(crate) struct ImageLock {
    _lock: vmtide_image::ImageLock,
}

impl ImageLock {
    /// Locks the image at `path` with the extents and the data file beside it.
    ///
    /// # Errors
    /// [`EngineError::Refused`] where somebody else uses one of them. What cannot be opened is left
    /// to whoever opens it for writing.
    pub fn take(path: &Path) -> Result<Self> {
        match vmtide_image::ImageLock::take(path) {
            Ok(lock) => {
                vmtide_track::before_untracked_write(path)?;
                Ok(Self { _lock: lock })
            }
            Err(error) if error.io_kind() == Some(std::io::ErrorKind::ResourceBusy) => {
                Err(EngineError::refused(
                    format!("write to {}", path.display()),
                    "a running QEMU or another vmtide uses it: end that first",
                ))
            }
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_one_writer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        std::fs::write(&path, [0; 512]).unwrap();
        let first = ImageLock::take(&path).unwrap();
        let error = ImageLock::take(&path).unwrap_err();
        assert!(matches!(error, EngineError::Refused { .. }), "{error:?}");
        drop(first);
        drop(ImageLock::take(&path).unwrap());
    }

    #[test]
    fn qemu_keeps_off_while_vmtide_writes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        std::fs::write(&path, [0; 512]).unwrap();
        let writes = || {
            let output = std::process::Command::new("qemu-io")
                .args(["-f", "raw", "-c", "write 0 512"])
                .arg(&path)
                .output()
                .expect("qemu-io is needed: install qemu-utils (scripts/test.sh does)");
            (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
        };
        let held = ImageLock::take(&path).unwrap();
        let (done, error) = writes();
        assert!(!done && error.contains("lock"), "{error}");
        drop(held);
        assert!(writes().0);
    }
}
