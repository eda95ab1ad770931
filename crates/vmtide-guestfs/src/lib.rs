//! The files inside a disk: which of them lie at given places of it.
//!
//! A damaged part of a backup is some bytes of a disk. Whoever has to decide what to do about it wants to know the files,
//! and a file system has no list that leads from its blocks to them: every file's own list is read, once, and held against
//! the bytes asked for; then names are looked up for what was found, which is little. ext2, ext3, ext4, XFS and NTFS are read, in partitions and in logical
//! volumes of LVM, from what the disk holds without replaying a journal. Libraries that read file systems lead from a path to content
//! and not back, so this is our own.
//!
//! All that is read here was written by a guest and is hostile: what makes no sense is passed over, circles end, and
//! memory is bounded by [`MAX_FILES`] and a few numbers beside it.

mod bytes;
mod ext;
mod found;
#[doc(hidden)]
pub mod fuzzing;
mod lvm;
mod names;
mod ntfs;
mod volume;
mod xfs;

pub use found::{FilesAt, FoundFile, MAX_FILES, MAX_NAMES};

use vmtide_block::{BlockDevice, ByteRange, CancelToken, RangeSet, Result};
use volume::Volume;

/// Finds the files of the file systems in `area` of `device` that have content, or lists of where it is, in `ranges`, both
/// in bytes of the device: of one, or of one for each logical volume of LVM that `ranges` touch. Empty where there is none that is
/// read here.
///
/// Reads all inodes or file records: a gigabyte for each million files of NTFS, a quarter of that on ext4; what reads as
/// zero is passed over. `device` answers with zeros for what is lost, or fails.
///
/// # Errors
/// Those of reading `device`; `Cancelled`.
pub fn files_at(
    device: &dyn BlockDevice,
    area: ByteRange,
    ranges: &RangeSet,
    cancel: &CancelToken,
) -> Result<Vec<FilesAt>> {
    let Some(volume) = Volume::new(device, area) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for (name, logical) in lvm::volumes(&volume)? {
        if !logical.touched(0, logical.size_bytes(), ranges).is_empty()
            && let Some(files) = in_volume(&logical, ranges, cancel)?
        {
            found.push(FilesAt { volume: Some(name), ..files });
        }
    }
    if found.is_empty() {
        found.extend(in_volume(&volume, ranges, cancel)?);
    }
    Ok(found)
}

fn in_volume(
    volume: &Volume<'_>,
    ranges: &RangeSet,
    cancel: &CancelToken,
) -> Result<Option<FilesAt>> {
    for kind in [ext::files_at, xfs::files_at, ntfs::files_at] {
        if let Some(found) = kind(volume, ranges, cancel)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}
