//! ext2, ext3 and ext4 (Linux kernel documentation, "ext4 Data Structures and Algorithms"): every inode in use is read,
//! and its lists of blocks.

mod directory;
mod inode;
mod superblock;

use crate::FilesAt;
use crate::bytes::index;
use crate::found::Touched;
use crate::names::{MAX_DIRECTORIES, named};
use crate::volume::Volume;
use directory::Tree;
use inode::{Inode, Lists};
use superblock::Superblock;
use vmtide_block::{CancelToken, RangeSet, Result};

/// The root directory.
const ROOT: u64 = 2;

/// The journal of a file system that has one.
const JOURNAL: u64 = 8;

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
    let is_cut = touched.is_cut;
    let label =
        |number| (number == JOURNAL && superblock.has_journal).then(|| "[journal]".to_owned());
    let mut tree = Tree { volume, superblock: &superblock, lists };
    let files = named(&mut tree, touched, &directories, &label, cancel)?;
    let is_complete = is_whole && !is_cut && !tree.lists.is_cut();
    let (file_system, area) = (superblock.kind(), volume.area());
    Ok(Some(FilesAt { volume: None, file_system, files, is_complete, area }))
}

/// What the reading of all inodes gathers.
struct Scan<'a> {
    lists: Lists<'a>,
    touched: Touched,
    /// In rising order.
    directories: Vec<u64>,
}

impl Scan<'_> {
    fn take(&mut self, number: u32, inode: &Inode, ranges: &RangeSet) -> Result<()> {
        if inode.is_directory() {
            match self.directories.len() < MAX_DIRECTORIES {
                true => self.directories.push(number.into()),
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
