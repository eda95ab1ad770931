//! Finding the parent of a differencing image.
//!
//! A child names its parent by paths that were right where it was written: relative, absolute, in
//! Windows' or POSIX's spelling. What makes a file the parent is not its path but what it says of
//! itself (VHDX: DataWriteGuid, VHD: unique id, VMDK: CID), so every candidate is held against
//! that. Whoever wrote the child chose the paths, so they are followed only as far as
//! [`BackingPolicy`](crate::BackingPolicy) allows.

use crate::elsewhere::is_device;
use crate::{BackingPolicy, Format, OpenOptions};
use std::path::{Path, PathBuf};
use vmtide_block::{BlockError, OpenMode, Result};

/// How a child names its parent. **Untrusted**: whoever wrote the image chose it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParentLink {
    /// The names, the one to try first in front: paths in Windows' or POSIX's spelling, relative
    /// ones from the child's directory.
    pub names: Vec<String>,
    /// The parent's format, where the child gives it or its own format implies it.
    pub format: Option<Format>,
    /// What the parent must say of itself, one of these ([`crate::identity`]); empty where the
    /// format knows no such thing.
    pub identities: Vec<String>,
}

/// What looking for a parent found.
pub(crate) enum Search {
    /// This file, which says of itself what the child wants (or the caller takes any).
    Found(PathBuf),
    /// The policy forbids to look.
    Refused,
    /// No file under any of the names.
    Missing,
    /// Files, but none is the parent: each with what it says of itself, or why that is not known.
    Others(Vec<(PathBuf, String)>),
}

/// Looks for the file that `link` in the image at `child` means.
pub(crate) fn look_for_parent(
    child: &Path,
    link: &ParentLink,
    options: &OpenOptions,
) -> Result<Search> {
    if options.backing == BackingPolicy::Refuse && options.search.is_empty() {
        return Ok(Search::Refused);
    }
    let mut others = Vec::new();
    for path in candidates(child, link, options)? {
        let may_be_device = options.backing == BackingPolicy::Allow;
        if !(path.is_file() || may_be_device && path.exists()) {
            continue;
        }
        if link.identities.is_empty() || options.any_parent {
            return Ok(Search::Found(path));
        }
        let found = link.format.map(|format| parent_identity(&path, format, options)).transpose();
        match found {
            Ok(Some(Some(identity))) if link.identities.contains(&identity) => {
                return Ok(Search::Found(path));
            }
            Ok(identity) => {
                let identity = identity.flatten().unwrap_or_else(|| "nothing".into());
                others.push((path, identity));
            }
            Err(error) => others.push((path, format!("({error})"))),
        }
    }
    Ok(if others.is_empty() { Search::Missing } else { Search::Others(others) })
}

/// Finds the file that `link` in the image at `child` means; `None` where the policy refuses to
/// look.
pub(crate) fn find_parent(
    child: &Path,
    link: &ParentLink,
    options: &OpenOptions,
) -> Result<Option<PathBuf>> {
    let context = child.display().to_string();
    match look_for_parent(child, link, options)? {
        Search::Found(path) => Ok(Some(path)),
        Search::Refused => Ok(None),
        Search::Missing => Err(BlockError::io(
            format!(
                "{context}: its parent {:?} was not found beside it{}; give the directory it is \
                 in (--search DIR)",
                link.names.first().map_or("", String::as_str),
                if options.search.is_empty() { "" } else { " or in the directories given" },
            ),
            std::io::Error::from(std::io::ErrorKind::NotFound),
        )),
        Search::Others(others) => {
            let wanted = link.identities.join(" or ");
            let others: Vec<String> = others
                .iter()
                .map(|(path, identity)| format!("{} says {identity}", path.display()))
                .collect();
            Err(BlockError::damaged(
                context,
                format!(
                    "the parent must be {wanted}, but {}: it was changed or replaced after this \
                     child was made",
                    others.join("; ")
                ),
            ))
        }
    }
}

fn parent_identity(path: &Path, format: Format, options: &OpenOptions) -> Result<Option<String>> {
    crate::identity(&options.file(path, OpenMode::ReadOnly)?, format)
}

/// The paths to try, in order, each once.
fn candidates(child: &Path, link: &ParentLink, options: &OpenOptions) -> Result<Vec<PathBuf>> {
    let real = real_path(child)?;
    let directory = options.directory_of(child)?;
    let mut paths: Vec<PathBuf> = Vec::new();
    for name in &link.names {
        let plain = name.replace('\\', "/");
        let base = plain.rsplit('/').next().unwrap_or_default().to_owned();
        // On Windows a colon names a drive's own directory, or a stream beside the content; and
        // some names are devices in every directory.
        let is_other = cfg!(windows) && (base.contains(':') || is_device(&base));
        if base.is_empty() || base == "." || base == ".." || is_other {
            continue;
        }
        let mut add = |path: PathBuf| {
            if !paths.contains(&path) {
                paths.push(path);
            }
        };
        if options.backing == BackingPolicy::Allow {
            // A system that has the separators and drives of the name takes it as it is.
            add(directory.join(if cfg!(windows) { name } else { &plain }));
        }
        if options.backing != BackingPolicy::Refuse {
            let beside = directory.join(&base);
            // A symbolic link could lead out of the directory: only Allow follows it.
            let is_link = beside.symlink_metadata().is_ok_and(|found| found.is_symlink());
            if !is_link || options.backing == BackingPolicy::Allow {
                add(beside);
            }
        }
        for search in &options.search {
            add(search.join(&base));
        }
    }
    // An image is never its own parent, whatever it says.
    paths.retain(|path| path.canonicalize().map_or(true, |found| found != real));
    Ok(paths)
}

pub(crate) fn real_path(path: &Path) -> Result<PathBuf> {
    vmtide_block::files::canonical(path)
        .map_err(|error| BlockError::io(format!("open {}", path.display()), error))
}
