//! Directories: in the inode, or in blocks of entries that come before an index.

use super::inode::{Forks, Inode};
use super::superblock::Superblock;
use crate::bytes::{be16_at, be32_at, be64_at, index};
use crate::names::{Directories, MAX_DIRECTORY_BYTES};
use crate::volume::Volume;
use vmtide_block::Result;

/// Where the index of a directory begins in it, in bytes (`XFS_DIR2_LEAF_OFFSET`).
const INDEX_OFFSET: u64 = 32 << 30;

/// What marks free space among entries (`XFS_DIR2_DATA_FREE_TAG`).
const FREE: u16 = 0xFFFF;

/// The directories of a file system.
pub(super) struct Tree<'a> {
    pub(super) volume: &'a Volume<'a>,
    pub(super) superblock: &'a Superblock,
    pub(super) forks: Forks<'a>,
}

impl Directories for Tree<'_> {
    fn root(&self) -> u64 {
        self.superblock.root
    }

    fn for_each_name(
        &mut self,
        directory: u64,
        take: &mut dyn FnMut(u64, &[u8]) -> bool,
    ) -> Result<()> {
        let Some(inode) = self.directory(directory)? else { return Ok(()) };
        if let Some(local) = inode.local() {
            short_form(local, self.superblock.has_kinds, take);
            return Ok(());
        }
        let mut block = vec![0; index(self.superblock.directory_block_bytes)];
        for parts in self.blocks(&inode)? {
            let mut at = 0;
            for (offset, length) in parts {
                let length = usize::try_from(length).unwrap_or(0);
                let Some(part) = block.get_mut(at..at + length) else { return Ok(()) };
                if !self.volume.read(part, offset)? {
                    part.fill(0);
                }
                at += length;
            }
            if at == block.len() && !self.names_of_block(&block, take) {
                return Ok(());
            }
        }
        Ok(())
    }
}

impl Tree<'_> {
    fn directory(&self, number: u64) -> Result<Option<Inode>> {
        let Some(offset) = self.superblock.inode_offset(number) else { return Ok(None) };
        let mut bytes = vec![0; index(self.superblock.inode_bytes)];
        let is_there = self.volume.read(&mut bytes, offset)?;
        Ok(is_there.then(|| Inode::parse(&bytes)).flatten().filter(Inode::is_directory))
    }

    /// The blocks of a directory with entries, each in the parts of the file system that it lies in.
    fn blocks(&mut self, inode: &Inode) -> Result<Vec<Vec<(u64, u64)>>> {
        let block_bytes = u64::from(self.superblock.block_bytes);
        let per_directory_block = u64::from(self.superblock.directory_block_bytes) / block_bytes;
        let mut left = MAX_DIRECTORY_BYTES / block_bytes;
        let mut pieces: Vec<(u64, u64)> = Vec::new();
        self.forks.for_each_run(inode, &mut |run| {
            let Some(first) = run.block_of_file else { return Ok(()) };
            for number in 0..run.length / block_bytes {
                let block = first.saturating_add(number);
                if block >= INDEX_OFFSET / block_bytes || left == 0 {
                    break;
                }
                left -= 1;
                pieces.push((block, run.offset + number * block_bytes));
            }
            Ok(())
        })?;
        pieces.sort_unstable();
        let in_one =
            |a: &(u64, u64), b: &(u64, u64)| a.0 / per_directory_block == b.0 / per_directory_block;
        let parts = |pieces: &[(u64, u64)]| {
            pieces.iter().map(|(_, offset)| (*offset, block_bytes)).collect()
        };
        Ok(pieces.chunk_by(in_one).map(parts).collect())
    }

    /// The entries of one block; answers with whether to go on.
    fn names_of_block(&self, block: &[u8], take: &mut dyn FnMut(u64, &[u8]) -> bool) -> bool {
        let (head, is_only) = match block.first_chunk() {
            Some(b"XD2B") => (16, true),
            Some(b"XD2D") => (16, false),
            Some(b"XDB3") => (64, true),
            Some(b"XDD3") => (64, false),
            _ => return true,
        };
        // A directory of one block has its index at the end of it.
        let end = match (is_only, be32_at(block, block.len() - 8)) {
            (true, Some(count)) => (block.len() - 8).saturating_sub(index(count).saturating_mul(8)),
            _ => block.len(),
        };
        let mut rest = block.get(head..end).unwrap_or_default();
        while let (Some(tag), Some(free)) = (be16_at(rest, 0), be16_at(rest, 2)) {
            let length = if tag == FREE {
                usize::from(free)
            } else {
                let Some((inode, name)) = entry(rest) else { return true };
                if !take(inode, name) {
                    return false;
                }
                // The number, the length, the name, its kind, and where the entry is; in eights.
                (8 + 1 + name.len() + usize::from(self.superblock.has_kinds) + 2)
                    .next_multiple_of(8)
            };
            if length < 8 || length > rest.len() {
                return true;
            }
            rest = &rest[length..];
        }
        true
    }
}

fn entry(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (inode, length) = (be64_at(bytes, 0)?, usize::from(*bytes.get(8)?));
    bytes.get(9..9 + length).filter(|name| !name.is_empty()).map(|name| (inode, name))
}

/// The entries of a directory in its inode, with its parent first.
fn short_form(bytes: &[u8], has_kinds: bool, take: &mut dyn FnMut(u64, &[u8]) -> bool) {
    let [count, long, rest @ ..] = bytes else { return };
    // Numbers are all long where one is.
    let number_bytes = if *long > 0 { 8 } else { 4 };
    let number = |bytes: &[u8]| match number_bytes {
        8 => be64_at(bytes, 0),
        _ => be32_at(bytes, 0).map(u64::from),
    };
    let Some(parent) = number(rest) else { return };
    if !take(parent, b"..") {
        return;
    }
    let mut rest = rest.get(number_bytes..).unwrap_or_default();
    for _ in 0..*count {
        let Some(length) = rest.first().map(|length| usize::from(*length)) else { return };
        let Some(name) = rest.get(3..3 + length) else { return };
        let at = 3 + length + usize::from(has_kinds);
        let Some(inode) = rest.get(at..).and_then(number) else { return };
        if name.is_empty() || !take(inode, name) {
            return;
        }
        rest = rest.get(at + number_bytes..).unwrap_or_default();
    }
}
