//! Other images that read through an image.

use super::link::link_of;
use super::list::find_link;
use crate::parent::real_path;
use crate::{BackingPolicy, Format, OpenOptions, probe_device};
use std::path::{Path, PathBuf};
use vmtide_block::{BlockError, OpenMode, RawDevice, Result};

/// The most entries of a directory that are looked at. A directory of virtual disks has tens.
const MAX_FILES: usize = 16_384;

/// The images in the directory of `parent` (and in `directories`) whose parent it is. Changing
/// `parent` changes what they hold, or makes them refuse it.
///
/// Only what lies there is found: nothing in a parent says who its children are.
///
/// # Errors
/// Where a directory cannot be read, and [`BlockError::Unsupported`] where it has more than 16,384
/// entries: that none of them is a child is then not known. Files that cannot be read or understood
/// are passed over. Symbolic links are followed.
pub fn find_children(parent: impl AsRef<Path>, directories: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let real = real_path(parent.as_ref())?;
    let beside = real.parent().map(Path::to_path_buf);
    let mut searched: Vec<PathBuf> = Vec::new();
    let mut children: Vec<PathBuf> = Vec::new();
    for directory in beside.iter().chain(directories) {
        let directory = real_path(directory)?;
        if searched.contains(&directory) {
            continue;
        }
        let entries = std::fs::read_dir(&directory)
            .map_err(|error| BlockError::io(format!("list {}", directory.display()), error))?;
        for (count, entry) in entries.enumerate() {
            if count >= MAX_FILES {
                return Err(BlockError::unsupported(
                    directory.display().to_string(),
                    format!(
                        "has more than {MAX_FILES} entries, too many to find out which of them read \
                         through {}; move the images to a directory of their own",
                        real.display()
                    ),
                ));
            }
            let path = entry
                .map_err(|error| BlockError::io(format!("list {}", directory.display()), error))?
                .path();
            // Links are followed: a child may be seen by one alone.
            let is_file = std::fs::metadata(&path).is_ok_and(|found| found.is_file());
            if is_file
                && let Ok(path) = real_path(&path)
                && path != real
                && is_child(&path, &real)
            {
                children.push(path);
            }
        }
        searched.push(directory);
    }
    children.sort_unstable();
    children.dedup();
    Ok(children)
}

/// Whether the file is an image that reads through the one at `parent`.
fn is_child(path: &Path, parent: &Path) -> bool {
    let looked = || -> Result<bool> {
        let file = RawDevice::open(path, OpenMode::ReadOnly)?;
        let format = probe_device(&file)?;
        if format == Format::Raw {
            return Ok(false);
        }
        let Some(link) = link_of(&file, format)? else {
            return Ok(false);
        };
        let options = OpenOptions { backing: BackingPolicy::Allow, ..OpenOptions::default() };
        let found = find_link(path, link, format, &options)?;
        let is_it = |found: &PathBuf| real_path(found).is_ok_and(|found| found == parent);
        Ok(found.path.as_ref().is_some_and(is_it))
    };
    looked().unwrap_or(false)
}
