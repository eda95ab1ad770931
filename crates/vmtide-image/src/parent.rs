//! Finding the parent of a differencing image.
//!
//! A child names its parent by paths that were right where it was written: relative, absolute, in
//! Windows' or POSIX's spelling. What makes a file the parent is not its path but what it says of
//! itself (VHDX: DataWriteGuid, VHD: unique id, VMDK: CID), so every candidate is held against
//! that. Whoever wrote the child chose the paths, so they are followed only as far as
//! [`BackingPolicy`](crate::BackingPolicy) allows.
//!
//! A qcow2 image knows its backing file by its path alone. Where nothing is at that path, a file of that name
//! beside the image or in a directory that the user gives is taken, in the format that the image says.

use crate::elsewhere::is_device;
use crate::open::{is_no_plain_path, resolve};
use crate::{BackingPolicy, Format, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use vmtide_block::{BlockError, OpenMode, Result};

/// The most entries of a directory among which a name in another case is looked for.
const MAX_FILES: usize = 16_384;

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
    let exact = candidates(child, link, options)?;
    if let Some(path) = right_one(exact, link, options, &mut others) {
        return Ok(Search::Found(path));
    }
    let other_cases = candidates_in_other_cases(child, link, options)?;
    if let Some(path) = right_one(other_cases, link, options, &mut others) {
        return Ok(Search::Found(path));
    }
    Ok(if others.is_empty() { Search::Missing } else { Search::Others(others) })
}

/// The first of these files that is the parent; those that are not go to `others`, each with what it says of itself.
fn right_one(
    paths: Vec<PathBuf>,
    link: &ParentLink,
    options: &OpenOptions,
    others: &mut Vec<(PathBuf, String)>,
) -> Option<PathBuf> {
    for path in paths {
        let may_be_device = options.backing == BackingPolicy::Allow;
        if !(path.is_file() || may_be_device && path.exists()) {
            continue;
        }
        if link.identities.is_empty() || options.any_parent {
            return Some(path);
        }
        let found = link.format.map(|format| parent_identity(&path, format, options)).transpose();
        match found {
            Ok(Some(Some(identity))) if link.identities.contains(&identity) => return Some(path),
            Ok(identity) => {
                let identity = identity.flatten().unwrap_or_else(|| "nothing".into());
                others.push((path, identity));
            }
            Err(error) => others.push((path, format!("({error})"))),
        }
    }
    None
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
            std::io::Error::from(ErrorKind::NotFound),
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
        let Some(base) = last_name(name) else {
            continue;
        };
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
            let beside = directory.join(base);
            // A symbolic link could lead out of the directory: only Allow follows it.
            let is_link = beside.symlink_metadata().is_ok_and(|found| found.is_symlink());
            if !is_link || options.backing == BackingPolicy::Allow {
                add(beside);
            }
        }
        for search in &options.search {
            add(search.join(base));
        }
    }
    // An image is never its own parent, whatever it says.
    paths.retain(|path| path.canonicalize().map_or(true, |found| found != real));
    Ok(paths)
}

/// As [`candidates`], files whose names differ from those in the child by case alone: Windows does not tell them apart,
/// so its programs write either. Looked at last, because listing directories takes longer.
fn candidates_in_other_cases(
    child: &Path,
    link: &ParentLink,
    options: &OpenOptions,
) -> Result<Vec<PathBuf>> {
    let real = real_path(child)?;
    let own = match options.backing {
        BackingPolicy::Refuse => None,
        _ => Some(options.directory_of(child)?),
    };
    let mut paths: Vec<PathBuf> = Vec::new();
    for base in link.names.iter().filter_map(|name| last_name(name)) {
        for directory in own.iter().chain(&options.search) {
            let found = in_another_case(directory, base).filter(|path| !paths.contains(path));
            paths.extend(found);
        }
    }
    paths.retain(|path| path.canonicalize().map_or(true, |found| found != real));
    Ok(paths)
}

/// The last part of a name in Windows' or POSIX's spelling, where it may be that of a file.
pub(crate) fn last_name(name: &str) -> Option<&str> {
    let last = name.rsplit(['/', '\\']).next().unwrap_or_default();
    // On Windows a colon names a drive's own directory, or a stream beside the content; and
    // some names are devices in every directory.
    let is_other = cfg!(windows) && (last.contains(':') || is_device(last));
    (!matches!(last, "" | "." | "..") && !is_other).then_some(last)
}

/// The one plain file in `directory` whose name differs from `name` by case alone; none where there are several.
pub(crate) fn in_another_case(directory: &Path, name: &str) -> Option<PathBuf> {
    let wanted = name.to_lowercase();
    let mut found = None;
    for entry in std::fs::read_dir(directory).ok()?.take(MAX_FILES).flatten() {
        let is_it = entry
            .file_name()
            .to_str()
            .is_some_and(|text| text != name && text.to_lowercase() == wanted);
        if !is_it || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        if found.replace(directory.join(entry.file_name())).is_some() {
            return None;
        }
    }
    found
}

/// Finds the file that the image at `image` calls its `what` (backing or data file) by its path alone; `None`
/// where the policy refuses to look. Where nothing is at that path, a file of that name beside the image is
/// taken, and then one in the directories to search; nothing in the image tells whether it is the same file.
///
/// # Errors
/// [`BlockError::Io`] of the kind `NotFound`, and where the policy forbids the name.
pub(crate) fn find_named(
    options: &OpenOptions,
    image: &Path,
    what: &str,
    name: &str,
) -> Result<Option<PathBuf>> {
    let named = resolve(options, image, what, name);
    let is_missing = match &named {
        Ok(Some(path)) => !path.exists(),
        Ok(None) => false,
        Err(error) => error.io_kind() == Some(ErrorKind::NotFound),
    };
    let plain = name.strip_prefix("file:").unwrap_or(name);
    let may_search = is_missing || !matches!(named, Ok(Some(_)));
    let last = last_name(plain).filter(|_| may_search && !is_no_plain_path(plain));
    let Some(last) = last else {
        return named;
    };
    let beside = |last: &str| resolve(options, image, what, last).ok().flatten();
    // Where another file has the name, that was meant, allowed or not.
    let own = is_missing.then(|| options.directory_of(image)).transpose()?;
    let search = || options.search.iter();
    let mut exact = own.iter().filter_map(|_| beside(last)).chain(search().map(|at| at.join(last)));
    let found = exact.find(|path| path.is_file()).or_else(|| {
        let own = own.iter().filter_map(|at| in_another_case(at, last)).filter_map(|path| {
            beside(path.file_name().and_then(|name| name.to_str()).unwrap_or_default())
        });
        own.chain(search().filter_map(|at| in_another_case(at, last))).next()
    });
    match found {
        Some(path) => Ok(Some(path)),
        None if is_missing || matches!(named, Ok(None)) && !options.search.is_empty() => {
            Err(BlockError::io(
                format!(
                    "{}: its {what} {name:?} was found neither there nor beside it{}; give the directory it is in \
                 (--search DIR), or write its new place into the image (vmtide chain rebase --relink-only)",
                    image.display(),
                    if options.search.is_empty() { "" } else { " nor in the directories given" },
                ),
                std::io::Error::from(ErrorKind::NotFound),
            ))
        }
        None => named,
    }
}

pub(crate) fn real_path(path: &Path) -> Result<PathBuf> {
    vmtide_block::files::canonical(path)
        .map_err(|error| BlockError::io(format!("open {}", path.display()), error))
}
