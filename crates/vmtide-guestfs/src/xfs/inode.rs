//! An inode, and the extents of its data: in the inode, or in a tree.

use super::MAX_TREE_BLOCKS;
use super::superblock::Superblock;
use crate::bytes::{be16_at, be32_at, be64_at, index};
use crate::volume::Volume;
use vmtide_block::Result;

/// Content in the inode (`XFS_DINODE_FMT_LOCAL`).
const LOCAL: u8 = 1;
/// Extents in the inode.
const EXTENTS: u8 = 2;
/// The root of a tree of extents in the inode.
const BTREE: u8 = 3;

/// `XFS_DIFLAG_REALTIME`: the data is on another device.
const FLAG_REALTIME: u16 = 1;
/// `XFS_DIFLAG2_NREXT64`: counts of extents are longer.
const FLAG2_LONG_COUNTS: u64 = 0x10;

/// The deepest tree of extents (`XFS_BM_MAXLEVELS` is below).
const MAX_LEVEL: u16 = 12;

/// What is needed of an inode.
#[derive(Clone, Debug)]
pub(super) struct Inode {
    kind: u16,
    format: u8,
    extents: u64,
    /// The data fork.
    fork: Vec<u8>,
}

/// Bytes of the file system that are neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) offset: u64,
    pub(super) length: u64,
    /// The offset in the file, in blocks; none for a block of the tree.
    pub(super) block_of_file: Option<u64>,
}

impl Inode {
    /// One in use that has data.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (mode, version, format) = (be16_at(bytes, 2)?, *bytes.get(4)?, *bytes.get(5)?);
        let kind = mode >> 12;
        let links = if version == 1 { u32::from(be16_at(bytes, 6)?) } else { be32_at(bytes, 16)? };
        let is_in_use = bytes.starts_with(b"IN") && links > 0 && matches!(kind, 0x4 | 0x8 | 0xA);
        let is_realtime = kind == 0x8 && be16_at(bytes, 90)? & FLAG_REALTIME != 0;
        if !is_in_use || is_realtime {
            return None;
        }
        let head = if version >= 3 { 176 } else { 100 };
        let is_long = version >= 3 && be64_at(bytes, 120)? & FLAG2_LONG_COUNTS != 0;
        let extents = if is_long { be64_at(bytes, 24)? } else { be32_at(bytes, 76)?.into() };
        let body = bytes.get(head..)?;
        let fork = match usize::from(*bytes.get(82)?) * 8 {
            0 => body,
            length => body.get(..length)?,
        };
        Some(Self { kind, format, extents, fork: fork.to_vec() })
    }

    pub(super) const fn is_directory(&self) -> bool {
        self.kind == 0x4
    }

    /// The content, where it is in the inode.
    pub(super) fn local(&self) -> Option<&[u8]> {
        (self.format == LOCAL).then_some(&self.fork)
    }
}

/// Follows the extents of inodes.
pub(super) struct Forks<'a> {
    volume: &'a Volume<'a>,
    superblock: &'a Superblock,
    left: u64,
    is_cut: bool,
}

impl<'a> Forks<'a> {
    pub(super) const fn new(volume: &'a Volume<'a>, superblock: &'a Superblock) -> Self {
        Self { volume, superblock, left: MAX_TREE_BLOCKS, is_cut: false }
    }

    /// Whether there was more than is followed.
    pub(super) const fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Hands over the runs of a file's data, and the blocks of its tree.
    ///
    /// # Errors
    /// Those of the disk and of `take`.
    pub(super) fn for_each_run(
        &mut self,
        inode: &Inode,
        take: &mut dyn FnMut(Run) -> Result<()>,
    ) -> Result<()> {
        match inode.format {
            EXTENTS => {
                let count = usize::try_from(inode.extents).unwrap_or(usize::MAX);
                self.records(&inode.fork, count, take)
            }
            BTREE => {
                let (level, count) = (be16_at(&inode.fork, 0), be16_at(&inode.fork, 2));
                let (Some(level @ 1..=MAX_LEVEL), Some(count)) = (level, count) else {
                    return Ok(());
                };
                self.pointers(&inode.fork[4..], count, level, take)
            }
            _ => Ok(()),
        }
    }

    fn records(
        &self,
        bytes: &[u8],
        count: usize,
        take: &mut dyn FnMut(Run) -> Result<()>,
    ) -> Result<()> {
        for record in bytes.chunks_exact(16).take(count) {
            self.run(record).map_or(Ok(()), &mut *take)?;
        }
        Ok(())
    }

    /// An extent; none for blocks that were never written.
    fn run(&self, record: &[u8]) -> Option<Run> {
        let (high, low) = (be64_at(record, 0)?, be64_at(record, 8)?);
        let block_of_file = high >> 9 & ((1 << 54) - 1);
        let block = (high & 0x1FF) << 43 | low >> 21;
        let length = (low & ((1 << 21) - 1)) * u64::from(self.superblock.block_bytes);
        let offset = self.superblock.block_offset(block)?;
        let is_written = high >> 63 == 0;
        is_written.then_some(Run { offset, length, block_of_file: Some(block_of_file) })
    }

    /// The blocks below a node, which is so high above the leaves: keys first, for as many as there is room.
    fn pointers(
        &mut self,
        node: &[u8],
        count: u16,
        level: u16,
        take: &mut dyn FnMut(Run) -> Result<()>,
    ) -> Result<()> {
        let pointers = node.get(node.len() / 16 * 8..).unwrap_or_default();
        for pointer in pointers.chunks_exact(8).take(count.into()) {
            let offset = be64_at(pointer, 0).and_then(|block| self.superblock.block_offset(block));
            let Some(offset) = offset else { continue };
            self.tree_block(offset, level - 1, take)?;
        }
        Ok(())
    }

    fn tree_block(
        &mut self,
        offset: u64,
        level: u16,
        take: &mut dyn FnMut(Run) -> Result<()>,
    ) -> Result<()> {
        let Some(left) = self.left.checked_sub(1) else {
            self.is_cut = true;
            return Ok(());
        };
        self.left = left;
        let mut bytes = vec![0; index(self.superblock.block_bytes)];
        take(Run { offset, length: bytes.len() as u64, block_of_file: None })?;
        let (magic, head) = if self.superblock.is_v5 { (b"BMA3", 72) } else { (b"BMAP", 24) };
        if !self.volume.read(&mut bytes, offset)? || bytes[..4] != *magic {
            return Ok(());
        }
        let (found, count) = (be16_at(&bytes, 4), be16_at(&bytes, 6));
        let (Some(count), true) = (count, found == Some(level)) else { return Ok(()) };
        match level {
            0 => self.records(&bytes[head..], count.into(), take),
            _ => self.pointers(&bytes[head..], count, level, take),
        }
    }
}
