//! The superblock: of the first allocation group, or of another where that is lost.

use crate::bytes::{be16_at, be32_at, be64_at};
use crate::volume::Volume;
use vmtide_block::Result;

/// `INCOMPAT_FTYPE` of version 5.
const INCOMPAT_FTYPE: u32 = 0x1;
/// `XFS_SB_VERSION2_FTYPE` of version 4.
const FEATURES2_FTYPE: u32 = 0x200;

/// The shortest allocation group, in bytes: what makes sense. `mkfs.xfs` makes none below 16 MiB but at the end.
const MIN_GROUP_BYTES: u64 = 1 << 20;

/// What is said of the whole file system.
#[derive(Debug)]
pub(super) struct Superblock {
    pub(super) block_bytes: u32,
    pub(super) sector_bytes: u32,
    pub(super) inode_bytes: u32,
    pub(super) groups: u32,
    pub(super) group_blocks: u32,
    pub(super) root: u64,
    /// Version 5 has checksums, and longer heads of its blocks for them.
    pub(super) is_v5: bool,
    /// Whether directories tell what kind of file each entry is.
    pub(super) has_kinds: bool,
    /// The log's offset and length in bytes, where it is in the file system.
    pub(super) log: Option<(u64, u64)>,
    pub(super) directory_block_bytes: u32,
    group_log: u8,
    inodes_per_block_log: u8,
}

impl Superblock {
    /// Reads the first copy; where that makes no sense, that of the second group, which is where `mkfs.xfs` puts it on
    /// disks up to 4 TiB: a quarter into the file system.
    pub(super) fn read(volume: &Volume<'_>) -> Result<Option<Self>> {
        let quarter = volume.size_bytes() / 4;
        let mut bytes = [0; 512];
        // Groups are whole blocks: of 4 KiB, but where somebody asked for others.
        for offset in [0, quarter / 4096 * 4096, quarter.div_ceil(4096) * 4096] {
            if volume.read(&mut bytes, offset)?
                && let Some(found) = Self::parse(&bytes, volume.size_bytes())
                && (offset == 0 || offset == found.group_bytes())
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn parse(bytes: &[u8; 512], size_bytes: u64) -> Option<Self> {
        if bytes[..4] != *b"XFSB" {
            return None;
        }
        let version = be16_at(bytes, 100)? & 0xF;
        let is_v5 = version == 5;
        let (block_log, inode_log) = (bytes[120], bytes[122]);
        let (group_log, directory_log) = (bytes[124], bytes[192]);
        let (block_bytes, inode_bytes) = (be32_at(bytes, 4)?, u32::from(be16_at(bytes, 104)?));
        let sector_bytes = u32::from(be16_at(bytes, 102)?);
        let group_blocks = be32_at(bytes, 84)?;
        let group_bytes = u64::from(group_blocks) * u64::from(block_bytes);
        let is_power = |log: u8, number: u32| 1_u32.checked_shl(log.into()) == Some(number);
        let makes_sense = matches!(version, 4 | 5)
            && (512..=65536).contains(&block_bytes)
            && is_power(block_log, block_bytes)
            && (256..=2048.min(block_bytes)).contains(&inode_bytes)
            && is_power(inode_log, inode_bytes)
            && (512..=32768).contains(&sector_bytes)
            && sector_bytes.is_power_of_two()
            && group_bytes >= MIN_GROUP_BYTES
            && group_log <= 31
            && u64::from(group_blocks) <= 1 << group_log
            && directory_log <= 16 - block_log.min(16);
        makes_sense.then_some(())?;
        let log_block = be64_at(bytes, 48)?;
        let has_kinds = match is_v5 {
            true => be32_at(bytes, 216)? & INCOMPAT_FTYPE != 0,
            false => be32_at(bytes, 200)? & FEATURES2_FTYPE != 0,
        };
        let most = u32::try_from(size_bytes.div_ceil(group_bytes)).unwrap_or(u32::MAX);
        let mut found = Self {
            block_bytes,
            sector_bytes,
            inode_bytes,
            groups: be32_at(bytes, 88)?.min(most),
            group_blocks,
            root: be64_at(bytes, 56)?,
            is_v5,
            has_kinds,
            log: None,
            directory_block_bytes: block_bytes.checked_shl(directory_log.into())?,
            group_log,
            inodes_per_block_log: block_log - inode_log,
        };
        let log_bytes = u64::from(be32_at(bytes, 96)?) * u64::from(block_bytes);
        if log_block != 0 {
            found.log = found.block_offset(log_block).map(|offset| (offset, log_bytes));
        }
        Some(found)
    }

    pub(super) fn group_bytes(&self) -> u64 {
        u64::from(self.group_blocks) * u64::from(self.block_bytes)
    }

    /// Where a block lies that is named by its group and its number there.
    pub(super) fn block_offset(&self, block: u64) -> Option<u64> {
        let group = block >> self.group_log;
        let inside = block & ((1 << self.group_log) - 1);
        if inside >= u64::from(self.group_blocks) {
            return None;
        }
        group.checked_mul(self.group_bytes())?.checked_add(inside * u64::from(self.block_bytes))
    }

    /// The number of an inode by its group and its number there.
    pub(super) fn inode_number(&self, group: u32, inside: u32) -> u64 {
        u64::from(group) << (self.group_log + self.inodes_per_block_log) | u64::from(inside)
    }

    /// Where an inode lies.
    pub(super) fn inode_offset(&self, number: u64) -> Option<u64> {
        let inside = number & ((1 << self.inodes_per_block_log) - 1);
        let block = self.block_offset(number >> self.inodes_per_block_log)?;
        block.checked_add(inside * u64::from(self.inode_bytes))
    }
}
