//! XFS ("XFS Algorithms and Data Structures", and the Linux kernel's `fs/xfs/libxfs/xfs_format.h` and `xfs_da_format.h`): the
//! inodes in use are found by the trees of each allocation group, and their extents read. Numbers are big-endian.

mod directory;
mod groups;
mod inode;
mod superblock;

use crate::FilesAt;
use crate::found::{FoundFile, Touched};
use crate::names::{MAX_DIRECTORIES, named};
use crate::volume::Volume;
use directory::Tree;
use inode::{Forks, Inode};
use superblock::Superblock;
use vmtide_block::{CancelToken, RangeSet, Result};

/// The most blocks of trees that are read in all: of a file system that makes sense there are fewer, in one that does not,
/// inodes may share them.
const MAX_TREE_BLOCKS: u64 = 1 << 22;

/// The files at `ranges` of the disk; `None` where this is no such file system.
pub(crate) fn files_at(
    volume: &Volume<'_>,
    ranges: &RangeSet,
    cancel: &CancelToken,
) -> Result<Option<FilesAt>> {
    let Some(superblock) = Superblock::read(volume)? else { return Ok(None) };
    let mut forks = Forks::new(volume, &superblock);
    let (mut touched, mut directories) = (Touched::default(), Vec::new());
    let is_whole =
        groups::for_each_inode(volume, &superblock, ranges, cancel, &mut |number, bytes| {
            let Some(inode) = Inode::parse(bytes) else { return Ok(()) };
            if inode.is_directory() {
                match directories.len() < MAX_DIRECTORIES {
                    true => directories.push(number),
                    false => touched.is_cut = true,
                }
            }
            forks.for_each_run(&inode, &mut |run| {
                let found = volume.touched(run.offset, run.length, ranges);
                touched.add(number, "", &found);
                Ok(())
            })
        })?;
    directories.sort_unstable();
    let is_cut = touched.is_cut;
    let mut tree = Tree { volume, superblock: &superblock, forks };
    let mut files = named(&mut tree, touched, &directories, &|_| None, cancel)?;
    if let Some((offset, length)) = superblock.log {
        let log = volume.touched(offset, length, ranges);
        if !log.is_empty() {
            let path = "[log]".to_owned();
            files.push(FoundFile {
                path,
                other_paths: Vec::new(),
                is_directory: false,
                ranges: log,
            });
        }
    }
    let is_complete = is_whole && !is_cut && !tree.forks.is_cut();
    let area = volume.area();
    Ok(Some(FilesAt { volume: None, file_system: "xfs", files, is_complete, area }))
}
