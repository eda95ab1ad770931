//! The superblock, and the tables of inodes that the group descriptors name.

use crate::bytes::{u16_at, u32_at};
use crate::volume::Volume;
use vmtide_block::{CancelToken, RangeSet, Result};

/// `EXT4_SUPER_MAGIC`.
const MAGIC: u16 = 0xEF53;

/// `COMPAT_HAS_JOURNAL`.
const COMPAT_JOURNAL: u32 = 0x4;
/// `COMPAT_SPARSE_SUPER2`.
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
/// `INCOMPAT_META_BG`: group descriptors lie with their groups.
const INCOMPAT_META_BG: u32 = 0x10;
/// `INCOMPAT_EXTENTS`.
const INCOMPAT_EXTENTS: u32 = 0x40;
/// `INCOMPAT_64BIT`: group descriptors are longer.
const INCOMPAT_64BIT: u32 = 0x80;
/// `RO_COMPAT_SPARSE_SUPER`: few groups have a copy of the superblock.
const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
/// `RO_COMPAT_GDT_CSUM` and `RO_COMPAT_METADATA_CSUM`: group descriptors tell what was never used.
const RO_COMPAT_CHECKSUMS: u32 = 0x10 | 0x400;
/// What only ext4 has: huge files, `GDT_CSUM`, many directories, extra inode size, big clusters, `METADATA_CSUM`.
const RO_COMPAT_EXT4: u32 = 0x8 | 0x10 | 0x20 | 0x40 | 0x200 | 0x400;

/// `EXT4_BG_INODE_UNINIT`: no inode of the group was ever used.
const GROUP_INODES_UNUSED: u16 = 0x1;

/// Where copies of the superblock are: the first, and that of the second group as `mke2fs` makes it with blocks of 1, 2 and 4
/// KiB.
const COPIES: [u64; 4] = [1024, 8193 << 10, 16384 << 11, 32768 << 12];

/// What is said of the whole file system.
#[derive(Debug)]
pub(super) struct Superblock {
    pub(super) block_bytes: u32,
    pub(super) blocks: u64,
    pub(super) inode_bytes: u32,
    pub(super) has_journal: bool,
    inodes: u32,
    first_data_block: u32,
    blocks_per_group: u32,
    inodes_per_group: u32,
    descriptor_bytes: u32,
    first_meta_group: Option<u32>,
    compat: u32,
    incompat: u32,
    ro_compat: u32,
    backup_groups: [u32; 2],
}

/// Where a group's inodes are, and how many of them were ever used.
struct Group {
    table_block: u64,
    used_inodes: u32,
}

impl Superblock {
    /// Reads the first copy that makes sense.
    pub(super) fn read(volume: &Volume<'_>) -> Result<Option<Self>> {
        let mut bytes = [0; 1024];
        for offset in COPIES {
            if volume.read(&mut bytes, offset)?
                && let Some(superblock) = Self::parse(&bytes, volume.size_bytes())
            {
                return Ok(Some(superblock));
            }
        }
        Ok(None)
    }

