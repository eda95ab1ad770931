//! The block allocation table (MS-VHDX 2.5): which block of the file holds which part of the disk.
//!
//! The disk is cut into payload blocks. `chunk ratio` of them make a chunk, whose sectors are
//! counted by one bitmap block of 1 MiB (2^23 bits). The table interleaves them: after the entries
//! of a chunk's payload blocks stands the entry of its sector bitmap, which only differencing
//! images use. An entry is 64 bits: the state in bits 0 to 2, the place in the file in MiB in bits
//! 20 to 63.

use super::header::MIB;
use super::metadata::Metadata;
use std::fmt;

/// The bytes of an entry.
pub(crate) const ENTRY_BYTES: u64 = 8;
/// The bytes of a sector bitmap block, whatever the size of payload blocks.
pub(crate) const BITMAP_BLOCK_BYTES: u64 = MIB;
/// The sectors that one sector bitmap block counts, and so the sectors of a chunk.
pub(crate) const SECTORS_PER_CHUNK: u64 = BITMAP_BLOCK_BYTES * 8;
/// The bits of an entry that must be zero.
const RESERVED: u64 = (MIB - 1) & !STATE;
const STATE: u64 = 7;

/// The number of a payload block: its place on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct BlockNumber(pub(crate) u64);

/// The number of a chunk, and of its sector bitmap block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ChunkNumber(pub(crate) u64);

/// The place of an entry in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct BatIndex(pub(crate) u64);

/// The arithmetic of one image: sizes and where in the table things stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// The bytes of the disk.
    pub(crate) disk_size_bytes: u64,
    /// The power of two of a block's bytes.
    pub(crate) block_bits: u32,
    /// The power of two of a logical sector's bytes.
    pub(crate) sector_bits: u32,
    /// The power of two of a chunk's blocks.
    pub(crate) ratio_bits: u32,
    /// Whether the table has the bitmap entry of its last chunk, too.
    pub(crate) has_parent: bool,
}

impl Geometry {
    /// The geometry of the image that `metadata`, which is checked, describes.
    pub(crate) fn of(metadata: &Metadata) -> Self {
        let block_bits = metadata.block_size_bytes.trailing_zeros();
        let sector_bits = metadata.logical_sector_bytes.trailing_zeros();
        Self {
            disk_size_bytes: metadata.disk_size_bytes,
            block_bits,
            sector_bits,
            ratio_bits: (SECTORS_PER_CHUNK.trailing_zeros() + sector_bits)
                .saturating_sub(block_bits),
            has_parent: metadata.has_parent,
        }
    }

    /// The bytes of a payload block.
    pub(crate) const fn block_bytes(&self) -> u64 {
        1 << self.block_bits
    }

    /// The bytes of a logical sector.
    pub(crate) const fn sector_bytes(&self) -> u64 {
        1 << self.sector_bits
    }

    /// The sectors of a payload block.
    pub(crate) const fn sectors_per_block(&self) -> u64 {
        1 << (self.block_bits - self.sector_bits)
    }

    /// The payload blocks of a chunk.
    pub(crate) const fn chunk_ratio(&self) -> u64 {
        1 << self.ratio_bits
    }

    /// The payload blocks of the disk.
    pub(crate) const fn block_count(&self) -> u64 {
        self.disk_size_bytes.div_ceil(self.block_bytes())
    }

    /// The chunks of the disk.
    pub(crate) const fn chunk_count(&self) -> u64 {
        self.block_count().div_ceil(self.chunk_ratio())
    }

    /// The entries of the table.
    pub(crate) const fn entry_count(&self) -> u64 {
        let blocks = self.block_count();
        if self.has_parent {
            self.chunk_count() * (self.chunk_ratio() + 1)
        } else {
            blocks + (blocks.saturating_sub(1) >> self.ratio_bits)
        }
    }

    /// The bytes of the table.
    pub(crate) const fn table_bytes(&self) -> u64 {
        self.entry_count() * ENTRY_BYTES
    }

    /// The block that holds byte `offset` of the disk.
    pub(crate) const fn block_of(&self, offset: u64) -> BlockNumber {
        BlockNumber(offset >> self.block_bits)
    }

    /// The chunk that a block belongs to.
    pub(crate) const fn chunk_of(&self, block: BlockNumber) -> ChunkNumber {
        ChunkNumber(block.0 >> self.ratio_bits)
    }

