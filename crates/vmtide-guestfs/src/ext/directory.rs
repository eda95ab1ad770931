//! Directories, in blocks of entries.

use super::ROOT;
use super::inode::{Inode, Lists, Run};
use super::length;
use super::superblock::Superblock;
use crate::bytes::{index, u16_at, u32_at};
use crate::names::{Directories, MAX_DIRECTORY_BYTES};
use crate::volume::Volume;
use vmtide_block::Result;

/// The directories of a file system.
pub(super) struct Tree<'a> {
    pub(super) volume: &'a Volume<'a>,
    pub(super) superblock: &'a Superblock,
    pub(super) lists: Lists<'a>,
}

impl Directories for Tree<'_> {
    fn root(&self) -> u64 {
        ROOT
    }

    fn for_each_name(
        &mut self,
        directory: u64,
        take: &mut dyn FnMut(u64, &[u8]) -> bool,
    ) -> Result<()> {
        let Some(inode) = self.directory(directory)? else { return Ok(()) };
        let mut runs: Vec<Run> = Vec::new();
        self.lists.for_each_run(&inode, &mut |run| {
            runs.push(run);
            Ok(())
        })?;
        let block_bytes = u64::from(self.superblock.block_bytes);
        let mut block = vec![0; length(block_bytes)];
        let mut left = MAX_DIRECTORY_BYTES / block_bytes;
        for run in runs.into_iter().filter(|run| run.is_content) {
            for number in (run.first_block..).take(length(run.count)) {
                let Some(offset) = number.checked_mul(block_bytes).filter(|_| left > 0) else {
                    return Ok(());
                };
                left -= 1;
                if !self.volume.read(&mut block, offset)? || !names_of_block(&block, take) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

impl Tree<'_> {
    fn directory(&self, number: u64) -> Result<Option<Inode>> {
        let Ok(number) = u32::try_from(number) else { return Ok(None) };
        let mut bytes = vec![0; index(self.superblock.inode_bytes)];
        let Some(offset) = self.superblock.inode_offset(self.volume, number)? else {
            return Ok(None);
        };
        let is_there = self.volume.read(&mut bytes, offset)?;
        Ok(is_there.then(|| Inode::parse(&bytes)).flatten().filter(Inode::is_directory))
    }
}

/// The entries of one block; answers with whether to go on. An index of a large directory looks like a block with one
/// empty entry.
fn names_of_block(block: &[u8], take: &mut dyn FnMut(u64, &[u8]) -> bool) -> bool {
    let mut rest = block;
    while let (Some(inode), Some(length)) = (u32_at(rest, 0), u16_at(rest, 4)) {
        // 64 KiB do not fit in 16 bits: these two mean all of it (`ext4_rec_len_from_disk`).
        let length = if matches!(length, 0 | 0xFFFF) { rest.len() } else { length.into() };
        let (Some(name_length), true) = (rest.get(6), (12..=rest.len()).contains(&length)) else {
            return true;
        };
        if inode != 0
            && let Some(name) = rest.get(8..8 + usize::from(*name_length))
            && !name.is_empty()
            && !take(inode.into(), name)
        {
            return false;
        }
        rest = &rest[length..];
    }
    true
}
