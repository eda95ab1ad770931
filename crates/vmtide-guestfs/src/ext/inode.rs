//! An inode, and the blocks that are its file's: an extent tree (ext4) or lists of block numbers (ext2, ext3), with the blocks
//! of these lists themselves.

use super::length;
use super::superblock::Superblock;
use crate::bytes::{u16_at, u32_at};
use crate::volume::Volume;
use vmtide_block::Result;

/// `EXT4_EXTENTS_FL`.
const FLAG_EXTENTS: u32 = 0x8_0000;
/// `EXT4_INLINE_DATA_FL`: the content is in the inode.
const FLAG_INLINE: u32 = 0x1000_0000;

/// `EXT4_EXT_MAGIC` of each node of an extent tree.
const EXTENT_MAGIC: u16 = 0xF30A;

/// The deepest extent tree (`EXT4_MAX_EXTENT_DEPTH`).
const MAX_DEPTH: u16 = 5;

/// An extent longer than this has blocks that were set aside and never written: they read as zero.
const LONGEST_WRITTEN: u16 = 0x8000;

/// The most blocks of lists that are read in all: of a file system that makes sense there are fewer, in one that does not
/// inodes may share them.
const MAX_LIST_BLOCKS: u64 = 1 << 22;

/// Blocks that are neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first_block: u64,
    pub(super) count: u64,
    /// Whether it is content; else a block of the file's lists.
    pub(super) is_content: bool,
}

/// What is needed of an inode.
#[derive(Clone, Debug)]
pub(super) struct Inode {
    kind: u16,
    flags: u32,
    size_bytes: u64,
    list: [u8; 60],
}

impl Inode {
    /// One in use that has blocks, as far as can be told.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let mode = u16_at(bytes, 0)?;
        let links = u16_at(bytes, 0x1A)?;
        let list: [u8; 60] = *bytes.get(0x28..)?.first_chunk()?;
        let inode = Self {
            kind: mode >> 12,
            flags: u32_at(bytes, 0x20)?,
            size_bytes: u64::from(u32_at(bytes, 0x4)?) | u64::from(u32_at(bytes, 0x6C)?) << 32,
            list,
        };
        // Directories, files, and symbolic links too long for the inode.
        let has_blocks = match inode.kind {
            0x4 | 0x8 => true,
            0xA => inode.size_bytes >= 60,
            _ => false,
        };
        (links > 0 && has_blocks && inode.flags & FLAG_INLINE == 0).then_some(inode)
    }

    pub(super) const fn is_directory(&self) -> bool {
        self.kind == 0x4
    }
}

/// Follows the lists of inodes.
pub(super) struct Lists<'a> {
    volume: &'a Volume<'a>,
    block_bytes: u32,
    blocks: u64,
    left: u64,
    is_cut: bool,
}

impl<'a> Lists<'a> {
    pub(super) fn new(volume: &'a Volume<'a>, superblock: &Superblock) -> Self {
        let (block_bytes, blocks) = (superblock.block_bytes, superblock.blocks);
        Self { volume, block_bytes, blocks, left: MAX_LIST_BLOCKS, is_cut: false }
    }

    pub(super) const fn volume(&self) -> &'a Volume<'a> {
        self.volume
    }

    pub(super) const fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// Whether there was more than is followed.
    pub(super) const fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Hands over the runs of a file.
    ///
    /// # Errors
    /// Those of the disk and of `take`.
    pub(super) fn for_each_run(
        &mut self,
        inode: &Inode,
        take: &mut dyn FnMut(Run) -> Result<()>,
    ) -> Result<()> {
        if inode.flags & FLAG_EXTENTS != 0 {
            return self.extents(&inode.list, MAX_DEPTH + 1, take);
        }
        let (direct, indirect) = inode.list.split_at(48);
        self.block_numbers(direct, 0, take)?;
        for (depth, pointer) in (1..).zip(indirect.chunks_exact(4)) {
            self.block_numbers(pointer, depth, take)?;
        }
        Ok(())
    }

    /// Reads a block of a list; none where it is outside, or enough were read.
    fn read_list(&mut self, block: u64) -> Result<Option<Vec<u8>>> {
        let Some(offset) = block.checked_mul(u64::from(self.block_bytes)) else { return Ok(None) };
        if block == 0 || block >= self.blocks {
            return Ok(None);
        }
        let Some(left) = self.left.checked_sub(1) else {
            self.is_cut = true;
            return Ok(None);
        };
        self.left = left;
        let mut bytes = vec![0; length(u64::from(self.block_bytes))];
        Ok(self.volume.read(&mut bytes, offset)?.then_some(bytes))
    }

    /// The tree below a node that may not be as deep as `limit`.
    fn extents(
        &mut self,
        node: &[u8],
        limit: u16,
        take: &mut dyn FnMut(Run) -> Result<()>,
    ) -> Result<()> {
        let header = (u16_at(node, 0), u16_at(node, 2), u16_at(node, 6));
        let (Some(EXTENT_MAGIC), Some(entries), Some(depth)) = header else { return Ok(()) };
        if depth >= limit {
            return Ok(());
        }
        for entry in node[12..].chunks_exact(12).take(entries.into()) {
            if depth == 0 {
                let run = extent(entry).filter(|run| run.first_block < self.blocks);
                run.map_or(Ok(()), &mut *take)?;
                continue;
            }
            let (Some(low), Some(high)) = (u32_at(entry, 4), u16_at(entry, 8)) else { continue };
            let block = u64::from(high) << 32 | u64::from(low);
            let Some(below) = self.read_list(block)? else { continue };
            take(Run { first_block: block, count: 1, is_content: false })?;
            self.extents(&below, depth, take)?;
        }
        Ok(())
    }

    /// Blocks by number: of content, or of lists of numbers, `depth` lists above the content.
    fn block_numbers(
        &mut self,
        list: &[u8],
        depth: u32,
        take: &mut dyn FnMut(Run) -> Result<()>,
    ) -> Result<()> {
        let mut run: Option<Run> = None;
        for entry in list.chunks_exact(4) {
            let block = u32_at(entry, 0).map_or(0, u64::from);
            if block == 0 || block >= self.blocks {
                continue;
            }
            if depth > 0 {
                let Some(below) = self.read_list(block)? else { continue };
                take(Run { first_block: block, count: 1, is_content: false })?;
                self.block_numbers(&below, depth - 1, take)?;
                continue;
            }
            match &mut run {
                Some(run) if run.first_block + run.count == block => run.count += 1,
                earlier => {
                    earlier.take().map_or(Ok(()), &mut *take)?;
                    run = Some(Run { first_block: block, count: 1, is_content: true });
                }
            }
        }
        run.map_or(Ok(()), take)
    }
}

/// A leaf of the tree; none for blocks that were never written.
fn extent(entry: &[u8]) -> Option<Run> {
    let count = u16_at(entry, 4).filter(|count| (1..=LONGEST_WRITTEN).contains(count))?;
    let first_block = u64::from(u16_at(entry, 6)?) << 32 | u64::from(u32_at(entry, 8)?);
    Some(Run { first_block, count: count.into(), is_content: true })
}