    /// Where a block's entry stands.
    pub(crate) const fn payload_index(&self, block: BlockNumber) -> BatIndex {
        BatIndex(block.0 + (block.0 >> self.ratio_bits))
    }

    /// Where the entry of a chunk's sector bitmap stands.
    pub(crate) const fn bitmap_index(&self, chunk: ChunkNumber) -> BatIndex {
        BatIndex(chunk.0 * (self.chunk_ratio() + 1) + self.chunk_ratio())
    }

    /// What the entry at `index` is for.
    pub(crate) const fn entry_at(&self, index: BatIndex) -> EntryOf {
        let (chunk, inside) =
            (index.0 / (self.chunk_ratio() + 1), index.0 % (self.chunk_ratio() + 1));
        if inside == self.chunk_ratio() {
            EntryOf::Bitmap(ChunkNumber(chunk))
        } else {
            EntryOf::Payload(BlockNumber((chunk << self.ratio_bits) + inside))
        }
    }

    /// The bit of byte `offset` of the disk in the sector bitmap of its chunk: byte `bit / 8`, the
    /// least significant bit first.
    pub(crate) const fn bitmap_bit(&self, offset: u64) -> u64 {
        (offset >> self.sector_bits) % SECTORS_PER_CHUNK
    }

    /// The bytes of disk that lie in `block`: fewer than a block's at the end of the disk.
    pub(crate) const fn bytes_of(&self, block: BlockNumber) -> u64 {
        let start = block.0 << self.block_bits;
        let rest = self.disk_size_bytes.saturating_sub(start);
        if rest < self.block_bytes() { rest } else { self.block_bytes() }
    }
}

/// What an entry of the table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryOf {
    /// A payload block.
    Payload(BlockNumber),
    /// A chunk's sector bitmap.
    Bitmap(ChunkNumber),
}

/// An entry as it is stored.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct BatEntry(pub(crate) u64);

impl BatEntry {
    /// The entry of a payload block. `offset` is in bytes, a multiple of 1 MiB; 0 for none.
    pub(crate) const fn payload(state: PayloadState, offset: u64) -> Self {
        Self(offset & !(MIB - 1) | state as u64)
    }

    /// The entry of a sector bitmap block.
    pub(crate) const fn bitmap(state: BitmapBlockState, offset: u64) -> Self {
        Self(offset & !(MIB - 1) | state as u64)
    }

    /// Where the block is in the file, in bytes; 0 where it has no place. Only blocks that are
    /// present hold data there; the others keep the place reserved.
    pub(crate) const fn offset(self) -> u64 {
        self.0 & !(MIB - 1)
    }

    /// The bits that must be zero.
    pub(crate) const fn reserved(self) -> u64 {
        self.0 & RESERVED
    }

    /// The state of a payload block; `None` for a value that there is not.
    pub(crate) const fn payload_state(self) -> Option<PayloadState> {
        Some(match self.0 & STATE {
            0 => PayloadState::NotPresent,
            1 => PayloadState::Undefined,
            2 => PayloadState::Zero,
            // Version 0.95 of the specification, before the first release of Hyper-V with VHDX, had 5.
            3 | 5 => PayloadState::Unmapped,
            6 => PayloadState::FullyPresent,
            7 => PayloadState::PartiallyPresent,
            _ => return None,
        })
    }

    /// The state of a sector bitmap block; `None` for a value that there is not.
    pub(crate) const fn bitmap_state(self) -> Option<BitmapBlockState> {
        Some(match self.0 & STATE {
            0 => BitmapBlockState::NotPresent,
            6 => BitmapBlockState::Present,
            _ => return None,
        })
    }

    /// The state's number, for messages.
    pub(crate) const fn raw_state(self) -> u64 {
        self.0 & STATE
    }
}

impl fmt::Debug for BatEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

/// The state of a payload block (MS-VHDX 2.5.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PayloadState {
    /// Not in this image: zeros, or the parent's.
    NotPresent = 0,
    /// Anything may be read; zeros here, never the parent's.
    Undefined = 1,
    /// Zeros.
    Zero = 2,
    /// Given back by the guest: zeros, never the parent's.
    Unmapped = 3,
    /// All of the block is in the file.
    FullyPresent = 6,
    /// The sector bitmap says which sectors are in the file; the others are the parent's.
    PartiallyPresent = 7,
}

