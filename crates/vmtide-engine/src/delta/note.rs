//! The note beside an image that deltas are applied to: at which moment its disk is, or that it is
//! between two.
//!
//! `disk.vhdx` has `disk.vhdx.vmtide-delta`, one JSON object. It is made durable before the first byte of
//! the image changes. A note of a complete image counts only while the image is as it was left: its
//! size and time of change are in the note, and whatever else writes to the image makes it void.

use crate::image::staged;
use crate::{EngineError, Result};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// The most that a note has, in bytes: two ids of 4 KiB, escaped, and some words.
const MAX_NOTE_BYTES: u64 = 64 << 10;

/// What is known of an image's disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub(crate) enum Note {
    /// A delta is being applied, or that was interrupted.
    Incomplete {
        /// The digest of the delta.
        delta: String,
        /// The size of the disk that the delta leads to, in bytes.
        size_bytes: u64,
    },
    /// A delta was applied.
    Complete {
        /// The moment.
        id: String,
        /// What the file was when it was left.
        file: FileState,
    },
}

/// What tells whether a file was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileState {
    size_bytes: u64,
    modified_ns: u64,
}

impl FileState {
    pub fn of(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path)
            .map_err(|error| EngineError::io(format!("stat {}", path.display()), error))?;
        let modified = metadata.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        let modified_ns = modified.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(0));
        Ok(Self { size_bytes: metadata.len(), modified_ns })
    }
}

/// Where the note of an image is.
pub(crate) fn path_of(image: &Path) -> PathBuf {
    let mut name = image.file_name().map_or_else(OsString::new, ToOwned::to_owned);
    name.push(".vmtide-delta");
    image.with_file_name(name)
}

impl Note {
    /// The note of an image; none where there is none, or it speaks of an image that was changed since.
    ///
    /// # Errors
    /// [`EngineError::Refused`] where it cannot be understood; where it cannot be read.
    pub fn read(image: &Path) -> Result<Option<Self>> {
        let path = path_of(image);
        let length = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(EngineError::io(format!("stat {}", path.display()), error)),
        };
        let unknown = |detail: String| {
            EngineError::refused(
                format!("use {}", image.display()),
                format!(
                    "the note {} cannot be understood ({detail}): delete it if the image is complete",
                    path.display()
                ),
            )
        };
        if length > MAX_NOTE_BYTES {
            return Err(unknown(format!("{length} bytes")));
        }
        let bytes = std::fs::read(&path)
            .map_err(|error| EngineError::io(format!("read {}", path.display()), error))?;
        let note: Self =
            serde_json::from_slice(&bytes).map_err(|error| unknown(error.to_string()))?;
        match &note {
            Self::Complete { file, .. } if *file != FileState::of(image)? => Ok(None),
            _ => Ok(Some(note)),
        }
    }

    /// Puts the note beside the image, on the medium.
    pub fn write(&self, image: &Path) -> Result<()> {
        use std::io::Write;
        let path = path_of(image);
        let failed = |error| EngineError::io(format!("write {}", path.display()), error);
        let text = serde_json::to_vec(self).map_err(|error| failed(error.into()))?;
        let temporary = staged::temporary_beside(&path)?;
        let written = std::fs::File::create_new(&temporary)
            .and_then(|mut file| {
                file.write_all(&text)?;
                file.sync_all()
            })
            .map_err(failed)
            .and_then(|()| staged::publish(&temporary, &path, true));
        if written.is_err() {
            // What cannot be removed has `vmtide-partial` in its name.
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }
}

/// Removes the note of an image all of which was written anew.
pub(crate) fn forget(image: &Path) {
    let note = path_of(image);
    match std::fs::remove_file(&note) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(path = %note.display(), %error, "speaks of an image that is replaced, and cannot be removed");
        }
        _ => {}
    }
}

/// Refuses an image that a delta was only half applied to.
///
/// # Errors
/// [`EngineError::Refused`].
pub(crate) fn check_complete(image: &Path) -> Result<()> {
    match Note::read(image)? {
        Some(Note::Incomplete { .. }) => Err(EngineError::refused(
            format!("read {}", image.display()),
            format!(
                "it is incomplete: a delta was being applied to it; apply the same delta again (or, if \
                 you know better, delete {})",
                path_of(image).display()
            ),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_counts_while_the_image_is_as_it_was_left() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("web.vhdx");
        std::fs::write(&image, "one").unwrap();
        assert_eq!(Note::read(&image).unwrap(), None);
        let file = FileState::of(&image).unwrap();
        let note = Note::Complete { id: "rct:7".into(), file };
        note.write(&image).unwrap();
        assert_eq!(Note::read(&image).unwrap(), Some(note));
        std::fs::write(&image, "more").unwrap();
        assert_eq!(Note::read(&image).unwrap(), None);
        check_complete(&image).unwrap();
        let note = Note::Incomplete { delta: "ab".into(), size_bytes: 5 };
        note.write(&image).unwrap();
        assert_eq!(Note::read(&image).unwrap(), Some(note));
        check_complete(&image).unwrap_err();
        forget(&image);
        check_complete(&image).unwrap();
        forget(&image);
        std::fs::write(path_of(&image), "{").unwrap();
        check_complete(&image).unwrap_err();
        let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }
}
