//! Allocation groups: the tree of inodes of each, with 64 of them to a record.

use super::superblock::Superblock;
use crate::bytes::{be16_at, be32_at, be64_at, index};
use crate::volume::Volume;
use vmtide_block::{CancelToken, RangeSet, Result};

/// The inodes of a record.
const CHUNK: u32 = 64;

/// The deepest tree of inodes (`XFS_BTREE_MAXLEVELS`).
const MAX_LEVEL: u16 = 9;

/// The sector of a group with its inodes' tree (`XFS_AGI_DADDR`).
const INODE_SECTOR: u64 = 2;

/// Takes an inode's number and bytes.
type TakeInode<'a> = dyn FnMut(u64, &[u8]) -> Result<()> + 'a;

/// Hands over all inodes in use, with their numbers. Answers with whether nothing of them and of their trees lies in `ranges`
/// of the disk: inodes in damaged places are not found.
///
/// # Errors
/// Those of the disk and of `take`; cancelled.
pub(super) fn for_each_inode(
    volume: &Volume<'_>,
    superblock: &Superblock,
    ranges: &RangeSet,
    cancel: &CancelToken,
    take: &mut TakeInode<'_>,
) -> Result<bool> {
    let mut walk = Walk { volume, superblock, ranges, cancel, group: 0, left: 0, is_whole: true };
    for group in 0..superblock.groups {
        cancel.check()?;
        walk.group = group;
        // A block of the tree leads to its own records only: there are not more than blocks.
        walk.left = superblock.group_blocks;
        let sector = u64::from(superblock.sector_bytes);
        let offset = u64::from(group) * superblock.group_bytes() + INODE_SECTOR * sector;
        walk.is_whole &= volume.touched(offset, sector, ranges).is_empty();
        let mut bytes = [0; 512];
        if !volume.read(&mut bytes, offset)? || bytes[..4] != *b"XAGI" {
            walk.is_whole = false;
            continue;
        }
        if let (Some(root), Some(level)) = (be32_at(&bytes, 20), be32_at(&bytes, 24)) {
            let level = u16::try_from(level).unwrap_or(u16::MAX);
            walk.block(root, level.saturating_sub(1).min(MAX_LEVEL), take)?;
        }
    }
    Ok(walk.is_whole)
}

struct Walk<'a> {
    volume: &'a Volume<'a>,
    superblock: &'a Superblock,
    ranges: &'a RangeSet,
    cancel: &'a CancelToken,
    group: u32,
    left: u32,
    is_whole: bool,
}

impl Walk<'_> {
    /// Where a block of this group lies.
    fn offset(&self, block: u32) -> Option<u64> {
        let superblock = self.superblock;
        (block < superblock.group_blocks).then(|| {
            u64::from(self.group) * superblock.group_bytes()
                + u64::from(block) * u64::from(superblock.block_bytes)
        })
    }

    /// A block of the tree that is so high above the leaves.
    fn block(&mut self, block: u32, level: u16, take: &mut TakeInode<'_>) -> Result<()> {
        self.cancel.check()?;
        let (Some(offset), Some(left)) = (self.offset(block), self.left.checked_sub(1)) else {
            self.is_whole = false;
            return Ok(());
        };
        self.left = left;
        let mut bytes = vec![0; index(self.superblock.block_bytes)];
        self.is_whole &= self.volume.touched(offset, bytes.len() as u64, self.ranges).is_empty();
        let (magic, head) = if self.superblock.is_v5 { (b"IAB3", 56) } else { (b"IABT", 16) };
        let is_there = self.volume.read(&mut bytes, offset)?;
        let (Some(found), Some(count)) = (be16_at(&bytes, 4), be16_at(&bytes, 6)) else {
            return Ok(());
        };
        if !is_there || bytes[..4] != *magic || found != level {
            self.is_whole = false;
            return Ok(());
        }
        let body = bytes.get(head..).unwrap_or_default();
        if level == 0 {
            for record in body.chunks_exact(16).take(count.into()) {
                self.chunk(record, take)?;
            }
            return Ok(());
        }
        // Keys first, for as many as there is room.
        let pointers = body.get(body.len() / 8 * 4..).unwrap_or_default();
        for pointer in pointers.chunks_exact(4).take(count.into()) {
            if let Some(below) = be32_at(pointer, 0) {
                self.block(below, level - 1, take)?;
            }
        }
        Ok(())
    }

    /// The inodes of one record. Sparse ones have gaps, whose inodes count as free.
    fn chunk(&mut self, record: &[u8], take: &mut TakeInode<'_>) -> Result<()> {
        let (Some(first), Some(free)) = (be32_at(record, 0), be64_at(record, 8)) else {
            return Ok(());
        };
        let inode_bytes = u64::from(self.superblock.inode_bytes);
        let mut bytes = vec![0; index(self.superblock.inode_bytes)];
        for number in (0..CHUNK).filter(|number| free >> number & 1 == 0) {
            let Some(inside) = first.checked_add(number) else { return Ok(()) };
            let number = self.superblock.inode_number(self.group, inside);
            let Some(offset) = self.superblock.inode_offset(number) else { continue };
            self.is_whole &= self.volume.touched(offset, inode_bytes, self.ranges).is_empty();
            if self.volume.read(&mut bytes, offset)? {
                take(number, &bytes)?;
            }
        }
        Ok(())
    }
}