/// The state of a sector bitmap block (MS-VHDX 2.5.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BitmapBlockState {
    /// There is none; none of the chunk's blocks is partially present.
    NotPresent = 0,
    /// It is in the file.
    Present = 6,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhdx::guid::Guid;

    fn geometry(disk: u64, block: u32, sector: u32, has_parent: bool) -> Geometry {
        Geometry::of(&Metadata {
            block_size_bytes: block,
            leave_blocks_allocated: false,
            has_parent,
            disk_size_bytes: disk,
            disk_id: Guid::NIL,
            logical_sector_bytes: sector,
            physical_sector_bytes: 4096,
            parent_locator: None,
        })
    }

    #[test]
    fn chunk_ratios_and_entry_counts_of_the_specification() {
        const M: u32 = 1 << 20;
        for (block, sector, ratio) in [
            (M, 512, 4096),
            (2 * M, 512, 2048),
            (32 * M, 512, 128),
            (256 * M, 512, 16),
            (M, 4096, 32768),
            (256 * M, 4096, 128),
        ] {
            assert_eq!(geometry(1 << 40, block, sector, false).chunk_ratio(), ratio);
        }
        // A 4 MiB child of 2 MiB blocks.
        assert_eq!(geometry(4 << 20, 2 * M, 512, true).entry_count(), 2049);
        // The largest table: 64 TiB of 1 MiB blocks.
        assert_eq!(geometry(64 << 40, M, 512, false).entry_count(), (64 << 20) + (16 << 10) - 1);
        for (blocks, entries) in [(0, 0), (1, 1), (2048, 2048), (2049, 2050), (4097, 4099)] {
            let one = geometry(blocks * 2 * u64::from(M), 2 * M, 512, false);
            assert_eq!(one.entry_count(), entries);
        }
    }

    #[test]
    fn every_entry_is_found_where_it_stands() {
        let geometry = geometry(300 << 30, 256 << 20, 512, true);
        assert_eq!((geometry.block_count(), geometry.chunk_count()), (1200, 75));
        let mut index = 0;
        for block in 0..geometry.block_count() {
            let block = BlockNumber(block);
            if block.0 > 0 && block.0.is_multiple_of(16) {
                let chunk = ChunkNumber(block.0 / 16 - 1);
                assert_eq!(geometry.bitmap_index(chunk), BatIndex(index));
                assert_eq!(geometry.entry_at(BatIndex(index)), EntryOf::Bitmap(chunk));
                index += 1;
            }
            assert_eq!(geometry.payload_index(block), BatIndex(index));
            assert_eq!(geometry.entry_at(BatIndex(index)), EntryOf::Payload(block));
            index += 1;
        }
        assert_eq!(geometry.bitmap_index(ChunkNumber(74)), BatIndex(index));
        assert_eq!(geometry.entry_count(), index + 1);
        assert_eq!(geometry.block_bytes() * geometry.chunk_ratio(), 4 << 30);
        assert_eq!(geometry.bitmap_bit((4 << 30) + 512 * 9), 9);
    }

    #[test]
    fn the_last_block_may_be_short() {
        let geometry = geometry((5 << 20) + 512, 2 << 20, 512, false);
        assert_eq!(geometry.block_count(), 3);
        assert_eq!(geometry.bytes_of(BlockNumber(1)), 2 << 20);
        assert_eq!(geometry.bytes_of(BlockNumber(2)), (1 << 20) + 512);
        assert_eq!(geometry.bytes_of(BlockNumber(3)), 0);
    }

    #[test]
    fn entries_come_back() {
        for state in [
            PayloadState::NotPresent,
            PayloadState::Undefined,
            PayloadState::Zero,
            PayloadState::Unmapped,
            PayloadState::FullyPresent,
            PayloadState::PartiallyPresent,
        ] {
            let entry = BatEntry::payload(state, 77 << 20);
            assert_eq!((entry.payload_state(), entry.offset()), (Some(state), 77 << 20));
            assert_eq!(entry.reserved(), 0);
        }
        for state in [BitmapBlockState::NotPresent, BitmapBlockState::Present] {
            let entry = BatEntry::bitmap(state, u64::MAX);
            assert_eq!((entry.bitmap_state(), entry.offset()), (Some(state), !(MIB - 1)));
        }
        assert_eq!(BatEntry(4).payload_state(), None);
        assert_eq!(BatEntry(5).payload_state(), Some(PayloadState::Unmapped));
        assert_eq!(BatEntry(7).bitmap_state(), None);
        assert_eq!(BatEntry(0x8_0008).reserved(), 0x8_0008);
    }
}
