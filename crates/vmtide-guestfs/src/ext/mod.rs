//! ext2, ext3 and ext4 (Linux kernel documentation, "ext4 Data Structures and Algorithms"): every inode in use is read,
//! and its lists of blocks.

mod inode;
mod names;
mod superblock;

use crate::bytes::index;
use crate::found::Touched;
use crate::volume::Volume;
use crate::{FilesAt, FoundFile, MAX_NAMES};
use inode::{Inode, Lists};
use names::Names;
use superblock::Superblock;
use vmtide_block::{CancelToken, RangeSet, Result};

/// The root directory.
const ROOT: u32 = 2;

/// The journal of a file system that has one.
const JOURNAL: u32 = 8;

/// The most directories that names are looked for in.
const MAX_DIRECTORIES: usize = 1 << 23;

/// The files at `ranges` of the disk; `None` where this is no such file system.
pub(crate) fn files_at(
    volume: &Volume<'_>,
    ranges: &RangeSet,
    cancel: &CancelToken,
) -> Result<Option<FilesAt>> {
    let Some(superblock) = Superblock::read(volume)? else { return Ok(None) };
    let mut scan = Scan {
        lists: Lists::new(volume, &superblock),
        touched: Touched::default(),
        directories: Vec::new(),
    };
    let is_whole = superblock.for_each_inode(volume, ranges, cancel, &mut |number, bytes| {
        let Some(inode) = Inode::parse(bytes) else { return Ok(()) };
        scan.take(number, &inode, ranges)
    })?;
    let Scan { lists, touched, directories } = scan;
    let mut names = Names::new(volume, &superblock, lists);
    let wanted = touched.files.keys().filter_map(|(number, _)| u32::try_from(*number).ok());
    names.look_for(wanted.collect(), &directories, cancel)?;
    let mut files = Vec::with_capacity(touched.files.len());
    for ((number, _), found) in touched.files {
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        let mut paths = match number {
            ROOT => vec!["/".to_owned()],
            JOURNAL if superblock.has_journal => vec!["[journal]".to_owned()],
            _ => names.paths_of(number)?,
        };
        paths.truncate(MAX_NAMES);
        let path = if paths.is_empty() { format!("[inode {number}]") } else { paths.remove(0) };
        let is_directory = directories.binary_search(&number).is_ok();
        files.push(FoundFile { path, other_paths: paths, is_directory, ranges: found });
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let is_complete = is_whole && !touched.is_cut && !names.is_cut();
    let (file_system, area) = (superblock.kind(), volume.area());
    Ok(Some(FilesAt { volume: None, file_system, files, is_complete, area }))
}

/// What the reading of all inodes gathers.
struct Scan<'a> {
    lists: Lists<'a>,
    touched: Touched,
    /// In rising order.
    directories: Vec<u32>,
}

impl Scan<'_> {
    fn take(&mut self, number: u32, inode: &Inode, ranges: &RangeSet) -> Result<()> {
        if inode.is_directory() {
            match self.directories.len() < MAX_DIRECTORIES {
                true => self.directories.push(number),
                false => self.touched.is_cut = true,
            }
        }
        let (touched, block_bytes) = (&mut self.touched, u64::from(self.lists.block_bytes()));
        let volume = self.lists.volume();
        self.lists.for_each_run(inode, &mut |run| {
            let Some(offset) = run.first_block.checked_mul(block_bytes) else { return Ok(()) };
            let length = run.count.saturating_mul(block_bytes);
            touched.add(u64::from(number), "", &volume.touched(offset, length, ranges));
            Ok(())
        })
    }
}

/// A count of blocks or a block's number as a length in memory.
fn length(number: u64) -> usize {
    u32::try_from(number).map_or(usize::MAX, index)
}