    fn parse(bytes: &[u8], size_bytes: u64) -> Option<Self> {
        if u16_at(bytes, 0x38)? != MAGIC {
            return None;
        }
        let log_block_bytes = u32_at(bytes, 0x18)?;
        let block_bytes = 1024_u32.checked_shl(log_block_bytes).filter(|_| log_block_bytes <= 6)?;
        let has_revision = u32_at(bytes, 0x4C)? >= 1;
        let feature = |at| if has_revision { u32_at(bytes, at) } else { Some(0) };
        let (compat, incompat, ro_compat) = (feature(0x5C)?, feature(0x60)?, feature(0x64)?);
        let inode_bytes = if has_revision { u32::from(u16_at(bytes, 0x58)?) } else { 128 };
        let is_64_bit = incompat & INCOMPAT_64BIT != 0;
        let descriptor_bytes = if is_64_bit { u32::from(u16_at(bytes, 0xFE)?) } else { 32 };
        let high = if is_64_bit { u64::from(u32_at(bytes, 0x150)?) << 32 } else { 0 };
        let blocks = high | u64::from(u32_at(bytes, 0x4)?);
        let (blocks_per_group, inodes_per_group) = (u32_at(bytes, 0x20)?, u32_at(bytes, 0x28)?);
        let makes_sense = inode_bytes.is_power_of_two()
            && (128..=block_bytes).contains(&inode_bytes)
            && descriptor_bytes.is_power_of_two()
            && (32..=block_bytes).contains(&descriptor_bytes)
            && (1..=8 * block_bytes).contains(&inodes_per_group)
            && blocks_per_group > 0
            && blocks > 0;
        makes_sense.then_some(())?;
        Some(Self {
            block_bytes,
            blocks: blocks.min(size_bytes / u64::from(block_bytes)),
            inode_bytes,
            has_journal: compat & COMPAT_JOURNAL != 0,
            inodes: u32_at(bytes, 0)?,
            first_data_block: u32_at(bytes, 0x14)?,
            blocks_per_group,
            inodes_per_group,
            descriptor_bytes,
            first_meta_group: match incompat & INCOMPAT_META_BG {
                0 => None,
                _ => Some(u32_at(bytes, 0x104)?),
            },
            compat,
            incompat,
            ro_compat,
            backup_groups: [u32_at(bytes, 0x24C)?, u32_at(bytes, 0x250)?],
        })
    }

