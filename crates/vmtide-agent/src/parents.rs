//! Where the images lie that a disk is read through.
//!
//! A differencing disk is a file that names other files, and whoever may write into a root could have it name any of the
//! host, or a share of a machine of his own, to which Windows would log in with the agent's account. So a disk is opened
//! only once all places are known where its parents may be, and all of them lie in the roots. To find that out nothing is
//! opened but images that lie there themselves ([`DiskProvider::parents`](crate::provider::DiskProvider::parents)).

use crate::provider::{DiskProvider, ProviderError};
use crate::roots::{Refusal, Roots};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The most images of one chain that are looked at; as many as `vmtide-image` opens.
pub const MAX_PARENTS: usize = 64;

/// Why a disk is not opened with its parents.
#[derive(Debug, Error)]
pub enum ParentError {
    /// It, or one of them, is no image that can be looked at.
    #[error("{0}")]
    Disk(#[from] ProviderError),
    /// One may lie outside of the roots, whether or not there is such a file.
    #[error(
        "its parent {parent} is not in a directory that the agent serves; add that directory with --root"
    )]
    Outside {
        /// The place, as the image names it.
        parent: String,
    },
    /// One is in none of the places that its child names.
    #[error(
        "its parent {parent} is not there; bring it there, or to a directory that the agent serves"
    )]
    Missing {
        /// The first of the places.
        parent: String,
    },
    /// There are too many.
    #[error("its chain has more than {MAX_PARENTS} images")]
    TooLong,
}

impl ParentError {
    /// Whether a file was not there: that of the disk, or of a parent.
    pub const fn is_missing(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Disk(ProviderError::NotFound { .. }))
    }

    /// The same about the disk at `path`.
    pub fn of(self, path: &Path) -> ProviderError {
        let reason = self.to_string();
        let path = path.display().to_string();
        match self {
            Self::Disk(error) => error,
            Self::Outside { .. } | Self::Missing { .. } => ProviderError::Denied { path, reason },
            Self::TooLong => ProviderError::NotADisk { path, reason },
        }
    }
}

/// How a path is found on this host that a platform names and that is no full path here.
pub type Find<'a> = Option<&'a dyn Fn(&str) -> PathBuf>;

/// Succeeds where all images that the disk is read through lie in the roots. Blocks.
///
/// # Errors
/// [`ParentError`].
pub fn check(
    provider: &dyn DiskProvider,
    roots: &Roots,
    disk: &Path,
    find: Find<'_>,
) -> Result<(), ParentError> {
    let mut child = disk.to_path_buf();
    for _ in 0..MAX_PARENTS {
        match parent(provider, roots, &child, find)? {
            Some(parent) => child = parent,
            None => return Ok(()),
        }
    }
    Err(ParentError::TooLong)
}

/// The parent of one image: the first of its places that has a file. None of an image without a parent. Blocks.
///
/// # Errors
/// [`ParentError::Outside`] where any of the places lies outside of the roots, or cannot be told: which one the platform
/// takes is its own affair; [`ParentError::Missing`] where none of them has a file.
pub fn parent(
    provider: &dyn DiskProvider,
    roots: &Roots,
    child: &Path,
    find: Find<'_>,
) -> Result<Option<PathBuf>, ParentError> {
    let places = provider.parents(child)?;
    let Some(first) = places.first() else { return Ok(None) };
    let mut found = None;
    for place in &places {
        // A name that is no Unicode came here changed, and would be looked for under another one.
        if place.to_string_lossy().contains(char::REPLACEMENT_CHARACTER) {
            return Err(ParentError::Outside { parent: place.display().to_string() });
        }
        let at = match find {
            Some(find) if !place.is_absolute() => find(&place.to_string_lossy()),
            _ => child.parent().map_or_else(|| place.clone(), |at| at.join(place)),
        };
        match roots.locate(&at.to_string_lossy()) {
            Ok(located) => found = found.or_else(|| Some(located.path().to_path_buf())),
            Err(refusal) if is_missing(&refusal) => {}
            Err(refusal) => {
                let parent = place.display().to_string();
                tracing::debug!(child = %child.display(), parent, %refusal, "parent refused");
                return Err(ParentError::Outside { parent });
            }
        }
    }
    match found {
        Some(parent) => Ok(Some(parent)),
        None => Err(ParentError::Missing { parent: first.display().to_string() }),
    }
}

/// Whether a place in the roots has no file.
pub fn is_missing(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::Io(error) if error.kind() == ErrorKind::NotFound)
}