    /// Which of the three it is, by what only the later ones have.
    pub(super) const fn kind(&self) -> &'static str {
        let is_ext4 = self.incompat & (INCOMPAT_EXTENTS | INCOMPAT_64BIT) != 0
            || self.ro_compat & RO_COMPAT_EXT4 != 0;
        match (is_ext4, self.has_journal) {
            (true, _) => "ext4",
            (false, true) => "ext3",
            (false, false) => "ext2",
        }
    }

    /// Hands over all inodes that may be in use, with their numbers. Answers with whether nothing of their tables, and of
    /// what tells where these are, lies in `ranges` of the disk: inodes in damaged places are not found.
    ///
    /// # Errors
    /// Those of the disk and of `take`; cancelled.
    pub(super) fn for_each_inode(
        &self,
        volume: &Volume<'_>,
        ranges: &RangeSet,
        cancel: &CancelToken,
        take: &mut dyn FnMut(u32, &[u8]) -> Result<()>,
    ) -> Result<bool> {
        let mut is_whole = true;
        let groups = self.inodes.div_ceil(self.inodes_per_group);
        for number in 0..groups {
            cancel.check()?;
            // Beyond the disk's end there are no more.
            if self.first_block_of(number) >= self.blocks {
                break;
            }
            let descriptor = self.descriptor_offset(number, 0);
            is_whole &= descriptor.is_some_and(|offset| {
                volume.touched(offset, self.descriptor_bytes.into(), ranges).is_empty()
            });
            let Some(group) = self.group(volume, number)? else { continue };
            let Some(offset) = group.table_block.checked_mul(u64::from(self.block_bytes)) else {
                continue;
            };
            let first = number * self.inodes_per_group;
            let count = group.used_inodes.min(self.inodes - first);
            let length = u64::from(count) * u64::from(self.inode_bytes);
            let table = (offset, length);
            is_whole &= volume.touched(offset, length, ranges).is_empty();
            volume.for_each_entry(table, self.inode_bytes, cancel, &mut |entry, bytes| {
                let inode =
                    u32::try_from(entry).ok().and_then(|entry| first.checked_add(entry + 1));
                inode.map_or(Ok(()), |inode| take(inode, bytes))
            })?;
        }
        Ok(is_whole)
    }

    /// Where an inode lies in the file system.
    pub(super) fn inode_offset(&self, volume: &Volume<'_>, inode: u32) -> Result<Option<u64>> {
        let Some(number) = inode.checked_sub(1).filter(|_| inode <= self.inodes) else {
            return Ok(None);
        };
        let Some(group) = self.group(volume, number / self.inodes_per_group)? else {
            return Ok(None);
        };
        let inside = u64::from(number % self.inodes_per_group) * u64::from(self.inode_bytes);
        let table = group.table_block.checked_mul(u64::from(self.block_bytes));
        Ok(table.and_then(|table| table.checked_add(inside)))
    }

    /// Where the descriptor of a group lies, as far as the group `copy` has it.
    fn descriptor_offset(&self, group: u32, copy: u32) -> Option<u64> {
        let per_block = self.block_bytes / self.descriptor_bytes;
        let block = self.descriptor_block(group / per_block, per_block, copy)?;
        let inside = u64::from(group % per_block) * u64::from(self.descriptor_bytes);
        block.checked_mul(u64::from(self.block_bytes))?.checked_add(inside)
    }

    /// A group by its descriptor, or by the copy of that in the second group where the first is lost.
    fn group(&self, volume: &Volume<'_>, number: u32) -> Result<Option<Group>> {
        let mut bytes = [0; 64];
        let bytes = &mut bytes[..crate::bytes::index(self.descriptor_bytes.min(64))];
        for copy in [0, 1] {
            if let Some(offset) = self.descriptor_offset(number, copy)
                && volume.read(bytes, offset)?
                && let Some(group) = self.parse_group(bytes)
            {
                return Ok(Some(group));
            }
        }
        Ok(None)
    }

    fn parse_group(&self, bytes: &[u8]) -> Option<Group> {
        let low = u64::from(u32_at(bytes, 0x8)?);
        let high = u32_at(bytes, 0x28).map_or(0, |high| u64::from(high) << 32);
        let mut used_inodes = self.inodes_per_group;
        if self.ro_compat & RO_COMPAT_CHECKSUMS != 0 {
            let unused_high = u16_at(bytes, 0x32).map_or(0, |high| u32::from(high) << 16);
            let unused = unused_high | u32::from(u16_at(bytes, 0x1C)?);
            let never = u16_at(bytes, 0x12)? & GROUP_INODES_UNUSED != 0;
            used_inodes = if never { 0 } else { used_inodes.saturating_sub(unused) };
        }
        let table_block = low | high;
        // Of zeros, as after damage.
        (table_block > 0).then_some(Group { table_block, used_inodes })
    }

    fn first_block_of(&self, group: u32) -> u64 {
        u64::from(self.first_data_block) + u64::from(group) * u64::from(self.blocks_per_group)
    }

    /// The block with the group descriptors from `number * per_block` on, in the group `copy`.
    fn descriptor_block(&self, number: u32, per_block: u32, copy: u32) -> Option<u64> {
        match self.first_meta_group {
            Some(first) if number >= first => {
                let group = number.checked_mul(per_block)?.checked_add(copy)?;
                Some(self.first_block_of(group) + u64::from(self.has_superblock(group)))
            }
            _ => (copy == 0 || self.has_superblock(copy))
                .then(|| self.first_block_of(copy) + 1 + u64::from(number)),
        }
    }

    /// Whether a group begins with a copy of the superblock.
    fn has_superblock(&self, group: u32) -> bool {
        if group == 0 {
            return true;
        }
        if self.compat & COMPAT_SPARSE_SUPER2 != 0 {
            return self.backup_groups.contains(&group);
        }
        self.ro_compat & RO_COMPAT_SPARSE_SUPER == 0
            || [3, 5, 7].iter().any(|base| is_power_of(group, *base))
    }
}

/// Whether `number` is 1 or `base` times itself some times.
fn is_power_of(mut number: u32, base: u32) -> bool {
    while number > 1 && number.is_multiple_of(base) {
        number /= base;
    }
    number == 1
}
